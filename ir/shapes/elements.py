"""Read integer scalars and vectors element by element, as constants and lengths of axes, without running anything.

Exporters compute reshape targets in the graph (`Concat(batch, seq, 6, 12)`); `elements` reads such a vector back.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import onnx_ir

from passopt.ir.shapes.dimensions import Dimension, dimensions, fraction, multiple
from passopt.ir.shapes.slices import is_disputed
from passopt.ir.weights.lazy_weight import small_constant

#: The target of a reshape has a handful of elements; a longer vector is data and is not read.
_LONGEST = 16


@dataclasses.dataclass(frozen=True)
class DimOf:
    """An element of a vector that is, at run time, the length of `axis` of `value`."""

    value: onnx_ir.Value
    axis: int


@dataclasses.dataclass(frozen=True)
class ConstantElement:
    """An element of a vector that is the constant `number`: element `index` of the small initializer `value`."""

    number: int
    value: onnx_ir.Value
    index: int


Element: TypeAlias = "DimOf | ConstantElement | None"


def elements(value: onnx_ir.Value | None) -> list[Element] | None:
    """Return the elements of an integer scalar or vector, or None if not even their number is known.

    An element is a `ConstantElement`, a `DimOf`, or None if nothing is known about it. A vector of more than 16
    elements is data and gives None, and so does whatever may have two axes or more.
    """
    found = _listed(value)
    return found.items if found is not None else None


@dataclasses.dataclass(frozen=True)
class _List:
    """The elements of a vector, or the one element of a scalar."""

    items: list[Element]
    is_scalar: bool = False


def _listed(value: onnx_ir.Value | None) -> _List | None:
    if value is None:
        return None
    array = small_constant(value)
    if array is not None:
        if array.dtype.kind not in "iu" or array.size > _LONGEST or array.ndim > 1:
            return None
        return _List(
            [ConstantElement(int(item), value, index) for index, item in enumerate(array.reshape(-1))], not array.ndim
        )
    node = value.producer()
    found = _list_of(node) if node is not None and not node.domain else None
    if found is None and value.shape is not None and len(value.shape) <= 1:
        length = value.shape[0] if len(value.shape) else 1
        is_short = isinstance(length, int) and length <= _LONGEST
        return _List([None] * length, not len(value.shape)) if is_short and isinstance(length, int) else None
    return found


def _list_of(node: onnx_ir.Node) -> _List | None:
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Shape":
        if source is None or source.shape is None:
            return None
        ndim = len(source.shape)
        start, end = _bound(node, "start", 0, ndim), _bound(node, "end", ndim, ndim)
        return _List([DimOf(source, axis) for axis in range(start, end)])
    if node.op_type in _HANDED_ON:
        return _handed_on(node, _listed(source))
    if node.op_type == "Concat":
        parts = [_listed(item) for item in node.inputs]
        known = [part.items for part in parts if part is not None and not part.is_scalar]
        return _List([item for part in known for item in part]) if len(known) == len(parts) else None
    if node.op_type == "Gather":
        return _gathered(node)
    if node.op_type == "Slice":
        return _sliced(node)
    if node.op_type == "Where":
        return _chosen(node)
    return None


def _bound(node: onnx_ir.Node, name: str, default: int, ndim: int) -> int:
    attribute = node.attributes.get(name)
    position = attribute.as_int() if attribute is not None else default
    return max(0, min(ndim, position + ndim if position < 0 else position))


#: Operators that hand on all elements of a list in their order.
_HANDED_ON = frozenset({"Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"})


#: The dtypes that hold any length, with their limits; in others a Cast may make another number of it.
_HOLDS_LENGTHS = {onnx_ir.DataType.INT64.value: 2**63, onnx_ir.DataType.INT32.value: 2**31}


def _handed_on(node: onnx_ir.Node, source: _List | None) -> _List | None:
    """Return the elements that come out of an operator of `_HANDED_ON`; None if it may give them two axes."""
    if source is None or node.op_type == "Identity":
        return source
    if node.op_type == "Cast":
        return source if _keeps_integers(node, source) else None
    if node.op_type == "Reshape":
        target = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if target is None or target.size > 1 or (target.size == 0 and len(source.items) != 1):
            return None
        return _List(source.items, is_scalar=target.size == 0)
    axes = _axes(node)
    if node.op_type == "Unsqueeze":
        return _List(source.items) if source.is_scalar and axes in ([0], [-1]) else None
    is_single = not source.is_scalar and len(source.items) == 1 and axes in (None, [0], [-1])
    return _List(source.items, is_scalar=True) if is_single else None


def _keeps_integers(node: onnx_ir.Node, source: _List) -> bool:
    """Return whether a Cast keeps the numbers, all of which are integers: whether its dtype holds all of them."""
    attribute = node.attributes.get("to")
    if attribute is None or attribute.is_ref() or attribute.as_int() not in _HOLDS_LENGTHS:
        return False
    limit = _HOLDS_LENGTHS[attribute.as_int()]
    numbers = [item.number for item in source.items if isinstance(item, ConstantElement)]
    return all(-limit <= number < limit for number in numbers)


def _axes(node: onnx_ir.Node) -> list[int] | None:
    """Return the axes of a Squeeze, Unsqueeze or Slice, from its input or attribute; None if it gives none.

    Axes that are computed, or none at all, give an empty list, which is no known axis.
    """
    position = 3 if node.op_type == "Slice" else 1
    given = node.inputs[position] if len(node.inputs) > position else None
    if given is not None:
        array = small_constant(given)
        return [] if array is None else [int(item) for item in array.reshape(-1)]
    attribute = node.attributes.get("axes")
    return None if attribute is None else [] if attribute.is_ref() else [int(item) for item in attribute.as_ints()]


def _gathered(node: onnx_ir.Node) -> _List | None:
    table, index = _listed(node.inputs[0]), small_constant(node.inputs[1])
    if table is None or table.is_scalar or index is None or index.ndim > 1:
        return None
    positions, length = [int(item) for item in index.reshape(-1)], len(table.items)
    if not all(-length <= item < length for item in positions):
        return None
    return _List([table.items[item] for item in positions], is_scalar=not index.ndim)


def _sliced(node: onnx_ir.Node) -> _List | None:
    source = _listed(node.inputs[0])
    if source is None or source.is_scalar or is_disputed(node) or _axes(node) not in (None, [0], [-1]):
        return None
    if len(node.inputs) > 1:
        arrays = [small_constant(item) for item in (*node.inputs[1:3], *node.inputs[4:5]) if item is not None]
        bounds = [None if array is None or array.size != 1 else int(array.reshape(-1)[0]) for array in arrays]
    else:  # before opset 10, the bounds are attributes
        lists = [node.attributes[name].as_ints() for name in ("starts", "ends") if name in node.attributes]
        bounds = [int(items[0]) if len(items) == 1 else None for items in lists]
    if len(bounds) < 2 or None in bounds or 0 in bounds[2:]:
        return None
    return _List(source.items[slice(*bounds)])


def _chosen(node: onnx_ir.Node) -> _List | None:
    """Read Where(Equal(shape, -1), ones, shape), which exporters write for an Expand that keeps lengths given as -1."""
    compared = node.inputs[0].producer() if node.inputs[0] is not None else None
    if compared is None or compared.domain or compared.op_type != "Equal":
        return None
    vectors = [_listed(value) for value in (*compared.inputs, *node.inputs[1:])]
    known = [vector.items for vector in vectors if vector is not None and not vector.is_scalar]
    if len(known) != 4 or len({len(vector) for vector in known}) != 1:
        return None
    found: list[Element] = []
    for first, second, then, otherwise in zip(*known, strict=True):
        equal = _equal(first, second)
        found.append(None if equal is None else then if equal else otherwise)
    return _List(found)


def _equal(first: Element, second: Element) -> bool | None:
    """Return whether two elements are equal, or None if that is unknown; a length is never negative."""
    if isinstance(first, ConstantElement) and isinstance(second, ConstantElement):
        return first.number == second.number
    numbers = [item.number for item in (first, second) if isinstance(item, ConstantElement)]
    has_length = isinstance(first, DimOf) or isinstance(second, DimOf)
    return False if has_length and any(number < 0 for number in numbers) else None


def known_numbers(value: onnx_ir.Value | None) -> list[int] | None:
    """Return the numbers in an int64 scalar or vector if all are constants or lengths that shapes state, else None."""
    numbers = []
    for item in elements(value) or [None]:
        number = item.number if isinstance(item, ConstantElement) else None
        if isinstance(item, DimOf):
            dim = (dimensions(item.value) or [])[item.axis]
            number = dim if isinstance(dim, int) else None
        if number is None:
            return None
        numbers.append(number)
    return numbers


def target_lengths(target: onnx_ir.Value | None) -> list[Dimension] | None:
    """Return the elements of a target shape: numbers (0 and -1 too), symbols with their multiples, and None.

    The result is None if not even the number of elements is known.
    """
    found = elements(target)
    if found is None:
        return None
    dims = [_length_of(item) for item in found]
    node = target.producer() if target is not None else None
    if None not in found or node is None or node.domain or node.op_type != "Concat":
        return dims
    position = 0
    for part in node.inputs:
        count = len(elements(part) or [])
        if count == 1 and found[position] is None:
            dims[position] = single_length(part)
        position += count
    return dims


def _length_of(item: Element) -> Dimension:
    if isinstance(item, ConstantElement):
        return item.number
    return (dimensions(item.value) or [])[item.axis] if item is not None else None


def single_length(value: onnx_ir.Value | None) -> Dimension:
    """Return one integer element as a length: a number, a symbol, or a multiple such as `6*batch`, as torch writes it.

    The result is None if the element is neither a constant, the length of an axis, nor computed from one.
    """
    node = value.producer() if value is not None else None
    found = elements(value)
    if found is not None and len(found) == 1 and found[0] is not None:
        return _length_of(found[0])
    if node is None or node.domain or value is None or value.dtype not in {onnx_ir.DataType.INT64, None}:
        return None
    if node.op_type in _HANDED_ON and _handed_on(node, _listed(node.inputs[0])) is not None:
        return single_length(node.inputs[0])
    if node.op_type in {"Mul", "Div"}:
        first, second = (single_length(item) for item in node.inputs)
        return multiple(first, second) if node.op_type == "Mul" else fraction(first, second)
    return None
