"""Fill in the types and shapes that a model does not state, with ONNX's inference and what targets of reshapes say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.builder import MICROSOFT, infer_types
from passopt.ir.graph.functions import DOMAIN
from passopt.ir.graph.run_context import RunContext
from passopt.ir.shapes.dimensions import Dimension, dimensions, factors, is_zero_with, merged_shapes, remaining
from passopt.ir.shapes.elements import single_length, target_lengths
from passopt.ir.weights.lazy_weight import small_constant

#: How many nodes are looked at to find that a tensor was empty before.
_FARTHEST = 16


def complete_types(model: onnx_ir.Model) -> None:
    """Fill in dtypes and shapes that the model does not state, and never change those that it states.

    Graph outputs are left alone, because their types are part of the text; `complete_outputs` fills them in when a
    model is read.
    """
    _complete(model, lambda value: not value.is_graph_output())


def complete_outputs(model: onnx_ir.Model) -> None:
    """Fill in the dtypes and shapes of graph outputs; whoever reads a model calls this, so that passes find them."""
    if not all(_is_complete(value) for value in model.graph.outputs):
        _complete(model, lambda value: True)


def _complete(model: onnx_ir.Model, wanted: Callable[[onnx_ir.Value], bool]) -> None:
    for node in model.graph:
        complete_node(node, model, wanted)


def complete_node(
    node: onnx_ir.Node, model: onnx_ir.Model, wanted: Callable[[onnx_ir.Value], bool] = lambda value: True
) -> None:
    """Fill in dtypes and shapes of those outputs of a node that are `wanted`, without changing what they state."""
    if node.domain not in {"", MICROSOFT, DOMAIN}:
        return
    if all(_is_complete(value) or not wanted(value) for value in node.outputs):
        return
    stated = [(value.type, value.shape) for value in node.outputs]
    try:
        infer_types(node, model.graph.opset_imports.get("", 0), RunContext.of(model).types)
    except VerifyError:
        return  # The checker reports this error; here the node only stays without a shape.
    for value, (kind, shape) in zip(node.outputs, stated, strict=True):
        value.type = kind or (value.type if wanted(value) else None)
        value.shape = merged_shapes(shape, value.shape) if wanted(value) else shape
    if wanted(node.outputs[0]) and node.outputs[0].type is not None:  # files hold no shape without a dtype
        _complete_target(node)


def _is_complete(value: onnx_ir.Value) -> bool:
    if value.type is None or value.shape is None:
        return False
    return all(isinstance(dim, int) or dim.value is not None for dim in value.shape.dims)


def _complete_target(node: onnx_ir.Node) -> None:
    """Set the output shape of a Reshape, Expand, Slice or Range from what it reads, where inference gave up on it."""
    if node.op_type == "Slice":
        _complete_slice(node)
        return
    if node.op_type == "Range":
        _complete_range(node)
        return
    if node.op_type not in {"Reshape", "Expand"} or _is_complete(node.outputs[0]):
        return
    target, source = target_lengths(node.inputs[1]), node.inputs[0]
    if target is None or source is None:
        return
    before, output = dimensions(source), node.outputs[0]
    if node.op_type == "Reshape":
        keeps_zero = "allowzero" in node.attributes and bool(node.attributes["allowzero"].as_int())
        empty = {dim for dim in target if isinstance(dim, str) and _is_empty_with(dim, source)}
        dims = [
            dim if keeps_zero and dim == 0 else _reshaped(target, before, axis, is_sure=keeps_zero or dim in empty)
            for axis, dim in enumerate(target)
        ]
        if target.count(-1) == 1:
            dims[target.index(-1)] = remaining(before, dims)
    else:
        if before is None or len(before) > len(target):
            return
        aligned = [1] * (len(target) - len(before)) + before
        dims = [_expanded(dim, other) for dim, other in zip(target, aligned, strict=True)]
    output.shape = merged_shapes(output.shape, onnx_ir.Shape(dims)) if output.shape is not None else onnx_ir.Shape(dims)


def _complete_range(node: onnx_ir.Node) -> None:
    """Set the length of a Range from 0 on in steps of 1, which is its limit, if that is a length itself."""
    steps = [small_constant(node.inputs[index]) for index in (0, 2)]
    length = single_length(node.inputs[1])
    counts = [array is not None and array.size == 1 and array.item() == wanted for array, wanted in zip(steps, (0, 1))]
    if all(counts) and isinstance(length, str) and not _is_complete(node.outputs[0]):
        node.outputs[0].shape = onnx_ir.Shape([length])


def _reshaped(
    target: Sequence[Dimension], before: Sequence[Dimension] | None, axis: int, *, is_sure: bool
) -> Dimension:
    """Return the length of an axis after Reshape to `target`, where a 0 means the length of that axis before.

    A symbol may be 0 at run time, and then means another length, unless `is_sure`. It is believed only if the tensor is
    empty then, or has not as many elements as the target would have: a graph that goes on computes with an empty
    tensor or, as is usual, ends in an error.
    """
    length = target[axis]
    if length == 0:
        return before[axis] if before is not None and axis < len(before) else None
    if length is None or isinstance(length, int):
        return length if isinstance(length, int) and length > 0 else None
    if is_sure or (before is not None and _vanishes(length, before, target, axis)):
        return length
    return None


def _vanishes(length: str, before: Sequence[Dimension], target: Sequence[Dimension], axis: int) -> bool:
    """Return whether a tensor is empty where a length of the target is 0, or cannot be reshaped at all."""
    if is_zero_with(length, before):
        return True
    others = [[*dims[:axis], *dims[axis + 1 :]] for dims in (before, target)]
    if any(None in dims or -1 in dims or 0 in dims for dims in others):
        return False
    (one, symbols), (other, wanted) = map(factors, others)
    return one != other and sorted(symbols) == sorted(wanted)


def _is_empty_with(length: str, value: onnx_ir.Value) -> bool:
    """Return whether a tensor is surely empty wherever a symbolic length is 0, as it was before it was reshaped."""
    for _ in range(_FARTHEST):
        if is_zero_with(length, dimensions(value) or []):
            return True
        node = value.producer()
        source = node.inputs[0] if node is not None and not node.domain and node.inputs else None
        if node is None or source is None or node.op_type not in {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}:
            return False
        value = source
    return False


def _expanded(target: Dimension, length: Dimension) -> Dimension:
    """Return the length of an axis of `length` after Expand to `target`.

    Either of two symbols may be 1 and broadcast, so their result is unknown.
    """
    if target == length or length == 1:
        return target
    if target == 1 or (isinstance(length, int) and not isinstance(target, int)):
        return length
    return target if isinstance(target, int) else None


def _complete_slice(node: onnx_ir.Node) -> None:
    """Keep the lengths of axes that are not cut: a computed bound makes inference give up on all axes."""
    source, output = node.inputs[0], node.outputs[0]
    axes = small_constant(node.inputs[3]) if len(node.inputs) > 3 else None
    before = dimensions(source) if source is not None else None
    if axes is None or before is None:
        return
    cut = {int(axis) % len(before) for axis in axes.reshape(-1)}
    whole = onnx_ir.Shape([None if axis in cut else dim for axis, dim in enumerate(before)])
    output.shape = merged_shapes(output.shape, whole)
