"""Find the types of all values of a model, those in bodies and of sequences included, with ONNX's own inference.

`complete_types` looks at one node of the main graph after the other; this asks ONNX about the whole model, without the
bytes of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import onnx
import onnx_ir

from passopt.ir.graph.completion import complete_types
from passopt.ir.shapes.slices import is_disputed
from passopt.ir.weights.lazy_weight import SMALL_BYTES, LazyWeight

_OPSET_OF_WRONG_SLICE = 10
_OPSET_OF_RIGHT_IF = 11
_INT64 = onnx_ir.TensorType(onnx_ir.DataType.INT64)

#: A value, and the type and shape that were known of it.
Known: TypeAlias = "tuple[onnx_ir.Value, onnx_ir.TypeProtocol | None, onnx_ir.Shape | None]"


def complete_all_types(model: onnx_ir.Model) -> list[Known]:
    """Fill in types and shapes that are unknown, as far as inference finds them; what is stated stays.

    Values inside of functions stay unknown, because each call may give them other types.

    Args:
        model: The model, whose values are changed in place; its text stays the same but for the types.

    Returns:
        What was known of the values that ONNX was asked about, for `forget_types`.
    """
    complete_types(model)
    if all(value.type is not None for value in _values(model)):
        return []
    copy = model.clone()
    for graph in copy.graphs():
        _withhold_weights(graph, copy.graph)
        _withhold_bounds(graph, copy.graph)
    proto = onnx_ir.to_proto(copy)
    try:
        inferred = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return []  # The checker reports such a model; here its values only stay unknown.
    is_guessed = _guesses_shapes(model)
    known: list[Known] = []
    for value, found in zip(_values(model), _values(inferred), strict=True):
        known.append((value, value.type, value.shape))
        found.shape = None if is_guessed else found.shape
        tensor = _constant(value.producer())  # ONNX was asked about a small one in its place
        value.type = value.type or (found.type if tensor is None else onnx_ir.TensorType(tensor.dtype))
        value.shape = value.shape or (found.shape if tensor is None else onnx_ir.Shape(tensor.shape.numpy()))
    return known


def forget_types(known: Iterable[Known]) -> None:
    """Take back what `complete_all_types` filled in, so that a model that is left alone is written as it was read.

    Args:
        known: The list that `complete_all_types` returned.
    """
    for value, kind, shape in known:
        value.type, value.shape = kind, shape


def _guesses_shapes(model: onnx_ir.Model) -> bool:
    """Return whether ONNX may give an If, and what reads it, the shape of one branch: it does so before opset 11."""
    is_old = model.graph.opset_imports.get("", _OPSET_OF_RIGHT_IF) < _OPSET_OF_RIGHT_IF
    return is_old and any(node.op_type == "If" for node in model.graph.all_nodes())


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    """Yield the inputs of all graphs and bodies, and the outputs of all their nodes."""
    for graph in model.graphs():
        yield from graph.inputs if graph is not model.graph else ()
        for node in graph:
            yield from node.outputs


def _withhold_weights(graph: onnx_ir.Graph, main: onnx_ir.Graph) -> None:
    """Let inputs of the main graph stand for large tensors of a graph, since their types are all that matters."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not _is_large(tensor):
            continue
        del graph.initializers[name]
        if not value.is_graph_input():
            main.inputs.append(_stand_in(value, tensor, len(main.inputs)))
    for node in graph:
        tensor = _constant(node)
        if tensor is not None and _is_large(tensor):
            main.inputs.append(_stand_in(node.outputs[0], tensor, len(main.inputs)))
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor(0))


def _withhold_bounds(graph: onnx_ir.Graph, main: onnx_ir.Graph) -> None:
    """Hide from ONNX where a Slice begins of which its inference says something wrong; the lengths are then unknown.

    That is any Slice of opset 10, where an axis that is cut keeps its symbol, and those that runtimes read otherwise.
    """
    is_wrong = main.opset_imports.get("") == _OPSET_OF_WRONG_SLICE
    for node in graph:
        start = node.inputs[1] if node.op_type == "Slice" and not node.domain and len(node.inputs) > 1 else None
        if start is not None and (is_wrong or is_disputed(node)):
            name = f"withheld.{len(main.inputs)}.{start.name}"
            main.inputs.append(onnx_ir.Value(name=name, type=start.type or _INT64, shape=start.shape))
            node.replace_input_with(1, main.inputs[-1])


def _constant(node: onnx_ir.Node | None) -> onnx_ir.TensorProtocol | None:
    """Return the tensor of a Constant; None for another node, or a constant of another kind."""
    attribute = node.attributes.get("value") if node is not None and node.op_type == "Constant" else None
    if attribute is None or attribute.type != onnx_ir.AttributeType.TENSOR or attribute.is_ref():
        return None
    return attribute.as_tensor()


def _is_large(tensor: onnx_ir.TensorProtocol) -> bool:
    return isinstance(tensor, (LazyWeight, onnx_ir.ExternalTensor)) or tensor.nbytes > SMALL_BYTES


def _stand_in(value: onnx_ir.Value, tensor: onnx_ir.TensorProtocol, number: int) -> onnx_ir.Value:
    """Return a new value of the type and shape of `tensor`, which all readers of `value` read instead."""
    shape = onnx_ir.Shape(tensor.shape.numpy())
    new = onnx_ir.Value(name=f"withheld.{number}.{value.name}", type=onnx_ir.TensorType(tensor.dtype), shape=shape)
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    return new
