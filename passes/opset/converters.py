"""Convert nodes whose operator changed, so that they keep their meaning in the newer opset.

There is one function per kind of change; `CONVERTERS` lists them by (operator, opset). A converter edits the node in
place, so that its name, metadata and outputs stay, and may insert nodes before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir

import passopt.passes.opset.image_converters as images  # mypy's cache loses a module that is imported from its package
from passopt.passes.opset.step import Step

#: The lowest number of fp32, which was the default bound of a Clip.
_LOWEST = -3.4028234663852886e38
#: From this opset on, Reshape takes a 0 as an empty axis if it has the attribute allowzero.
_OPSET_OF_ALLOWZERO = 14


def axes_to_input(step: Step) -> None:
    """Turn the axes of reductions, Squeeze and Unsqueeze into an input, as ONNX did in opsets 13 and 18."""
    step.attribute_to_input("axes", 1)


def sizes_to_input(step: Step) -> None:
    """Turn the sizes of a Split into an input, as ONNX did in opset 13."""
    step.attribute_to_input("split", 1)


def count_outputs(step: Step) -> None:
    """State the number of outputs of a Split without sizes, which opset 18 requires."""
    if step.input(1) is None:
        step.node.attributes["num_outputs"] = onnx_ir.AttrInt64("num_outputs", len(step.node.outputs))


def bounds_to_input(step: Step) -> None:
    """Turn the bounds of a Clip into inputs, as ONNX did in opset 11.

    Without bounds, both operators clip to the finite numbers of the dtype; only for fp64 did the old one take fp32's.
    """
    if step.dtype("a bound") == onnx_ir.DataType.DOUBLE:
        for name, bound in (("min", _LOWEST), ("max", -_LOWEST)):
            step.node.attributes.setdefault(name, onnx_ir.AttrFloat32(name, bound))
    for index, name in enumerate(("min", "max"), 1):
        step.attribute_to_input(name, index, step.dtype("a bound").numpy())


def padding_to_input(step: Step) -> None:
    """Turn the lengths and the number of a Pad into inputs, as ONNX did in opset 11."""
    dtype = step.dtype("the number that it pads with") if "value" in step.node.attributes else None
    step.attribute_to_input("pads", 1)
    if dtype is not None:
        step.attribute_to_input("value", 2, dtype.numpy())


def ranges_to_input(step: Step) -> None:
    """Turn the bounds and axes of a Slice into inputs, as ONNX did in opset 10."""
    for index, name in enumerate(("starts", "ends", "axes"), 1):
        step.attribute_to_input(name, index)


def count_to_input(step: Step) -> None:
    """Turn the number of elements of a TopK into an input, as ONNX did in opset 10."""
    step.attribute_to_input("k", 1, ndim=1)


def renamed_scatter(step: Step) -> None:
    """Call a Scatter ScatterElements, as ONNX does from opset 11 on."""
    step.node.op_type = "ScatterElements"


def axis_to_input(step: Step) -> None:
    """Turn the axis of a DFT into an input, as ONNX did in opset 20; its default was 1 and is -2."""
    step.node.attributes.setdefault("axis", onnx_ir.AttrInt64("axis", 1))
    step.attribute_to_input("axis", 2)


def unmasked(step: Step) -> None:
    """Drop the mask of a Dropout, whose dtype changed in opset 10; refuse one that is used.

    What it holds outside of training was not defined before opset 12, and is all True since.
    """
    used = [value.name for value in step.node.outputs[1:] if value.uses() or value.is_graph_output()]
    if used:
        step.fail(f"its mask {used[0]} is used, and is another one there")
    step.node.resize_outputs(1)


def ratio_to_input(step: Step) -> None:
    """Turn the ratio of a Dropout into an input, as ONNX did in opset 12; it drops nothing in inference anyway."""
    unmasked(step)
    if "ratio" in step.node.attributes:
        step.attribute_to_input("ratio", 1, step.dtype("its ratio").numpy())


def one_axis(step: Step) -> None:
    """Convert a Softmax, LogSoftmax or Hardmax to opset 13, in which it normalises over one axis only.

    Before, it normalised over all axes from `axis` on. If that is more than the last axis, these axes are flattened
    into one before the node, and the shape is restored behind it.
    """
    node, source = step.node, step.source()
    attribute = node.attributes.get("axis")
    axis = attribute if attribute is not None else onnx_ir.AttrInt64("axis", 1)
    dims = source.shape.dims if source.shape is not None else None
    if not axis.is_ref() and axis.as_int() in {-1, None if dims is None else len(dims) - 1}:
        node.attributes["axis"] = axis
        return
    filled = dims is not None and all(isinstance(dim, int) and dim > 0 for dim in dims)
    if not filled and step.target < _OPSET_OF_ALLOWZERO:
        step.fail(
            f"{source.name} of shape {source.shape} may have an empty axis, which a Reshape restores from opset "
            f"{_OPSET_OF_ALLOWZERO} on only",
            f"Go to that one at least: legalize{{opset={_OPSET_OF_ALLOWZERO}}}.",
        )
    front = step.builder()
    flat = front.Flatten(source, **({} if axis.is_ref() else {"axis": axis.as_int()}))
    if axis.is_ref():
        front.built.nodes[-1].attributes["axis"] = axis
        flat.shape = None
    shape = front.Shape(source)
    step.before(front)
    node.replace_input_with(0, flat)
    node.attributes["axis"] = onnx_ir.AttrInt64("axis", -1)
    back = step.builder()
    inner = node.outputs[0]
    restored = back.Reshape(inner, shape)
    if not filled:
        back.built.nodes[-1].attributes["allowzero"] = onnx_ir.AttrInt64("allowzero", 1)
    step.after(back, restored)
    inner.shape = flat.shape


def floats_only(step: Step) -> None:
    """Refuse an Erf of integers, which opset 13 no longer has."""
    dtype = step.node.inputs[0].dtype if step.node.inputs[0] is not None else None
    if dtype is not None and not dtype.is_floating_point():
        step.fail(f"it no longer takes {dtype.name}")


def inference_only(step: Step) -> None:
    """Drop the outputs of a BatchNormalization other than Y, whose meaning in training changed in opset 14.

    A node of which such an output is used is refused.
    """
    extra = [value.name for value in step.node.outputs[1:] if value.uses() or value.is_graph_output()]
    if extra:
        step.fail(f"its training outputs {', '.join(map(str, extra))} changed their meaning")
    step.node.resize_outputs(1)


def scale_per_channel(step: Step) -> None:
    """Repeat the scale and bias of a GroupNormalization for every channel of a group, as opset 21 expects them.

    Before, they had one element per group. The number of channels must be known.
    """
    source, groups = step.node.inputs[0], step.integer("num_groups", 0)
    channels = source.shape[1] if source is not None and source.shape is not None and len(source.shape) > 1 else None
    if not isinstance(channels, int):
        step.fail(
            "the number of channels of its input is unknown", "Give the input of the model a fixed number of them."
        )
    for index in (1, 2):
        per_group = step.node.inputs[index]
        axes = step.constant("axes", np.array([1], np.int64))
        sizes = step.constant("sizes", np.array([groups, channels // groups], np.int64))
        flat = step.constant("flat", np.array([-1], np.int64))
        builder = step.builder()
        per_channel = builder.Reshape(builder.Expand(builder.Unsqueeze(per_group, axes), sizes), flat)
        step.before(builder)
        step.node.replace_input_with(index, per_channel)


def no_unsigned_zero_floats(step: Step) -> None:
    """Refuse casts to the FNUZ float8 types, which opset 24 gives the largest number for infinity instead of NaN."""
    attribute = step.node.attributes.get("to")
    to = attribute.value if attribute is not None and not attribute.is_ref() else step.node.outputs[0].dtype
    if to in {onnx_ir.DataType.FLOAT8E4M3FNUZ, onnx_ir.DataType.FLOAT8E5M2FNUZ}:
        step.fail(f"the cast of infinities to {onnx_ir.DataType(to).name} changed")


#: A function that converts the node of a step in place.
Converter = Callable[[Step], None]

#: Conversions that edit nothing and refuse some dtypes, so that the calls of a function that holds them are looked at.
REFUSES_DTYPES = frozenset({("Erf", 13), ("CastLike", 24)})

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

#: The converter for each operator and the opset in which it changed.
CONVERTERS: Mapping[tuple[str, int], Converter] = {
    ("BatchNormalization", 9): images.statistics_per_channel,
    ("Upsample", 9): images.scales_to_input,
    ("Upsample", 10): images.upsample_to_resize,
    ("Dropout", 10): unmasked,
    ("Slice", 10): ranges_to_input,
    ("TopK", 10): count_to_input,
    ("Clip", 11): bounds_to_input,
    ("Pad", 11): padding_to_input,
    ("Resize", 11): images.asymmetric_resize,
    ("Scatter", 11): renamed_scatter,
    ("Dropout", 12): ratio_to_input,
    ("Resize", 13): images.scales_or_sizes,
    ("Softmax", 13): one_axis,
    ("LogSoftmax", 13): one_axis,
    ("Hardmax", 13): one_axis,
    ("Erf", 13): floats_only,
    ("ReduceSum", 13): axes_to_input,
    ("Squeeze", 13): axes_to_input,
    ("Unsqueeze", 13): axes_to_input,
    ("Split", 13): sizes_to_input,
    ("BatchNormalization", 14): inference_only,
    ("RoiAlign", 16): images.output_half_pixel,
    **{(f"Reduce{kind}", 18): axes_to_input for kind in _REDUCTIONS},
    ("Split", 18): count_outputs,
    ("DFT", 20): axis_to_input,
    ("GridSample", 20): images.renamed_modes,
    ("GroupNormalization", 21): scale_per_channel,
    ("Cast", 24): no_unsigned_zero_floats,
    ("CastLike", 24): no_unsigned_zero_floats,
}
