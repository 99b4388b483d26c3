"""Change a graph into the SPMD graph of one rank, as a propagation says.

Weights become shards, target shapes and numbers of heads those of one rank; collectives and masks for rows of a sharded
vocabulary are inserted.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.graph.builder import MICROSOFT, Builder
from passopt.ir.graph.decoder import COLLECTIVE, DEGREE, KV_HEADS
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.shapes.elements import DimOf, elements
from passopt.ir.weights.expressions import SCALE_OF_ZEROS, Expression, QuantizeScales
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of, small_constant
from passopt.ir.weights.literals import Literal
from passopt.passes.sharding.axes import ndim_of
from passopt.passes.sharding.placement import Product, Sharded, VocabMasked, local_length, padded_units
from passopt.passes.sharding.propagate import Propagation, Use, describe
from passopt.passes.sharding.quantized_activations import scale_uses
from passopt.passes.sharding.rank_lengths import piece_of_target

#: The dtypes that onnxruntime's AllReduce takes.
_REDUCIBLE = {onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE}


@dataclasses.dataclass(frozen=True)
class Materialized:
    """A report of what was done: the names of the sharded tensors, and the numbers of collectives in the graph."""

    sharded: tuple[str, ...]
    all_reduces: int
    all_gathers: int


class Materializer:
    """Change the graph of `editor` into the graph that each of `degree` ranks runs, as the propagation `state` says."""

    def __init__(self, state: Propagation, degree: int, editor: Editor) -> None:
        self.state = state
        self.degree = degree
        self.editor = editor
        self._kv_heads = _kv_heads(state)
        self._scale_uses = scale_uses(state)  # It is read off the graph while that still has the shapes of the whole.
        self._owned: dict[VocabMasked, tuple[onnx_ir.Value, onnx_ir.Value]] = {}

    def run(self) -> Materialized:
        """Change the graph and say what was done; raise PassError if a target shape or output cannot be changed."""
        outputs = [(value, self.state.specs.get(value)) for value in self.editor.graph.outputs]
        for use, (position, spec) in self.state.targets.items():
            self._shrink(use, position, spec)
        for (node, name), spec in self.state.attributes.items():
            count = node.attributes[name].as_int()
            node.attributes[name] = onnx_ir.AttrInt64(name, local_length(count, spec, self.degree))
        names = self._shard_constants()
        self._localize_shapes()
        for node, masked in self.state.tables.items():
            self._mask_indices(node, masked)
        for value in self.state.partial:
            self._all_reduce(value, None)
        for value, masked in self.state.masked.items():
            self._all_reduce(value, masked)
        for value, layout in outputs:
            if isinstance(layout, Sharded) and not self.state.is_cache_output(value):
                self._all_gather(value, layout)
        self._record()
        kinds = collections.Counter(node.op_type for node in self.editor.graph if COLLECTIVE in node.metadata_props)
        return Materialized(tuple(names), kinds["AllReduce"], kinds["AllGather"])

    # Weights and constants.

    def _shard_constants(self) -> list[str]:
        """Make one sharded initializer per constant and spec, and return the names of all of them.

        An initializer takes over the name of the constant if nothing reads the whole constant any more.
        """
        groups: dict[tuple[onnx_ir.Value, Sharded], list[Use]] = collections.defaultdict(list)
        for use, spec in self.state.constant_uses.items():
            value = use.node.inputs[use.index]
            assert value is not None
            groups[(value, spec)].append(use)
        names = []
        for (value, spec), uses in groups.items():
            name = value.name or "constant"
            expression = self._sharded(value, spec, uses)
            for use in uses:
                use.node.replace_input_with(use.index, None)
            alone = not value.uses() and not value.is_graph_output()
            producer = value.producer()
            if alone and producer is not None:
                self.editor.remove_dead([producer])
            elif alone:
                self.editor.remove_unused_initializer(value)
            final = name if alone else self.editor.unique(f"{name}.shard")
            made = _initializer(final, expression)
            self.editor.graph.register_initializer(made)
            for use in uses:
                use.node.replace_input_with(use.index, made)
            names.append(final)
        return names

    def _sharded(self, value: onnx_ir.Value, spec: Sharded, uses: list[Use]) -> Expression:
        """Return the expression of a rank's shard of a constant, padded if the degree does not divide its units."""
        expression = expression_of(value)
        assert expression is not None
        padded = padded_units(spec.units, self.degree)
        length = expression.shape[spec.axis] // spec.units * padded
        is_scale = isinstance(expression, QuantizeScales) or not self._scale_uses.isdisjoint(uses)
        filler = SCALE_OF_ZEROS if is_scale else 0.0
        segments = spec.fixed_segments
        return expression.pad(spec.axis, length, segments, filler).shard(spec.axis, self.degree, segments)

    # Shapes.

    def _localize_shapes(self) -> None:
        """Set the shapes of sharded values to those on one rank."""
        for value, spec in self.state.specs.items():
            if not isinstance(spec, Sharded) or value.shape is None:
                continue
            known = self._local_dimension(value, spec)
            dims = [known if axis == spec.axis else dim for axis, dim in enumerate(value.shape.dims)]
            value.shape = onnx_ir.Shape(dims)

    def _local_dimension(self, value: onnx_ir.Value, spec: Sharded) -> int | str | None:
        """Return the length of the sharded axis on one rank; None if it is unknown.

        A merged axis such as `6*batch` has such a length if its number, here 6, can be divided by the units.
        """
        whole = Product.of([(dimensions(value) or [])[spec.axis]])
        if whole is None or whole.number % spec.units:
            return None
        return dataclasses.replace(whole, number=local_length(whole.number, spec, self.degree)).dimension

    def _shrink(self, use: Use, position: int, spec: Sharded) -> None:
        """Rebuild a target shape with the length on one rank at `position`; -1 means all elements of Split sizes."""
        node, target = use.node, use.node.inputs[use.index]
        assert target is not None
        builder = self.editor.builder(target.name or "shape")
        whole = small_constant(target)
        if whole is not None:
            local = whole.copy()
            chosen = slice(None) if position < 0 else slice(position, position + 1)
            local[chosen] = [local_length(int(item), spec, self.degree) for item in whole[chosen]]
            result = builder.literal(local)
        else:
            result = self._shrunk_target(builder, node, target, position, spec)
        self.editor.insert(builder.built, node, [node])
        producer = target.producer()
        node.replace_input_with(use.index, result)
        if producer is not None:
            self.editor.remove_dead([producer])
        else:
            self.editor.remove_unused_initializer(target)

    def _shrunk_target(
        self, builder: Builder, node: onnx_ir.Node, target: onnx_ir.Value, position: int, spec: Sharded
    ) -> Any:
        """Return a computed target shape, of whose Concat only the input for `position` is replaced."""
        concat, found = target.producer(), piece_of_target(target, position)
        if concat is None or found is None:
            return self._rebuilt_target(builder, node, target, position, spec)
        index, piece = found
        whole = small_constant(piece)
        if whole is not None:
            local: Any = np.array([local_length(int(whole.reshape(-1)[0]), spec, self.degree)], np.int64)
        else:
            share = padded_units(spec.units, self.degree) // self.degree
            local = builder.Div(builder.Mul(piece, [share]), [spec.units])
        return builder.Concat(*concat.inputs[:index], local, *concat.inputs[index + 1 :], axis=0)

    def _rebuilt_target(
        self, builder: Builder, node: onnx_ir.Node, target: onnx_ir.Value, position: int, spec: Sharded
    ) -> Any:
        """Return a target shape that is put together anew from its elements, however it was computed.

        Raises:
            PassError: If an element is neither a constant nor the length of an axis.
        """
        pieces: list[Any] = []
        for index, item in enumerate(elements(target) or [None]):
            if item is None:
                raise PassError(
                    f"{describe(node)}: expected a target shape whose elements are constants and lengths, "
                    f"found {target.name}; run fold-constants before"
                )
            if isinstance(item, DimOf):
                pieces.append(builder.Shape(item.value, start=item.axis, end=item.axis + 1))
                continue
            number = local_length(item.number, spec, self.degree) if index == position else item.number
            pieces.append(np.array([number], np.int64))
        return builder.Concat(*pieces, axis=0)

    # Collectives.

    def _all_reduce(self, value: onnx_ir.Value, masked: VocabMasked | None) -> None:
        """Insert an AllReduce behind a partial sum, or behind looked-up rows after masking those of other ranks."""
        builder = self.editor.builder(value.name or "value")
        current: Any = value
        bias = self._detached_bias(value.producer())
        if masked is not None:
            current = self._masked_rows(builder, value, masked)
        narrow = value.dtype if value.dtype not in _REDUCIBLE else None
        if narrow is not None:
            # onnxruntime's AllReduce takes no bfloat16.
            current = builder.Cast(current, to=onnx_ir.DataType.FLOAT.value)
        current = builder.AllReduce(current, domain=MICROSOFT)
        if narrow is not None:
            current = builder.Cast(current, to=narrow.value)
        if bias is not None:
            current = builder.Add(current, builder.Mul(bias[0], bias[1]) if bias[1] != 1 else bias[0])
        self.editor.follow(value, current, builder.built, "partial")

    def _detached_bias(self, node: onnx_ir.Node | None) -> tuple[onnx_ir.Value, float] | None:
        """Remove the bias from a row-parallel Gemm and return it with its factor, to be added after the AllReduce.

        If every rank added it, it would count `degree` times. Returns None if the node has no such bias.
        """
        bias = node.inputs[2] if node is not None and node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if node is None or bias is None:
            return None
        node.replace_input_with(2, None)
        node.resize_inputs(2)
        beta = node.attributes.pop("beta", None)
        return bias, beta.as_float() if beta is not None else 1.0

    def _masked_rows(self, builder: Builder, value: onnx_ir.Value, masked: VocabMasked) -> Any:
        """Set the rows of tokens that another rank owns to zero, so that the sum over ranks has each row once."""
        owned, _ = self._owned[masked]
        for _ in range(ndim_of(value) - ndim_of(owned)):
            owned = builder.Unsqueeze(owned, [-1])
        assert value.dtype is not None
        return builder.Where(owned, value, builder.literal(np.zeros((), value.dtype.numpy())))

    def _mask_indices(self, node: onnx_ir.Node, masked: VocabMasked) -> None:
        """Let a look-up read row 0 for tokens that another rank owns."""
        self._require_opset(13, f"sharing out the table of {called(node)}")
        ids = node.inputs[1]
        assert ids is not None
        if masked not in self._owned:
            self._owned[masked] = self._owned_tokens(node, ids, masked.units)
        node.replace_input_with(1, self._owned[masked][1])

    def _owned_tokens(self, node: onnx_ir.Node, ids: onnx_ir.Value, units: int) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Build the mask of the token ids whose rows this rank owns, and their indices among these rows."""
        rows = padded_units(units, self.degree) // self.degree
        builder = self.editor.builder(f"{ids.name}.local")
        # Token ids may be int32, and the operators need both inputs in the same dtype.
        kind = (ids.dtype or onnx_ir.DataType.INT64).numpy()
        zero, end = builder.literal(np.zeros((), kind)), builder.literal(np.array(rows, kind))
        if self.state.decoder is None:  # Gather counts a negative index from the end; a decoder gets no such token.
            ids = builder.Where(builder.Less(ids, zero), builder.Add(ids, builder.literal(np.array(units, kind))), ids)
        starts = Literal.of((np.arange(self.degree) * rows).astype(kind)).shard(0, self.degree)
        local = builder.Sub(ids, builder.initializer("vocab.start", starts))
        owned = builder.And(builder.GreaterOrEqual(local, zero), builder.Less(local, end))
        index = builder.Where(owned, local, zero)
        self.editor.insert(builder.built, node, [node])
        return owned, index

    def _require_opset(self, opset: int, what: str) -> None:
        """Raise PassError if the model's opset lacks operators that a change needs."""
        if self.editor.opset < opset:
            raise PassError(
                f"{self.editor.author}: {what} needs opset {opset}, this model has {self.editor.opset}. "
                f"Run legalize first."
            )

    def _all_gather(self, value: onnx_ir.Value, spec: Sharded) -> None:
        """Insert an AllGather behind a graph output, and cut off its padding."""
        length = spec.units  # A gathered output has one segment, so these are all its units.
        if spec.fixed_segments != 1:
            raise PassError(f"graph output {value.name!r} is {spec}; only one segment can be gathered")
        builder = self.editor.builder(value.name or "value")
        local = value.shape[spec.axis] if value.shape is not None else None
        gathered = builder.AllGather(value, domain=MICROSOFT, axis=spec.axis, group_size=self.degree)
        padded = padded_units(spec.units, self.degree)
        if padded != spec.units:
            assert isinstance(local, int)
            self._require_opset(10, f"cutting off the padding of {value.name}")
            true_length = local * self.degree // padded * length
            gathered = builder.Slice(gathered, [0], [true_length], [spec.axis])
        self.editor.follow(value, gathered, builder.built, "shard", outputs_only=True)

    def _record(self) -> None:
        """Give the collectives numbers in the order of the graph, and write what ranks must know into the metadata."""
        index = 0
        for node in self.editor.graph:
            if node.domain == MICROSOFT and node.op_type in {"AllReduce", "AllGather"}:
                node.name = self.editor.unique(f"{node.op_type.lower()}.{index}")
                node.metadata_props[COLLECTIVE] = str(index)
                index += 1
        metadata = self.editor.model.metadata_props
        metadata[DEGREE] = str(self.degree)
        if self._kv_heads is not None:
            metadata[KV_HEADS] = str(self._kv_heads)


def _kv_heads(state: Propagation) -> int | None:
    """Return the number of heads of the whole cache, without padding; None if the graph has no cache.

    It is read off the cache inputs, or off the cache outputs of a graph without a past.
    """
    if state.decoder is not None:
        return state.decoder.kv_heads
    outputs = [value for value in state.model.graph.outputs if state.is_cache_output(value)]
    heads = dimensions(outputs[0]) if outputs else None
    return heads[1] if heads is not None and len(heads) == 4 and isinstance(heads[1], int) else None


def _initializer(name: str, expression: Expression) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(expression.shape), type=onnx_ir.TensorType(expression.dtype))
    value.const_value = LazyWeight(expression, name)
    return value
