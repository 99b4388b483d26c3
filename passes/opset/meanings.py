"""Refuse nodes for which their operator changed its meaning, though its schema only admits more, up and down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir

from passopt.passes.opset.step import INLINE, refuse


def check_meaning(node: onnx_ir.Node, version: int, given: int, wanted: int) -> None:
    """Raise PassError if a node means something else before and after the change of its operator.

    Args:
        node: The node.
        version: The opset in which its operator changed.
        given: The opset that the node has.
        wanted: The next opset, up or down.
    """
    find = _CHANGED.get((node.op_type, version))
    if find is None:
        return
    parameter = next((item.name for item in node.attributes.values() if item.is_ref()), None)
    if parameter is not None:
        refuse(node, given, wanted, f"its attribute {parameter} is a parameter of its function", INLINE)
    reason = find(node)
    if reason is not None:
        refuse(node, given, wanted, reason)


def _windows_in_padding(node: onnx_ir.Node) -> str | None:
    """Refuse windows that may start in the padding at the end, which ceil_mode counted before opset 22.

    There is no such window, whatever the length of an axis, if its step and padding do not exceed its reach.
    """
    if not _integer(node, "ceil_mode", 0) or _text(node, "auto_pad", "NOTSET").startswith("SAME"):
        return None
    kernel = _integers(node, "kernel_shape", ())
    axes = len(kernel)
    pads = _integers(node, "pads", [0] * axes * 2)
    strides, dilations = (_integers(node, name, [1] * axes) for name in ("strides", "dilations"))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    source = node.inputs[0]
    lengths = [None] * axes if source is None or source.shape is None else source.shape.dims[2:]
    for axis, length in enumerate(lengths):
        before, after, stride = pads[axis], pads[axes + axis], strides[axis]
        if stride + after <= reach[axis]:
            continue
        if not isinstance(length, int):
            return f"with ceil_mode, a window along axis {axis + 2} may start in the padding, so ONNX may count others"
        last = -(-(length + before + after - reach[axis]) // stride) * stride
        if last >= length + before:
            return f"with ceil_mode, the last window along axis {axis + 2} starts in the padding, so ONNX counts others"
    return None


def _causal_scores(node: onnx_ir.Node) -> str | None:
    """Refuse scores with their mask as an output: from opset 25 on, they hold the causal mask too."""
    scores = node.outputs[3] if len(node.outputs) > 3 else None
    is_used = scores is not None and (scores.uses() or scores.is_graph_output())
    if is_used and _integer(node, "is_causal", 0) and _integer(node, "qk_matmul_output_mode", 0) == 2:
        return "its output qk_matmul_output holds the causal mask from opset 25 on only"
    return None


def _remainder_of_floats(node: onnx_ir.Node) -> str | None:
    """Refuse a floating Mod that has the sign of its divisor, which there is from opset 28 on."""
    source = node.inputs[0]
    if _integer(node, "fmod", 0) or (source is not None and source.dtype is not None and source.dtype.is_integer()):
        return None
    return "it takes the remainder of floats with the sign of the divisor (fmod = 0)"


def _integer(node: onnx_ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _integers(node: onnx_ir.Node, name: str, default: Sequence[int]) -> Sequence[int]:
    return node.attributes[name].as_ints() if name in node.attributes else default


def _text(node: onnx_ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default


#: For operators and the opset of a change, what finds the reason why a node means something else after it.
_CHANGED: Mapping[tuple[str, int], Callable[[onnx_ir.Node], str | None]] = {
    ("AveragePool", 22): _windows_in_padding,
    ("LpPool", 22): _windows_in_padding,
    ("MaxPool", 22): _windows_in_padding,
    ("Attention", 25): _causal_scores,
    ("Mod", 28): _remainder_of_floats,
}
