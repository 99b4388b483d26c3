"""Convert the operators of images whose meaning changed: Upsample, Resize, GridSample, RoiAlign, BatchNormalization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir

from passopt.ir.graph.provenance import called
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.opset.step import Step

#: From this opset on, a Resize may leave its regions out.
_OPSET_WITHOUT_REGIONS = 13
#: The modes of GridSample before opset 20, and what they are called since.
RENAMED_MODES: Mapping[str, str] = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}


def statistics_per_channel(step: Step) -> None:
    """Drop the attribute spatial of a BatchNormalization, which opset 9 no longer has.

    A node that has statistics for every place of an image instead of one for each channel is refused.
    """
    if step.integer("spatial", 1) != 1:
        step.fail("its statistics are not per channel (spatial = 0)")
    step.node.attributes.pop("spatial", None)


def scales_to_input(step: Step) -> None:
    """Turn the scales of an Upsample into an input, as ONNX did in opset 9."""
    step.attribute_to_input("scales", 1, np.float32)


def upsample_to_resize(step: Step) -> None:
    """Call an Upsample Resize, as ONNX does from opset 10 on; it only grows images, so its nearest is the lower one."""
    step.node.op_type = "Resize"
    if step.target > step.version:
        _sample(step, "floor")


def asymmetric_resize(step: Step) -> None:
    """State how a Resize places its samples, which opset 11 made an attribute with another default.

    The nearest place is rounded down where the image grows and up where it shrinks, so all axes must do the same.
    """
    if "coordinate_transformation_mode" in step.node.attributes:
        return  # It was an Upsample.
    if step.text("mode", "nearest") != "nearest":
        _sample(step, None)
        return
    scales = small_constant(step.input(1))
    if scales is None:
        step.fail("its scales are not constant, so it is unknown whether it rounds up or down")
    grows, shrinks = bool((scales > 1).any()), bool((scales < 1).any())
    if grows and shrinks:
        step.fail(f"it rounds down along some axes and up along others (scales {scales.tolist()})")
    _sample(step, "ceil" if shrinks else "floor")


def _sample(step: Step, nearest: str | None) -> None:
    """Give a Resize of opset 10 the inputs and attributes of opset 11."""
    node = step.node
    scales = step.input(1)
    assert scales is not None, f"{called(node)} has no scales"
    node.resize_inputs(3)
    node.replace_input_with(2, scales)
    has_regions = step.target < _OPSET_WITHOUT_REGIONS
    node.replace_input_with(1, step.constant("roi", np.zeros(0, np.float32)) if has_regions else None)
    node.attributes["coordinate_transformation_mode"] = onnx_ir.AttrString(
        "coordinate_transformation_mode", "asymmetric"
    )
    if nearest is not None:
        node.attributes["nearest_mode"] = onnx_ir.AttrString("nearest_mode", nearest)


def scales_or_sizes(step: Step) -> None:
    """Leave out the empty scales of a Resize that has sizes, as opset 13 demands.

    One way to place the samples no longer exists, and is refused.
    """
    mode = step.text("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        step.fail(f"its coordinate_transformation_mode {mode} no longer exists")
    if step.input(3) is not None:
        step.node.replace_input_with(2, None)


def output_half_pixel(step: Step) -> None:
    """State how a RoiAlign places its samples, which opset 16 made an attribute with another default."""
    name = "coordinate_transformation_mode"
    step.node.attributes[name] = onnx_ir.AttrString(name, "output_half_pixel")


def renamed_modes(step: Step) -> None:
    """Rename the mode of a GridSample, which opset 20 calls by the same names for any number of axes."""
    mode = step.text("mode", "bilinear")
    if mode not in RENAMED_MODES:
        step.fail(f"its mode {mode} is none of {', '.join(RENAMED_MODES)}")
    step.node.attributes["mode"] = onnx_ir.AttrString("mode", RENAMED_MODES[mode])
