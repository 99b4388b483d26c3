"""Follow an axis through operators that only move, select or reshape data.

The sharding rules use this, and so does `output_channels` to read off what the channels of a linear consist of.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from passopt.ir.dtypes import SLICE_END
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.sharding.placement import Product

#: Operators whose output elements depend only on the input elements at the same place, after broadcasting.
ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "And", "Or", "Xor", "Not", "Equal", "Greater", "Less"}
    | {"GreaterOrEqual", "LessOrEqual", "Where", "Sqrt", "Reciprocal", "Neg", "Sigmoid", "Tanh", "Exp", "Log", "Erf"}
    | {"Abs", "Relu", "Gelu", "Cast", "Identity", "Clip", "IsNaN", "Cos", "Sin", "Floor", "Ceil", "Round", "Softplus"}
    | {"Swish", "HardSwish", "LeakyRelu", "Elu", "Sum", "CastLike", "IsInf", "Sign"}
)


def ndim_of(value: onnx_ir.Value | None) -> int:
    """Return the number of axes of a value; raise ValueError if its shape is unknown."""
    if value is None or value.shape is None:
        raise ValueError(f"the shape of {value.name if value is not None else 'an absent input'} is unknown")
    return len(value.shape)


def constant_axes(node: onnx_ir.Node, position: int, ndim: int) -> list[int] | None:
    """Return the axes that a node is given, counted from the front; None if it is given none.

    Args:
        node: A node that takes axes, such as a reduction or Squeeze.
        position: The number of the input that holds the axes, if they are not in the attribute `axes`.
        ndim: The number of axes of the data, to which negative axes refer.

    Raises:
        ValueError: If the axes are computed, or too many for a small constant.
    """
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [int(axis) % ndim for axis in attribute.value]
    if len(node.inputs) <= position or node.inputs[position] is None:
        return None
    array = small_constant(node.inputs[position])
    if array is None:
        raise ValueError(f"the axes of {node.op_type} are not constant")
    return [int(axis) % ndim for axis in array.reshape(-1)]


def attribute_axis(node: onnx_ir.Node, default: int, ndim: int) -> int:
    """Return the attribute `axis` of a node, or its default, counted from the front of `ndim` axes."""
    attribute = node.attributes.get("axis")
    return (attribute.as_int() if attribute is not None else default) % ndim


def squeezed_axes(node: onnx_ir.Node) -> list[int]:
    """Return the axes that a Squeeze removes: those that it is given, or else all that are known to have length 1."""
    ndim = ndim_of(node.inputs[0])
    axes = constant_axes(node, 1, ndim)
    return axes if axes is not None else [i for i, dim in enumerate(dimensions(node.inputs[0]) or []) if dim == 1]  # type: ignore[arg-type]


def moved_axis(node: onnx_ir.Node, index: int, axis: int) -> int | None:
    """Return the output axis that an input axis becomes, if every element keeps its place along it; else None.

    Args:
        node: The operator.
        index: The number of the input.
        axis: The axis of that input, counted from the front.

    Raises:
        ValueError: If a shape or the axes of the operator are unknown.
    """
    kind = node.op_type
    if kind in ELEMENTWISE:
        return axis + ndim_of(node.outputs[0]) - ndim_of(node.inputs[index])
    if index != 0:
        return axis if kind == "Concat" and attribute_axis(node, 0, ndim_of(node.inputs[0])) != axis else None
    if kind == "Concat":
        return None if attribute_axis(node, 0, ndim_of(node.inputs[0])) == axis else axis
    if kind == "Transpose":
        return _permutation(node).index(axis)
    if kind == "Unsqueeze":
        added = constant_axes(node, 1, ndim_of(node.outputs[0])) or []
        return [position for position in range(ndim_of(node.outputs[0])) if position not in added][axis]
    if kind == "Squeeze":
        removed = squeezed_axes(node)
        return None if axis in removed else axis - sum(gone < axis for gone in removed)
    if kind == "Expand":
        return axis + ndim_of(node.outputs[0]) - ndim_of(node.inputs[0])
    if kind == "Gather":
        along = attribute_axis(node, 0, ndim_of(node.inputs[0]))
        if axis == along:
            return None
        return axis if axis < along else axis - 1 + ndim_of(node.inputs[1])
    if kind == "GatherND":
        indexed = indexed_axes(node)
        return None if axis < indexed else axis - indexed + ndim_of(node.inputs[1]) - 1
    if kind in {"Slice", "Split", "Softmax"}:
        return axis
    return None


def indexed_axes(node: onnx_ir.Node) -> int:
    """Return how many leading axes of its data a GatherND indexes; raise ValueError if that is unknown."""
    width = (dimensions(node.inputs[1]) or [None])[-1]  # type: ignore[arg-type]
    if not isinstance(width, int) or ("batch_dims" in node.attributes and node.attributes["batch_dims"].as_int()):
        raise ValueError("expected indices of a known width and no batch dimensions")
    return width


def source_axis(node: onnx_ir.Node, index: int, axis: int) -> int | None:
    """Return the axis of input `index` that becomes output axis `axis`; None if none does.

    This is the inverse of `moved_axis`.
    """
    for candidate in range(ndim_of(node.inputs[index])):
        if moved_axis(node, index, candidate) == axis:
            return candidate
    return None


def selects_along(node: onnx_ir.Node, index: int, axis: int) -> bool:
    """Return True if the operator picks elements along this axis of its data, so that a shard may lack some of them."""
    if index != 0:
        return False
    ndim = ndim_of(node.inputs[0])
    if node.op_type in {"Gather", "Split"}:
        return attribute_axis(node, 0, ndim) == axis
    if node.op_type == "GatherND":
        return axis < indexed_axes(node)
    if node.op_type == "Slice":
        axes = constant_axes(node, 3, ndim)
        return axis in (axes if axes is not None else range(ndim)) and not _slices_all(node, axis, axes)
    return False


def _slices_all(node: onnx_ir.Node, axis: int, axes: Sequence[int] | None) -> bool:
    """Return True if a Slice takes all elements along an axis, and so does not select."""
    position = axes.index(axis) if axes is not None else axis
    starts, ends = small_constant(node.inputs[1]), small_constant(node.inputs[2])
    if starts is None or ends is None or not _steps_by_one(node):
        return False
    length = (dimensions(node.inputs[0]) or [])[axis]  # type: ignore[arg-type]
    end = int(ends.reshape(-1)[position])
    whole = end == SLICE_END or (isinstance(length, int) and end >= length)
    return int(starts.reshape(-1)[position]) == 0 and whole


def slice_bounds(node: onnx_ir.Node, axis: int) -> tuple[int, int] | None:
    """Return where a Slice starts and ends along an axis, counted from the front.

    It is None if starts, ends or the length of the axis are not constant, or if the steps are not 1.
    """
    starts, ends = small_constant(node.inputs[1]), small_constant(node.inputs[2])
    length = products(node.inputs[0])[axis]
    if starts is None or ends is None or length is None or length.symbols or not _steps_by_one(node):
        return None
    position = sliced_position(node, axis)
    start, end, _ = slice(int(starts.reshape(-1)[position]), int(ends.reshape(-1)[position])).indices(length.number)
    return start, end


def sliced_position(node: onnx_ir.Node, axis: int) -> int:
    """Return the position of an axis in the starts and ends of a Slice."""
    axes = constant_axes(node, 3, ndim_of(node.inputs[0]))
    return axes.index(axis) if axes is not None else axis


def _steps_by_one(node: onnx_ir.Node) -> bool:
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = small_constant(node.inputs[4])
    return steps is not None and bool((steps == 1).all())


def _permutation(node: onnx_ir.Node) -> list[int]:
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return [int(axis) for axis in attribute.value]
    return list(reversed(range(ndim_of(node.inputs[0]))))


def products(value: onnx_ir.Value | None) -> list[Product | None]:
    """Return each dimension of a value as a product; None for a dimension that is unknown.

    A single unknown dimension of a Reshape is computed from the number of elements.

    Raises:
        ValueError: If the shape is unknown altogether.
    """
    if value is None:
        return []
    dims = dimensions(value)
    if dims is None:
        raise ValueError(f"the shape of {value.name} is unknown")
    known = [Product.of([dim]) for dim in dims]
    node = value.producer()
    if None not in known or node is None:
        return known
    if node.op_type == "Transpose":
        source = products(node.inputs[0])
        return [source[axis] for axis in _permutation(node)]
    if node.op_type == "Reshape" and known.count(None) == 1:
        total, rest = product_of(products(node.inputs[0])), product_of([item for item in known if item is not None])
        known[known.index(None)] = total.divided_by(rest) if total is not None and rest is not None else None
    return known


def product_of(factors: Sequence[Product | None]) -> Product | None:
    """Multiply the factors; return None if one of them is unknown."""
    result = Product(1)
    for factor in factors:
        if factor is None:
            return None
        result = result.times(factor)
    return result


def reshaped_axis(
    before: Sequence[Product | None],
    after: Sequence[Product | None],
    axis: int,
    segments: Product,
    units: int,
) -> tuple[int, Product] | None:
    """Find the axis on which the units of a sharded axis lie after a reshape.

    Args:
        before: The shape before the reshape.
        after: The shape after it.
        axis: The sharded axis of `before`.
        segments: The number of equal segments of that axis.
        units: The number of indivisible groups in each segment.

    Returns:
        The axis of `after` and its number of segments; None if no axis holds all units whole.
    """
    outer, behind = product_of(before[:axis]), product_of(before[axis:])
    for position in reversed(range(len(after))):
        ahead, rest, length = product_of(after[:position]), product_of(after[position:]), after[position]
        # Both shapes hold the same elements, so the axes ahead of `position`, or if one of them is unknown those from
        # it on, tell how many segments the axis at `position` has.
        if outer is not None and ahead is not None:
            kept = outer.times(segments).divided_by(ahead)
        elif behind is not None and rest is not None:
            kept = rest.times(segments).divided_by(behind)
        else:
            continue
        if kept is None or length is None:
            continue
        if length.divided_by(kept.times(Product(units))) is not None:
            return position, kept
    return None
