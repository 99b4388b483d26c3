"""Evaluate operators that depend on small constants only (the fold-constants pass)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.attributes import attributes_key
from passopt.ir.graph.builder import infer_types
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.operators import operators
from passopt.ir.graph.provenance import absorb_provenance
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.shapes.elements import DimOf, elements, known_numbers, single_length
from passopt.ir.weights.lazy_weight import constant_tensor, is_checkpoint_weight, small_constant
from passopt.passes.cleanup.evaluation import NotEvaluated, cast_target, evaluate, require_evaluable
from passopt.passes.framework.base import Pass, Refusal
from passopt.passes.framework.records import PassResult

#: Operators whose results may be much larger than what they read.
_GROWING = operators("ConstantOfShape Expand OneHot Range Tile")


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate operators whose inputs are constants, so that patterns see numbers instead of the exporter's arithmetic.

    Before: ``y = Reshape(x, Concat(Reshape(Cast(two), [-1]), [3]))``
    After:  ``y = Reshape(x, [2, 3])``
    A weight of the checkpoint is never read, and a DequantizeLinear is never folded. Equal constants become one. An
    operator is evaluated only where its meaning at the model's opset is implemented, and runtimes compute the same.
    Operators without effect (Identity, a Cast to the same dtype) are removed, and the Shape of known dimensions becomes
    a constant.
    `limit`: bytes of the largest result that is stored instead of computed.
    """

    name = "fold-constants"

    limit: int = 1 << 20

    def run(self, model: onnx_ir.Model) -> PassResult:
        editor = Editor(model, self.name)
        result = PassResult()
        while self._sweep(editor, result):
            pass  # a folded bound may reveal the length of an axis, and that length may make more nodes constant
        result.matches += _unify_sizes(editor)
        merged = _merge_equal_constants(editor) + _merge_equal_sizes(editor) + _hoist_sizes(editor)
        result.modified = result.matches > 0 or merged > 0
        return result

    def _sweep(self, editor: Editor, result: PassResult) -> bool:
        """Visit every node once, and return True if something was folded."""
        complete_types(editor.model)  # inference may find lengths that the exporter did not state
        before = result.matches
        for node in list(editor.graph):
            if node.graph is None:
                continue
            result.tries += 1
            if self._bypass(editor, node) or self._fold(editor, node):
                result.matches += 1
        return result.matches > before

    def explain(self, model: onnx_ir.Model) -> Iterable[Refusal]:
        """Yield the operators that read nothing but constants and yet stay, each with the reason."""
        copy = model.clone()
        self.run(copy)
        for node in copy.graph:
            values = [value for value in node.inputs if value is not None]
            if values and all(constant_tensor(value) is not None for value in values):
                yield Refusal(node, self._why_it_stays(node, values, copy.graph.opset_imports.get("", 0)))

    def _why_it_stays(self, node: onnx_ir.Node, values: Sequence[onnx_ir.Value], opset: int) -> str:
        if any(is_checkpoint_weight(value) for value in values):
            return "it reads a weight of the checkpoint, which no pass does"
        try:
            require_evaluable(node, opset)
        except NotEvaluated as reason:
            return str(reason)
        if node.outputs[0].is_graph_output():
            return "its result is an output of the graph"
        try:
            self._value_of(node, opset)
        except NotEvaluated as reason:
            return str(reason)
        return f"its result is larger than {self.limit} bytes; fold-constants{{limit=…}} allows more"

    def _bypass(self, editor: Editor, node: onnx_ir.Node) -> bool:
        """Let the users of a node without effect read its input; return True if that was done."""
        source, target = node.inputs[0] if node.inputs else None, node.outputs[0]
        if source is None or node.domain or not _has_no_effect(node, source) or target.is_graph_output():
            return False
        if source.shape is None:
            source.shape = target.shape
        target.replace_all_uses_with(source)
        editor.remove_dead([node])
        return True

    def _fold(self, editor: Editor, node: onnx_ir.Node) -> bool:
        """Replace a node by a constant if it can be evaluated; return True if that was done."""
        target = node.outputs[0]
        if target.is_graph_output():
            return False
        try:
            array = self._value_of(node, editor.opset)
        except NotEvaluated:
            return False
        if array.nbytes > self.limit:
            return False
        if target.dtype is not None:
            array = array.astype(target.dtype.numpy(), copy=False)
        name = target.name
        tensor = onnx_ir.tensor(array, name=name)
        constant = onnx_ir.Value(shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype))
        constant.const_value = tensor
        target.replace_all_uses_with(constant)
        editor.remove_dead([node])
        constant.name = name  # the name is free now; reusing it keeps the printed text as it was
        if constant.uses():
            editor.graph.register_initializer(constant)
        return True

    def _value_of(self, node: onnx_ir.Node, opset: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the constant that a node computes; raise NotEvaluated if it is unknown, or not to be evaluated."""
        if node.op_type == "Constant" and not node.domain:
            return self._read(node.outputs[0])
        if node.op_type in _SIZE_ARITHMETIC and not node.domain:
            sizes = _known_dimensions(node) if node.op_type == "Shape" else _known_sizes(node.outputs[0])
            if sizes is not None:
                return sizes
        require_evaluable(node, opset)
        # CastLike needs only the dtype of its second input, which may be computed.
        inputs = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        arrays = {value.name or "": self._read(value) for value in inputs if value is not None}
        if not arrays:
            raise NotEvaluated("it has no inputs")
        self._require_small_result(node, opset, [arrays[value.name or ""] for value in inputs if value is not None])
        return evaluate(_as_cast(node) if node.op_type == "CastLike" else node, opset, arrays)

    def _read(self, value: onnx_ir.Value) -> np.ndarray[Any, np.dtype[Any]]:
        """Return a small constant that is no weight of the checkpoint, or raise NotEvaluated."""
        tensor = None if is_checkpoint_weight(value) else constant_tensor(value)
        if tensor is None:
            raise NotEvaluated(f"{value.name} is not constant")
        if tensor.dtype == onnx_ir.DataType.STRING:
            raise NotEvaluated("it reads texts, which are never evaluated")
        if tensor.nbytes > self.limit:
            raise NotEvaluated(f"{value.name} is larger than {self.limit} bytes; fold-constants{{limit=…}} allows more")
        return tensor.numpy()

    def _require_small_result(
        self, node: onnx_ir.Node, opset: int, arrays: list[np.ndarray[Any, np.dtype[Any]]]
    ) -> None:
        """Raise NotEvaluated unless the result is known to have at most `limit` bytes.

        This is checked before evaluating, because an Expand of one number may be gigabytes.
        """
        target = node.outputs[0]
        if target.shape is None or target.dtype is None:
            with contextlib.suppress(VerifyError):
                infer_types(node, opset)
        if target.dtype is None:
            raise NotEvaluated("the dtype of its result is unknown")
        if target.dtype == onnx_ir.DataType.STRING:
            raise NotEvaluated("its results are texts, which are never evaluated")
        dims = target.shape.dims if target.shape is not None else None
        known = [dim for dim in dims if isinstance(dim, int)] if dims is not None else []
        if node.op_type == "Range" and not node.domain:
            known = [_length_of_range(*arrays)]  # inference does not read numbers that are no integers
        elif node.op_type in _GROWING and (dims is None or len(known) < len(dims)):
            raise NotEvaluated("the size of its result is unknown")
        if math.prod(known) * target.dtype.itemsize > self.limit:
            raise NotEvaluated(f"its result is larger than {self.limit} bytes; fold-constants{{limit=…}} allows more")


def _length_of_range(*bounds: np.ndarray[Any, np.dtype[Any]]) -> int:
    """Return how many numbers a Range gives of its start, limit and step."""
    if len(bounds) != 3 or not all(bound.size == 1 and np.isfinite(bound).all() for bound in bounds):
        raise NotEvaluated("its bounds are not three finite numbers")
    start, limit, step = (bound.item() for bound in bounds)
    if step == 0:
        raise NotEvaluated("its step is 0")
    length: int = max(math.ceil((limit - start) / step), 0)
    return length


def _as_cast(node: onnx_ir.Node) -> onnx_ir.Node:
    """Return a Cast that does what a CastLike does; it stands in no graph and uses no value of one."""
    target, source = cast_target(node), node.inputs[0]
    if target is None or source is None:
        raise NotEvaluated("the dtype of its second input is unknown")
    attributes = [*node.attributes.values(), onnx_ir.AttrInt64("to", target.value)]
    cast = onnx_ir.Node("", "Cast", [onnx_ir.Value(name=source.name)], attributes)
    cast.outputs[0].name = node.outputs[0].name
    return cast


def _has_no_effect(node: onnx_ir.Node, source: onnx_ir.Value) -> bool:
    """Return True for an Identity, and for a cast to the dtype that `source` has already."""
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return source.dtype is not None and node.attributes["to"].as_int() == source.dtype.value
    if node.op_type == "CastLike":
        like = node.inputs[1]
        return source.dtype is not None and like is not None and like.dtype == source.dtype
    return False


def _known_dimensions(node: onnx_ir.Node) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return the dimensions that a Shape node gives; None unless all of them are known numbers."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(source.shape)
    dims = source.shape.dims[start:end]
    return np.array(dims, np.int64) if all(isinstance(dim, int) for dim in dims) else None


def _known_sizes(value: onnx_ir.Value) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return the lengths in an int64 scalar or vector if the shapes state them, else None.

    An example is the head_dim of Gather(Shape(q), -1).
    """
    if value.dtype != onnx_ir.DataType.INT64 or value.shape is None or len(value.shape) > 1:
        return None
    numbers = known_numbers(value)
    if numbers is None:
        return None
    return np.array(numbers, np.int64).reshape([len(numbers)] if len(value.shape) else [])


def _merge_equal_constants(editor: Editor) -> int:
    """Merge equal small constants into one initializer, and return how many were merged into others.

    Exporters write the same piece of a shape once per layer.
    """
    first: dict[tuple[Any, ...], onnx_ir.Value] = {}
    merged = 0
    for value in list(editor.graph.initializers.values()):
        array = small_constant(value)
        if array is None or value.is_graph_output() or value.is_graph_input():
            continue
        key = (value.dtype, array.shape, array.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value and value.uses():
            value.replace_all_uses_with(kept)
            editor.remove_unused_initializer(value)
            merged += 1
    return merged


#: Integer arithmetic on lengths, which exporters repeat for every layer.
_SIZE_ARITHMETIC = frozenset(
    {"Shape", "Squeeze", "Unsqueeze", "Reshape", "Concat", "Cast", "Gather", "Slice", "Add", "Sub"}
)


def _unify_sizes(editor: Editor) -> int:
    """Read a length that several graph inputs share from the first of these; return how many nodes changed.

    An exporter reads it from any of them, and not always from the same one. An input with a default value is none of
    them: if it is not fed, its default has a length of its own. Nor is a sequence, whose elements have lengths.
    """
    places: dict[str, tuple[onnx_ir.Value, int]] = {}
    if editor.opset < 15:
        return 0  # before opset 15, Shape cannot give a single axis
    for value in editor.graph.inputs:
        if value.is_initializer() or not isinstance(value.type, onnx_ir.TensorType):
            continue
        for axis, dim in enumerate(dimensions(value) or []):
            if isinstance(dim, str):
                places.setdefault(dim, (value, axis))
    moved = 0
    for node in list(editor.graph):
        found = _single_length(node)
        place = places.get(found[1]) if found is not None else None
        if found is None or place is None or (node.op_type == "Shape" and place == (node.inputs[0], found[0])):
            continue
        _read_from(editor, node, *place)
        moved += 1
    return moved


def _single_length(node: onnx_ir.Node) -> tuple[int, str] | None:
    """Return (axis, symbol) if the node gives a single length of a value, else None.

    Such a node is a Shape of one axis, a Gather of one element of a Shape, or a Div that gives a fraction of a length.
    The axis is -1 if the node does not give the length of an axis as it is.
    """
    target = node.outputs[0]
    if node.domain or node.op_type not in {"Shape", "Gather", "Div"} or target.is_graph_output():
        return None
    if target.dtype != onnx_ir.DataType.INT64 or (target.shape is not None and len(target.shape) > 1):
        return None
    found = elements(target) or [None]
    length = single_length(target) if len(found) == 1 else None
    axis = found[0].axis if isinstance(found[0], DimOf) else -1
    return (axis, length) if isinstance(length, str) else None


def _read_from(editor: Editor, node: onnx_ir.Node, value: onnx_ir.Value, axis: int) -> None:
    """Make a node give the length of an axis of the graph input `value` instead.

    That length depends on nothing that is computed, and equal lengths become one.
    """
    if node.op_type == "Shape":
        node.replace_input_with(0, value)
        node.attributes["start"] = onnx_ir.AttrInt64("start", axis)
        node.attributes["end"] = onnx_ir.AttrInt64("end", axis + 1)
        return
    builder = editor.builder(node.outputs[0].name or "length")
    length = builder.Shape(value, start=axis, end=axis + 1)
    if node.outputs[0].shape is not None and not len(node.outputs[0].shape):
        length = builder.Squeeze(length)
    editor.replace({node.outputs[0]: length}, builder.built, [node])


def _merge_equal_sizes(editor: Editor) -> int:
    """Merge nodes that compute the same length by the same arithmetic; return how many went."""
    first: dict[tuple[Any, ...], onnx_ir.Node] = {}
    merged = 0
    for node in list(editor.graph):
        if node.op_type not in _SIZE_ARITHMETIC or node.domain or not _is_size(node.outputs[0]):
            continue
        key = (node.op_type, attributes_key(node), tuple(id(value) for value in node.inputs))
        kept = first.setdefault(key, node)
        if kept is not node:
            absorb_provenance(kept, node, editor.author)
            node.outputs[0].replace_all_uses_with(kept.outputs[0])
            editor.remove_dead([node])
            merged += 1
    return merged


def _hoist_sizes(editor: Editor) -> int:
    """Move the arithmetic on lengths to the start of the graph, and return how many nodes are there.

    Otherwise shared lengths would stand in the first layer and make it unlike the others. Returns 0 if nothing moved.
    """
    hoisted: list[onnx_ir.Node] = []
    known: set[int] = set()
    for node in editor.graph:
        if node.op_type not in _SIZE_ARITHMETIC or node.domain or not _is_size(node.outputs[0]):
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        if all(producer is None or id(producer) in known for producer in producers):
            known.add(id(node))
            hoisted.append(node)
    nodes = list(editor.graph)
    if nodes[: len(hoisted)] == hoisted:
        return 0
    for node in hoisted:
        editor.graph.remove(node)
    rest = next(node for node in nodes if id(node) not in known)
    editor.graph.insert_before(rest, hoisted)
    return len(hoisted)


def _is_size(value: onnx_ir.Value) -> bool:
    """Return True for what may be a length: int64 or of unknown dtype, at most one axis, no graph output."""
    known_rank = value.shape is None or len(value.shape) <= 1
    return value.dtype in {onnx_ir.DataType.INT64, None} and known_rank and not value.is_graph_output()
