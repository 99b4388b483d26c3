"""Find out what the output channels of a linear consist of, from how its output is used.

A packed projection is reshaped to [.., 3, width] and indexed along the 3, so it has three segments. A projection that
is reshaped to [.., heads, head_dim] has heads as units. Names are never looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir

from passopt.ir.graph.provenance import called
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.sharding.axes import moved_axis, product_of, products, selects_along, slice_bounds

_FURTHEST = 24


@dataclasses.dataclass(frozen=True)
class ColumnLayout:
    """The layout of output channels: `segments` parts of `units` groups, each of any number of channels."""

    segments: int
    units: int


def column_layout(value: onnx_ir.Value, axis: int, length: int) -> ColumnLayout:
    """Return the layout of the channels of a linear's output.

    Args:
        value: The output of the linear.
        axis: The axis of the channels.
        length: The number of channels.

    Raises:
        ValueError: If the channels are split into unequal parts, or a length along them is unknown.
    """
    segments = 1
    found = _next_division(value, axis)
    while found is not None:
        node, axes = found
        if node.op_type == "Split":
            widths = _split_widths(node, length)
            if len(set(widths)) != 1:
                raise ValueError(
                    f"{called(node)} splits the channels into unequal parts {widths}; run split-packed-qkv"
                )
            segments *= len(widths)
            found = _next_division(node.outputs[0], axes[0])
            continue
        if node.op_type == "Slice":
            segments *= _equal_slices(node, axes[0])
            found = _next_division(node.outputs[0], axes[0])
            continue
        output = node.outputs[0]
        leading = _length(output, axes[0])
        if not _is_indexed(output, axes[0]):
            return ColumnLayout(segments, leading)
        segments *= leading
        if len(axes) == 1:
            break
        if len(axes) > 2:
            return ColumnLayout(segments, _length(output, axes[1]))
        found = _next_division(output, axes[1])
    return ColumnLayout(segments, length // segments)


def _next_division(value: onnx_ir.Value, axis: int) -> tuple[onnx_ir.Node, list[int]] | None:
    """Return the nearest Reshape, Split or Slice downstream that divides the axis, with the output axes it becomes."""
    for node, index, position in _followed(value, axis):
        if node.op_type == "Slice" and selects_along(node, index, position) and _equal_slices(node, position):
            return node, [position]
        if node.op_type == "Split" and index == 0 and selects_along(node, 0, position):
            return node, [position]
        if node.op_type == "Reshape" and index == 0:
            axes = _divided_into(node, position)
            if len(axes) > 1:
                return node, axes
    return None


def _equal_slices(node: onnx_ir.Node, axis: int) -> int:
    """Return into how many equal parts all Slices of a Slice's input divide an axis; 0 if the parts are not equal."""
    value = node.inputs[0]
    assert value is not None
    slices = [use.node for use in value.uses() if use.idx == 0 and use.node.op_type == "Slice"]
    found = {slice_bounds(each, axis) for each in slices if selects_along(each, 0, axis)}
    bounds = sorted(item for item in found if item is not None)
    length = _length(value, axis)
    width = length // len(bounds) if bounds else 0
    equal = [(start, start + width) for start in range(0, length, width or length)]
    return len(bounds) if bounds == equal and None not in found else 0


def _is_indexed(value: onnx_ir.Value, axis: int) -> bool:
    """Return True if the axis holds segments, which are picked one by one.

    Raises:
        ValueError: If a Slice takes some of them, since its parts are then unequal.
    """
    picks = [node for node, index, position in _followed(value, axis) if selects_along(node, index, position)]
    sliced = next((node for node in picks if node.op_type == "Slice"), None)
    if sliced is not None:
        raise ValueError(
            f"Slice {sliced.name!r} takes some of {_length(value, axis)} parts of its output, expected equal heads; "
            f"give queries, keys and values a weight each before"
        )
    return bool(picks)


def _followed(value: onnx_ir.Value, axis: int) -> Iterator[tuple[onnx_ir.Node, int, int]]:
    """Yield every (node, input number, axis) that the axis reaches with its elements in place, nearest first."""
    work, steps = [(value, axis)], 0
    while work and steps < _FURTHEST:
        current, position = work.pop(0)
        steps += 1
        for use in current.uses():
            yield use.node, use.idx, position
            if use.node.op_type == "Reshape" and use.idx == 0:
                axes = _divided_into(use.node, position)
                if len(axes) == 1:
                    work.append((use.node.outputs[0], axes[0]))
                continue
            if selects_along(use.node, use.idx, position):
                continue
            after = moved_axis(use.node, use.idx, position)
            if after is not None:
                work.extend((output, after) for output in use.node.outputs)


def _divided_into(node: onnx_ir.Node, axis: int) -> list[int]:
    """Return the output axes into which a Reshape divides an input axis; none if it merges the axis with others."""
    before, after = products(node.inputs[0]), products(node.outputs[0])
    length, outer, behind = before[axis], product_of(before[:axis]), product_of(before[axis:])
    if length is None or length.symbols:
        return []
    starts = [
        count
        for count in range(len(after))
        if (outer is not None and product_of(after[:count]) == outer)
        or (behind is not None and product_of(after[count:]) == behind)
    ]
    # Axes of length 1 leave several places where the axis may start; if its old place is one of them, it stays there.
    start = axis if axis in starts else min(starts, default=len(after))
    axes, left = [], length.number
    for position in range(start, len(after)):
        factor = after[position]
        if factor is None or factor.symbols or left % factor.number:
            break
        axes.append(position)
        left //= factor.number
        if left == 1:
            return axes
    return []


def _length(value: onnx_ir.Value, axis: int) -> int:
    """Return the length of an axis; raise ValueError if it is not a known number."""
    length = products(value)[axis]
    if length is None or length.symbols:
        raise ValueError(f"the length of axis {axis} of {value.name} is not a number")
    return length.number


def _split_widths(node: onnx_ir.Node, length: int) -> list[int]:
    sizes = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is not None:
        return [int(size) for size in sizes.reshape(-1)]
    count = len(node.outputs)
    return [length // count] * count
