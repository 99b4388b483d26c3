"""Lower a whole graph to one Relax function.

Patterns (linears, SwiGLU) are found first and cover the nodes inside them. Then only the nodes that the outputs still
need are lowered, in graph order. All nodes without a native kernel are collected and reported together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import onnx_ir

from passopt.ir.attention.fused import find_attention
from passopt.ir.attention.int8_cache import int8_caches
from passopt.ir.errors import ModelError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.decoder import LOGITS, SCALES, find_decoder
from passopt.targets.tvm.compiled_folder import BLOCK, Quantized
from passopt.targets.tvm.compiler.lowering import attention, collectives, elementwise, movement, norms, reductions  # noqa: F401  (they register)
from passopt.targets.tvm.compiler.lowering.importer import import_node
from passopt.targets.tvm.compiler.lowering.linears import (
    BOTH_COMPUTED,
    WEIGHT_IS_COMPUTED,
    find_added_linear,
    find_any_linear,
    is_computed_weight,
    lower_added_linear,
    lower_linear,
    lower_product,
)
from passopt.targets.tvm.compiler.lowering.registry import CONVERTERS
from passopt.targets.tvm.compiler.lowering.values import (
    Cache,
    CacheSlot,
    Delegated,
    Parameter,
    Tvm,
    Unsupported,
    Values,
    stored_name,
)
from passopt.targets.tvm.machines import Machine

#: The oldest opset that is lowered: Softmax and the axes of Squeeze and ReduceSum are defined as they are since then.
OLDEST_OPSET = 13
#: The name of the library's function.
MAIN = "main"

#: Operators that multiply matrices. TVM's own importer lowers them only if the user allows it.
_LINEARS = frozenset(
    {"Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMulInteger", "QLinearMatMul", "RNN", "ConvInteger"}
)
_PAST = re.compile(r"past\.(\d+)\.(key|value)\Z")


@dataclasses.dataclass(frozen=True)
class Missing:
    """A node without a native kernel, and the reason why it has none."""

    node: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"node {self.node!r} ({self.op_type}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A Relax module with the function `main`, and how to call it.

    The function takes `inputs` (those of the graph that are not the past, in order), then the number of cached
    positions (as a shape), the caches, and `parameters`. If `in_place`, the caches are [b, h, blocks, d, 16] and
    [b, h, blocks·16, d] for each layer, followed by the scales [b, h, blocks·16] of both if they are codes; they are
    written in place, and the function returns the logits. Otherwise it takes the past [b, h, p, d] and returns the
    present after the logits.

    `kernels` counts the uses of each kernel. `quantized` tells which parts are int8 in the linear that has most of
    them. `fallbacks` are the nodes that have no native kernel and were compiled anyway, and `imported` the small
    operators that TVM's own importer lowered.
    """

    module: Tvm
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    in_place: bool
    kernels: dict[str, int]
    quantized: Quantized
    fallbacks: tuple[Missing, ...]
    imported: tuple[Missing, ...]


@dataclasses.dataclass(frozen=True)
class _Selection:
    """A pattern that is lowered in place of its last node: the values it reads, and the function that lowers it."""

    reads: tuple[onnx_ir.Value | None, ...]
    lower: Callable[[Values], None]


def lower(
    model: onnx_ir.Model, machine: Machine, *, allow_fallback: bool = False, per_rank: frozenset[str] = frozenset()
) -> Lowered:
    """Lower a decoder with KV cache to a Relax module.

    Args:
        model: The model, of opset 13 or later.
        machine: The CPU or GPU to choose kernels for.
        allow_fallback: If true, compile nodes without a native kernel by TVM's own operators.
        per_rank: The names of constants that become parameters, because they differ between ranks.

    Raises:
        ModelError: If nodes have no native kernel (the message names them), or if the model is not such a decoder.
    """
    from tvm import relax

    if find_decoder(model) is None:
        raise ModelError(
            "not a decoder with input_ids and past.N.key/value [batch, heads, past, width]; export with `phase=merged`"
        )
    opset = int(model.graph.opset_imports.get("", 0))
    if opset < OLDEST_OPSET:
        raise ModelError(f"opset {opset}: operators mean something else before {OLDEST_OPSET}; run legalize before")
    complete_types(model)
    builder = relax.BlockBuilder()
    return _Lowering(model, Values(builder, machine, per_rank), allow_fallback=allow_fallback).run()


class _Lowering:
    def __init__(self, model: onnx_ir.Model, at: Values, *, allow_fallback: bool) -> None:
        self.model = model
        self.at = at
        self.allow_fallback = allow_fallback
        self.missing: list[Missing] = []
        self.imported: list[Missing] = []
        self.opset = int(model.graph.opset_imports.get("", 0))
        self.caches = int8_caches(model)

    def run(self) -> Lowered:
        """Lower the whole graph, or raise ModelError that lists the nodes without a native kernel."""
        from tvm import relax

        unfused = _not_in_place(self.model)
        self.missing += unfused
        in_place = not unfused
        if self.caches and not in_place and self.allow_fallback:
            raise ModelError(f"{unfused[0]}; a cache in 8 bits is kept in place only, so `allow_fallback` cannot help")
        inputs, leading = self._inputs(in_place=in_place)
        wanted = [value for value in self.model.graph.outputs if value.name == LOGITS or not in_place]
        selections = {node: found for node in self.model.graph if (found := self._select(node)) is not None}
        nodes = needed_nodes(self.model, wanted, selections)
        if not self.allow_fallback:
            self.missing += [item for node in nodes if node not in selections and (item := _computed_product(node))]
            self._refuse()
        builder = self.at.builder
        with builder.function(MAIN):
            with builder.dataflow():
                for node in nodes:
                    if not self._lower(node, selections.get(node)):
                        break
                # If the model is refused, the function is still closed, and then thrown away: TVM complains on stderr
                # about a function left open.
                refused = bool(self.missing) and not self.allow_fallback
                given = [relax.const(0)] if refused else [self._output(value) for value in wanted]
                outputs = [builder.emit_output(item) for item in given]
            parameters = tuple(self.at.parameters.values())
            variables = [*leading, *(item.variable for item in parameters)]
            builder.emit_func_output(outputs[0] if in_place or refused else outputs, params=variables)
        self._refuse()
        module = builder.get()
        module[MAIN] = module[MAIN].with_attr("num_input", len(leading))
        missing, imported = tuple(self.missing), tuple(self.imported)
        return Lowered(module, inputs, parameters, in_place, self.at.notes, self._quantized(), missing, imported)

    def _quantized(self) -> Quantized:
        order: tuple[Quantized, ...] = ("dynamic", "groups", "weights", "none")
        return next((kind for kind in order if kind in self.at.quantized), "none")

    def _inputs(self, *, in_place: bool) -> tuple[tuple[str, ...], list[Tvm]]:
        """Return the names of the inputs besides the past, and the variables of all arguments before the parameters.

        The variables are those of the plain inputs, of the number of cached positions and of the caches.
        """
        from tvm import relax

        plain: list[tuple[str, Tvm]] = []
        caches: list[Tvm] = []
        slots: dict[onnx_ir.Value, CacheSlot] = {}
        read = {cache.key.input: cache.key.past for cache in self.caches.values()}
        past = self.at.symbol("past")
        values = {str(value.name): value for value in self.model.graph.inputs}
        for name, value in values.items():
            if _PAST.match(name) is None and not _is_scales(name):
                plain.append((name, self._input(name, value)))
        for name, value in values.items():
            match = _PAST.match(name)
            if match is None or match[2] == "value":
                continue
            partner = values.get(f"past.{match[1]}.value")
            if partner is None:
                raise ModelError(f"input {name!r} has no past.{match[1]}.value beside it; export with `phase=merged`")
            if in_place:
                slot = slots[read.get(value, value)] = self._slot(int(match[1]), value, partner)
                caches += slot.tensors
                self._state_past_shape(value, partner)
            else:
                caches += [self._input(name, value), self._input(str(partner.name), partner)]
        count = relax.Var("past", relax.ShapeType([past]))
        if in_place:
            self.at.cache = Cache(slots, past)
        return tuple(name for name, _ in plain), [*(variable for _, variable in plain), count, *caches]

    def _dims(self, value: onnx_ir.Value) -> list[Any]:
        shape = value.shape
        assert shape is not None, f"{value.name} has no shape"
        return [dim if isinstance(dim, int) else self.at.symbol(str(dim.value)) for dim in shape.dims]

    def _input(self, name: str, value: onnx_ir.Value) -> Tvm:
        from tvm import relax

        if value.dtype is None:
            raise ModelError(f"input {name!r} has no dtype")
        stored = stored_name(value.dtype)
        variable = relax.Var(name.replace(".", "_"), relax.TensorType(self._dims(value), stored))
        self.at.defer(value, lambda: self.at.widened(variable))
        return variable

    def _output(self, value: onnx_ir.Value) -> Tvm:
        """Return the tensor of an output: logits in fp32, the present in its stored dtype, as it is the next past."""
        from tvm import relax

        tensor = self.at.tensor(value)
        stored = None if value.dtype is None or value.name == LOGITS else stored_name(value.dtype)
        return tensor if stored in (None, str(tensor.ty.dtype)) else self.at.emit(relax.op.astype(tensor, stored))

    def _slot(self, layer: int, key: onnx_ir.Value, value: onnx_ir.Value) -> CacheSlot:
        from tvm import relax

        assert key.dtype is not None
        stored, blocks = stored_name(key.dtype), self.at.symbol("blocks")
        batch, heads, _, width = self._dims(key)
        kinds = [[batch, heads, blocks, width, BLOCK], [batch, heads, blocks * BLOCK, self._dims(value)[3]]]
        names = (f"cache_{layer}_key", f"cache_{layer}_value")
        pair = [relax.Var(name, relax.TensorType(dims, stored)) for name, dims in zip(names, kinds, strict=True)]
        if stored != "int8":
            return CacheSlot(pair[0], pair[1], stored)
        kind = relax.TensorType([batch, heads, blocks * BLOCK], "float32")
        return CacheSlot(pair[0], pair[1], stored, tuple(relax.Var(f"{name}_scales", kind) for name in names))

    def _state_past_shape(self, *values: onnx_ir.Value) -> None:
        """State the shape of the past, which the graph may ask for although there is no such tensor."""
        for value in values:
            self.at.state_shape(value, self._dims(value))

    def _select(self, node: onnx_ir.Node) -> _Selection | None:
        cache = self.caches.get(node)
        if cache is not None:
            parts = find_attention(node)
            assert parts is not None
            plain = attention.plain_parts(parts, cache)
            operands = (plain.query, plain.key, plain.value, plain.mask, plain.slopes, plain.positions)
            return _Selection(operands, lambda at: attention.int8_attention(at, node, parts, cache))
        added = find_added_linear(node)
        if added is not None:
            reads = (added.linear.input, added.residual)
            return _Selection(reads, lambda at: lower_added_linear(at, added))
        linear = find_any_linear(node)
        if linear is not None:
            return _Selection((linear.input, linear.bias), lambda at: lower_linear(at, linear))
        gate = norms.find_swiglu(node)
        if gate is not None:
            return _Selection(gate, lambda at: norms.lower_swiglu(at, *gate, node.outputs[0]))
        return None

    def _lower(self, node: onnx_ir.Node, selection: _Selection | None) -> bool:
        """Lower a node; return False if it has no native kernel and no fallback is allowed."""
        try:
            if selection is not None:
                selection.lower(self.at)
            else:
                self._convert(node)
        except Unsupported as error:
            return self._fall_back(node, str(error), alone=selection is None)
        return True

    def _convert(self, node: onnx_ir.Node) -> None:
        """Lower a node that is not part of a pattern; raise Unsupported if it cannot be lowered."""
        try:
            if node.op_type == "MatMul" and not node.domain:
                lower_product(self.at, node)
            elif (node.domain, node.op_type) in CONVERTERS:
                CONVERTERS[node.domain, node.op_type](self.at, node)
            elif node.op_type in _LINEARS:
                raise Unsupported("a linear without a native kernel")
            else:
                self._import(node, "a small operator")
        except Delegated as reason:
            self._import(node, str(reason))

    def _import(self, node: onnx_ir.Node, reason: str) -> None:
        import_node(self.at, node, self.opset)
        self.imported.append(Missing(str(node.name), node.op_type, reason))

    def _fall_back(self, node: onnx_ir.Node, reason: str, *, alone: bool) -> bool:
        """Record a node as missing and, if the user allows it, lower it with TVM's own importer.

        The importer cannot lower a pattern (not `alone`), so that raises ModelError. Returns whether it was lowered.
        """
        self.missing.append(Missing(str(node.name), node.op_type, reason))
        if not self.allow_fallback:
            return False
        if not alone:
            raise ModelError(f"{self.missing[-1]}; `allow_fallback` cannot help there")
        try:
            import_node(self.at, node, self.opset)
        except Unsupported as error:
            raise ModelError(f"{self.missing[-1]}; TVM's own importer failed too: {error}") from error
        return True

    def _refuse(self) -> None:
        if not self.missing or self.allow_fallback:
            return
        shown = "\n".join(f"  {item}" for item in self.missing[:12])
        more = f"\n  and {len(self.missing) - 12} more" if len(self.missing) > 12 else ""
        raise ModelError(
            f"no native kernel for:\n{shown}{more}\n"
            "Try passopt compile MODEL --passes baichuan2,fold-norm-head (or fuse). `passopt why fuse-attention MODEL` "
            "says what kept it from matching. `allow_fallback` compiles anyway, slowly, and without a cache in place."
        )


def _computed_product(node: onnx_ir.Node) -> Missing | None:
    """Return a MatMul that is neither a linear nor an outer product as missing, or None for any other node.

    It goes by the shapes that the graph knows.
    """
    first = node.inputs[0] if node.op_type == "MatMul" and not node.domain else None
    if first is None or first.shape is None or not len(first.shape) or first.shape[-1] == 1:
        return None
    reason = WEIGHT_IS_COMPUTED if is_computed_weight(node.inputs[1]) else BOTH_COMPUTED
    return Missing(str(node.name), node.op_type, reason)


def _not_in_place(model: onnx_ir.Model) -> list[Missing]:
    """Return the readers of the past that keep caches from being kept in place, with the reasons.

    These are all nodes but suitable fused attentions and Shape. With any of them, no cache is kept in place.
    """
    found = []
    caches = int8_caches(model)
    kept = {item for cache in caches.values() for part in (cache.key, cache.value) for item in (part.past, part.codes)}
    for node, cache in caches.items():
        refusal = attention.in_place_refusal(node)
        if not (cache.key.by_largest and cache.value.by_largest):
            refusal = "rows of its cache are not scaled by their largest magnitude / 127"
        if refusal is not None:
            found.append(Missing(str(node.name), node.op_type, refusal))
    for value in model.graph.inputs:
        if _PAST.match(str(value.name)) is None:
            continue
        for node, index in value.uses():
            if node.outputs[0] in kept or (node.op_type == "Concat" and kept.intersection(node.inputs)):
                continue
            parts = find_attention(node)
            is_past = parts is not None and value in (parts.past_key, parts.past_value)
            refusal = attention.in_place_refusal(node) if is_past else None
            if refusal is not None:
                found.append(Missing(str(node.name), node.op_type, refusal))
            elif not is_past and node.op_type != "Shape":
                reason = f"reads {value.name} (input {index}), which only a fused attention can keep in place"
                found.append(Missing(str(node.name), node.op_type, reason))
    return found


def _is_scales(name: str) -> bool:
    """Return whether an input holds the scales of a past in codes."""
    return name.endswith(SCALES) and _PAST.match(name.removesuffix(SCALES)) is not None


def needed_nodes(
    model: onnx_ir.Model, wanted: Iterable[onnx_ir.Value], selections: dict[onnx_ir.Node, _Selection]
) -> list[onnx_ir.Node]:
    """Return the nodes that the values `wanted` depend on, in graph order.

    The inner nodes of a pattern are among them only if something else reads them.
    """
    found: set[onnx_ir.Node] = set()
    waiting = [value.producer() for value in wanted]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        reads = selections[node].reads if node in selections else tuple(node.inputs)
        waiting += [value.producer() for value in reads if value is not None]
    return [node for node in model.graph if node in found]
