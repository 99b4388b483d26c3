"""Define the pass `cast`, which converts a model to another floating dtype but keeps fp32 where a narrow one does harm.

`cast_islands` decides the dtype of every value; this module changes the graph accordingly.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir

from passopt.ir.dtypes import DTYPES, MODEL_FLOATS, OPSET_OF_HALF_SCALES
from passopt.ir.errors import PassError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.provenance import called
from passopt.ir.serialization.inference import complete_all_types, forget_types
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.lazy_weight import LazyWeight, constant_tensor, is_checkpoint_weight
from passopt.passes.framework.accuracy import QualityBar, lossy
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.precision.cast_borders import Borders, is_float
from passopt.passes.precision.cast_islands import STATED, Islands, finite_limits, is_dtype_cast, is_leaf, uncast

DataType = onnx_ir.DataType

#: The opset from which on the operator Cast takes a dtype by its number, or takes it at all.
_OLDEST_CAST = {DataType.FLOAT: 6, DataType.FLOAT16: 6, DataType.BFLOAT16: 13}
_NUMBERS = frozenset(dtype.value for dtype in MODEL_FLOATS)


@dataclasses.dataclass(frozen=True)
class CastModel(Pass):
    """Halve a model by storing weights, caches and logits in 16 bits, with fp32 where sums and positions need it.

    Before: ``n = Mul(w, Mul(x, Reciprocal(Sqrt(…)))); y = MatMul(n, w2)``, all float
    After:  ``n = Mul(w, Cast(Mul(Cast(x), Reciprocal(Sqrt(…))))); y = MatMul(n, w2)``, float16 but for the norm
    Norms, softmax, rotary embedding and whatever is computed from positions and masks alone (ALiBi, angles) stay in
    fp32. Weights become lazy casts. Casts between floating dtypes that the model has already are removed, and placed
    where they are needed. An operator that ONNX does not define for the dtype, in the model's opset, stays in fp32.
    Bodies of If, Loop and Scan, calls of local functions, operators of other domains, sequences and optional values
    keep the dtypes that they have, with casts around them; a note counts them. Activations beyond the range of the
    dtype, which is 65504 for fp16, become infinite. With `dtype=fp32` the pass widens a model of 16 bits.
    """

    name = "cast"
    #: A trained model of 135M parameters: KL 0.00001 in fp16, 0.00009 in bf16. The bar is half of that of int8 weights,
    #: for models with larger activations; weights are compared one by one besides.
    accuracy = lossy(2e-2, bar=QualityBar(kl=0.005, kl99=0.03, top1=0.96))
    changes_interface = True

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Cast the model in place; raise PassError if the model's opset has not what that takes."""
        known = complete_all_types(model)
        target = DTYPES[self.dtype]
        editor = Editor(model, self.name)
        self._check(editor, target)
        moved = _constants_to_initializers(editor)
        caster = _Caster(editor, target)
        caster.run()
        changed = moved + caster.changed
        if not changed:
            forget_types(known)
        return PassResult(modified=changed > 0, matches=changed, notes=caster.notes())

    def _check(self, editor: Editor, target: DataType) -> None:
        oldest = _OLDEST_CAST[target]
        values = [*editor.graph.inputs, *(value for node in editor.graph for value in node.outputs)]
        if editor.opset < oldest and any(map(is_float, values)):
            raise PassError(
                f"{self.name}: Cast takes {target.name} from opset {oldest} on, this model has {editor.opset}. "
                f"Run legalize first."
            )
        for node in editor.graph:
            too_old = target != DataType.FLOAT and editor.opset < OPSET_OF_HALF_SCALES
            if too_old and node.op_type == "DequantizeLinear" and not node.domain:
                raise PassError(
                    f"{self.name}: {called(node)} takes 16-bit scales from opset "
                    f"{OPSET_OF_HALF_SCALES} on, this model has {editor.opset}. Run legalize first."
                )


class _Caster:
    """Change the dtypes of one graph as `Islands` decides; `changed` counts the edits."""

    def __init__(self, editor: Editor, target: DataType) -> None:
        self.editor = editor
        self.target = target
        self.changed = 0
        self.borders = Borders(editor.model)
        self.islands = Islands(editor.graph, target, editor.opset, self.borders)
        self._casts: dict[tuple[onnx_ir.Value, DataType], onnx_ir.Value] = {}
        self._clamped: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def notes(self) -> list[str]:
        """Return how many casts were inserted or kept, and what keeps its dtypes, for the user."""
        inserted = len({id(value) for value in self._casts.values()})
        casts = f"{inserted} casts between fp32 and {self.target.name.lower()}" if inserted else ""
        return [note for note in (casts, self.borders.note()) if note]

    def run(self) -> None:
        """Set the dtype of every value, then connect every input to its source in the dtype that it needs."""
        nodes = list(self.editor.graph)
        wanted = {
            (node, index): dtype
            for node in nodes
            if not is_dtype_cast(node)
            for index, value in enumerate(node.inputs)
            if value is not None and is_float(value) and (dtype := self.islands.wanted(node, index)) is not None
        }
        wanted.update(self.borders.read)
        dtypes = {value: self.islands.dtype(value) for node in nodes for value in node.outputs if is_float(value)}
        leaves = self._leaves(wanted)
        for node in nodes:
            if not is_dtype_cast(node) and node not in self.borders.nodes and node.op_type != "Constant":
                self._retype(node, dtypes)
        for value in self.editor.graph.inputs:
            if is_float(value):
                self._set(value, self.target)
                if value.const_value is not None:
                    value.const_value = _cast_tensor(value.const_value, self.target, value.name)
        constants = {leaf: self._constants(leaf, needs) for leaf, needs in leaves.items()}
        self._outputs()
        for (node, index), dtype in wanted.items():
            own = (node, index) not in self.borders.read
            masks = own and not node.domain and node.op_type == "Attention" and index == 3
            self._read(node, index, self._operand(_input(node, index), dtype, constants, clamped=masks))
        for graph, index, dtype in self.borders.results:
            graph.outputs[index] = self._operand(graph.outputs[index], dtype, constants, clamped=False)
        self._clean(nodes)

    def _leaves(self, wanted: Mapping[tuple[onnx_ir.Node, int], DataType]) -> dict[onnx_ir.Value, list[DataType]]:
        """Return in which dtypes each weight and constant is needed, the one that it is to have itself first."""
        leaves: dict[onnx_ir.Value, dict[DataType, None]] = collections.defaultdict(dict)
        for value in self.editor.graph.outputs:
            if is_float(value) and value.is_initializer() and is_leaf(value):
                leaves[value][self.target] = None
        needs = [(_input(node, index), dtype) for (node, index), dtype in wanted.items()]
        needs += [(graph.outputs[index], dtype) for graph, index, dtype in self.borders.results]
        for value, dtype in needs:
            source = uncast(value)
            if is_leaf(source):
                leaves[source][dtype] = None
        return {leaf: list(dtypes) for leaf, dtypes in leaves.items()}

    def _set(self, value: onnx_ir.Value, dtype: DataType) -> None:
        if value.dtype != dtype:
            value.type = onnx_ir.TensorType(dtype)
            self.changed += 1

    def _retype(self, node: onnx_ir.Node, dtypes: dict[onnx_ir.Value, DataType]) -> None:
        """Set the dtypes of a node's outputs, and the attributes that state these dtypes."""
        for value in node.outputs:
            if value in dtypes:
                self._set(value, dtypes[value])
        dtype = next((dtypes[value] for value in node.outputs if value in dtypes), None)
        if dtype is None or node.domain:
            return
        if node.op_type == "CastLike":  # It casts integers, and its second input may get another dtype than its output.
            node.op_type = "Cast"
            node.resize_inputs(1)
            self._state(node, "to", dtype)
        for name in STATED:
            if name in node.attributes and node.attributes[name].value in _NUMBERS:
                self._state(node, name, dtype)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            tensor = _cast_tensor(node.attributes["value"].as_tensor(), dtype, None)
            node.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
        if node.op_type == "Attention" and dtype != DataType.FLOAT:
            self._state(node, "softmax_precision", DataType.FLOAT)

    def _state(self, node: onnx_ir.Node, name: str, dtype: DataType) -> None:
        """Set an attribute to a dtype, and count it if that changed it."""
        if name not in node.attributes or node.attributes[name].value != dtype.value:
            node.attributes[name] = onnx_ir.AttrInt64(name, dtype.value)
            self.changed += 1

    def _constants(self, leaf: onnx_ir.Value, needs: list[DataType]) -> dict[DataType, onnx_ir.Value]:
        """Return a constant in each dtype that its readers need.

        The constant itself is cast to one of them, and small constants get a copy in every other one. A weight of the
        checkpoint is stored only once: its other readers go through a Cast.
        """
        assert leaf.const_value is not None
        kept = self.target if is_checkpoint_weight(leaf) or leaf.is_graph_output() else leaf.dtype
        first = kept if kept is not None and kept in needs else needs[0]
        original = leaf.const_value
        if leaf.dtype != first:
            leaf.const_value = _cast_tensor(original, first, leaf.name)
            self._set(leaf, first)
        found = {first: leaf}
        for dtype in needs:
            if dtype != first and not is_checkpoint_weight(leaf):
                builder = self.editor.builder(leaf.name or "constant")
                array = _cast_tensor(original, dtype, None).numpy()
                found[dtype] = builder.initializer(f"{leaf.name}.{_suffix(dtype)}", array)
                self.editor.graph.register_initializer(found[dtype])
                self.changed += 1
        return found

    def _outputs(self) -> None:
        """Let the floating outputs of the graph have the model's dtype, under the names that they had."""
        graph = self.editor.graph
        for index, value in enumerate(list(graph.outputs)):
            if not is_float(value):
                continue
            source, node = uncast(value), value.producer()
            if node is None:
                continue  # It is a graph input or an initializer, which has its dtype already.
            if node.op_type == "Constant" and not node.domain and node not in self.borders.nodes:
                self._constant_output(value, node)
            elif is_dtype_cast(node):
                self._cast_output(index, value, source, node)
            elif self.islands.dtype(value) != self.target:
                builder = self.editor.builder(value.name or "value")
                narrow = builder.Cast(value, to=self.target.value)
                self.editor.follow(value, narrow, builder.built, _suffix(DataType.FLOAT), outputs_only=True)
                self._casts[(value, self.target)] = narrow
                self.changed += 1

    def _constant_output(self, value: onnx_ir.Value, node: onnx_ir.Node) -> None:
        """Store the constant of a node that gives a graph output in the dtype of the model."""
        tensor = constant_tensor(value)
        assert tensor is not None, f"{node.name}: a Constant without a tensor keeps its dtype"
        if tensor.dtype != self.target:
            node.attributes.clear()
            node.attributes["value"] = onnx_ir.AttrTensor("value", _cast_tensor(tensor, self.target, None))
        self._set(value, self.target)

    def _cast_output(self, index: int, value: onnx_ir.Value, source: onnx_ir.Value, node: onnx_ir.Node) -> None:
        """Convert a graph output that is made by a cast.

        If its source has another dtype than the model, or is a graph input, output or initializer itself, the cast
        stays. Otherwise the source becomes the graph output and takes its name.
        """
        fixed = source.producer() is None or source.is_graph_output()
        if fixed or self.islands.dtype(source) != self.target:
            self._read(node, 0, source)
            node.resize_inputs(1)
            node.op_type = "Cast"
            self._state(node, "to", self.target)
            self._set(value, self.target)
            self._casts[(source, self.target)] = value
            return
        self.editor.graph.outputs[index] = source
        source.name, value.name = value.name, source.name
        source.shape = value.shape or source.shape
        self.changed += 1

    def _operand(
        self,
        given: onnx_ir.Value,
        dtype: DataType,
        constants: Mapping[onnx_ir.Value, Mapping[DataType, onnx_ir.Value]],
        *,
        clamped: bool,
    ) -> onnx_ir.Value:
        """Return a value in `dtype`: a constant of that dtype, what it is a cast of, or a cast of that."""
        source = uncast(given)
        operand = constants.get(source, {}).get(dtype)
        if operand is not None:
            return operand
        held = source.dtype if source in constants else self.islands.dtype(source)
        return source if held == dtype else self._cast(source, given, dtype, clamped=clamped)

    def _read(self, node: onnx_ir.Node, index: int, operand: onnx_ir.Value) -> None:
        if node.inputs[index] is not operand:
            node.replace_input_with(index, operand)
            self.changed += 1

    def _cast(self, source: onnx_ir.Value, given: onnx_ir.Value, dtype: DataType, *, clamped: bool) -> onnx_ir.Value:
        """Return `source` in `dtype`, through a cast that exists already or a new one right after its producer.

        If `clamped`, `source` is a mask of Attention, whose numbers are first limited to what float16 can hold.
        """
        producer = given.producer()
        if given.dtype == dtype and is_dtype_cast(producer) and producer is not None and producer.inputs[0] is source:
            return self._casts.setdefault((source, dtype), given)
        if clamped and dtype == DataType.FLOAT16:
            source = self._bounded(source)
        if (source, dtype) not in self._casts:
            builder = self.editor.builder(source.name or "value")
            self._casts[(source, dtype)] = builder.Cast(source, to=dtype.value)
            self._insert_after(source, builder)
            self.changed += 1
        return self._casts[(source, dtype)]

    def _bounded(self, mask: onnx_ir.Value) -> onnx_ir.Value:
        """Return an fp32 mask whose numbers are at least half of the lowest fp16 number.

        At the lowest fp16 number itself, Attention would see nothing. An infinity stays one: what it hides is hidden
        even where nothing else is seen.
        """
        if mask not in self._clamped:
            builder = self.editor.builder(mask.name or "mask")
            assert mask.dtype is not None, f"{mask.name} is a mask of unknown dtype"
            lowest = np.asarray(-finite_limits(DataType.FLOAT16)[1] / 2, mask.dtype.numpy())
            self._clamped[mask] = builder.Where(builder.IsInf(mask), mask, builder.Max(mask, lowest))
            self._insert_after(mask, builder)
        return self._clamped[mask]

    def _insert_after(self, source: onnx_ir.Value, builder: Any) -> None:
        producer = source.producer()
        if producer is not None:
            self.editor.insert(builder.built, None, [producer], after=producer)
        else:
            self.editor.insert(builder.built, self.editor.graph[0])

    def _clean(self, nodes: list[onnx_ir.Node]) -> None:
        """Remove the casts between floating dtypes that nothing reads any more."""
        for node in reversed(nodes):
            if node.graph is None or not is_dtype_cast(node):
                continue
            if self.editor.remove_dead([node]):
                self.changed += 1


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _suffix(dtype: DataType) -> str:
    return next(name for name, item in DTYPES.items() if item == dtype)


def _constants_to_initializers(editor: Editor) -> int:
    """Turn floating Constant nodes into initializers, whose dtype can then be chosen; return how many there were."""
    moved = 0
    for node in list(editor.graph):
        if node.op_type != "Constant" or node.domain or not is_float(node.outputs[0]):
            continue
        old = node.outputs[0]
        tensor = constant_tensor(old)
        if tensor is None or (old.is_graph_output() and not old.uses()):
            continue
        name = editor.unique(f"{old.name}.constant") if old.is_graph_output() else old.name or "constant"
        value = onnx_ir.Value(shape=onnx_ir.Shape(tensor.shape.numpy()), type=onnx_ir.TensorType(tensor.dtype))
        if isinstance(tensor, LazyWeight):
            value.const_value = LazyWeight(tensor.expression, name)
        else:
            value.const_value = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        for use in old.uses():
            use.node.replace_input_with(use.idx, value)
        editor.remove_dead([node])
        value.name = name
        if value.uses():
            editor.graph.register_initializer(value)
        moved += 1
    return moved


def _cast_tensor(tensor: onnx_ir.TensorProtocol, dtype: DataType, name: str | None) -> onnx_ir.TensorProtocol:
    """Return a tensor in another dtype; a weight stays a lazy expression.

    A finite number of a small constant that is too large or too small for `dtype` becomes its largest or its smallest
    normal number of the same sign, never infinity or zero.
    """
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, LazyWeight):
        return LazyWeight(_narrowed(tensor.expression, dtype), name)
    array = np.asarray(tensor.numpy(), np.float32)
    smallest, largest = finite_limits(dtype)
    bounded = np.where(np.isinf(array), array, np.clip(array, -largest, largest))
    vanishing = (array != 0) & (np.abs(array) < smallest)
    bounded = np.where(vanishing, np.copysign(np.maximum(np.abs(array), smallest), array), bounded)
    return onnx_ir.Tensor(bounded.astype(dtype.numpy()), dtype=dtype, name=name)


def _narrowed(expression: ex.Expression, dtype: DataType) -> ex.Expression:
    """Cast an expression, or return its operand if the cast would only undo a widening to fp32."""
    if isinstance(expression, ex.Cast) and expression.dtype == DataType.FLOAT and expression.operand.dtype == dtype:
        return expression.operand
    return expression.cast(dtype)
