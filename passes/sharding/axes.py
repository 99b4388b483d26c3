"""Where an axis goes when a value passes through an operator that only moves axes; for rules and column layouts."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from passopt.ir.graph.shapes import dimensions
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.sharding.placement import Product

#: Every output element depends on the input elements at the same (broadcast) place.
ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "And", "Or", "Xor", "Not", "Equal", "Greater", "Less"}
    | {"GreaterOrEqual", "LessOrEqual", "Where", "Sqrt", "Reciprocal", "Neg", "Sigmoid", "Tanh", "Exp", "Log", "Erf"}
    | {"Abs", "Relu", "Gelu", "Cast", "Identity", "Clip", "IsNaN", "Cos", "Sin", "Floor", "Ceil", "Round", "Softplus"}
    | {"Swish", "HardSwish", "LeakyRelu", "Elu", "Sum", "CastLike", "IsInf", "Sign"}
)


def ndim_of(value: onnx_ir.Value | None) -> int:
    """The number of axes. Raises ValueError if it is unknown."""
    if value is None or value.shape is None:
        raise ValueError(f"the shape of {value.name if value is not None else 'an absent input'} is unknown")
    return len(value.shape)


def constant_axes(node: onnx_ir.Node, position: int, ndim: int) -> list[int] | None:
    """Axes given as input `position` or as the attribute `axes`, counted from the front; None if not given."""
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
    attribute = node.attributes.get("axis")
    return (attribute.as_int() if attribute is not None else default) % ndim


def squeezed_axes(node: onnx_ir.Node) -> list[int]:
    ndim = ndim_of(node.inputs[0])
    axes = constant_axes(node, 1, ndim)
    return axes if axes is not None else [i for i, dim in enumerate(dimensions(node.inputs[0]) or []) if dim == 1]  # type: ignore[arg-type]


def moved_axis(node: onnx_ir.Node, index: int, axis: int) -> int | None:
    """The output axis that input `index`'s `axis` becomes, where every element keeps its place along it; else None."""
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
    """How many leading axes of its data a GatherND picks from."""
    width = (dimensions(node.inputs[1]) or [None])[-1]  # type: ignore[arg-type]
    if not isinstance(width, int) or ("batch_dims" in node.attributes and node.attributes["batch_dims"].as_int()):
        raise ValueError("expected indices of a known width and no batch dimensions")
    return width


def source_axis(node: onnx_ir.Node, index: int, axis: int) -> int | None:
    """The inverse of `moved_axis`: the axis of input `index` that becomes output `axis`; None if it has none."""
    for candidate in range(ndim_of(node.inputs[index])):
        if moved_axis(node, index, candidate) == axis:
            return candidate
    return None


def selects_along(node: onnx_ir.Node, index: int, axis: int) -> bool:
    """True if the operator picks elements along this axis of its data input, so that it cannot be sharded whole."""
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
    position = axes.index(axis) if axes is not None else axis
    starts, ends = small_constant(node.inputs[1]), small_constant(node.inputs[2])
    if starts is None or ends is None or not _steps_by_one(node):
        return False
    length = (dimensions(node.inputs[0]) or [])[axis]  # type: ignore[arg-type]
    end = int(ends.reshape(-1)[position])
    whole = end == 2**63 - 1 or (isinstance(length, int) and end >= length)
    return int(starts.reshape(-1)[position]) == 0 and whole


def slice_bounds(node: onnx_ir.Node, axis: int) -> tuple[int, int] | None:
    """Start and end along an axis of known length, counted from the front; None if they are not constant."""
    starts, ends = small_constant(node.inputs[1]), small_constant(node.inputs[2])
    length = products(node.inputs[0])[axis]
    if starts is None or ends is None or length is None or length.symbols or not _steps_by_one(node):
        return None
    position = sliced_position(node, axis)
    start, end, _ = slice(int(starts.reshape(-1)[position]), int(ends.reshape(-1)[position])).indices(length.number)
    return start, end


def sliced_position(node: onnx_ir.Node, axis: int) -> int:
    """Which element of a Slice's starts and ends is for this axis."""
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
    """Each dimension as a product. A reshape's unknown dimension follows from the number of elements."""
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
    """None if a factor is unknown."""
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
    """Where `units` groups per segment of `axis` lie after a reshape: (axis, segments), or None if they fall apart."""
    outer, behind = product_of(before[:axis]), product_of(before[axis:])
    for position in reversed(range(len(after))):
        ahead, rest, length = product_of(after[:position]), product_of(after[position:]), after[position]
        # Both hold the same elements: what lies ahead, or else what lies behind, tells how often segments repeat.
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
