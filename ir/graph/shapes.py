"""Find shapes without running anything: fill in missing types, and read integer vectors element by element.

Exporters compute reshape targets in the graph (`Concat(batch, seq, 6, 12)`); `elements` reads such a vector back.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.builder import MICROSOFT, infer_types
from passopt.ir.graph.functions import DOMAIN
from passopt.ir.graph.run_context import RunContext
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
Dimension: TypeAlias = "int | str | None"


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
    if source is None or source.is_scalar or _axes(node) not in (None, [0], [-1]):
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


def dimensions(value: onnx_ir.Value) -> list[Dimension] | None:
    """Return the shape as a list of integers, symbol names and None (unknown), or None if the axes are not known."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else _sorted_sum(dim.value) for dim in value.shape.dims]


def _sorted_sum(symbol: str | None) -> str | None:
    """Return a sum of symbols in alphabetical order: exporters write `seq+past` or `past+seq` for the same length."""
    if symbol is None or "+" not in symbol or "(" in symbol:
        return symbol
    return "+".join(sorted(part.strip() for part in symbol.split("+")))


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
    if wanted(node.outputs[0]):
        _complete_target(node)


def _is_complete(value: onnx_ir.Value) -> bool:
    if value.type is None or value.shape is None:
        return False
    return all(isinstance(dim, int) or dim.value is not None for dim in value.shape.dims)


def merged_shapes(stated: onnx_ir.Shape | None, inferred: onnx_ir.Shape | None) -> onnx_ir.Shape | None:
    """Return `stated`, with the lengths that it leaves open taken from `inferred`."""
    if stated is None or inferred is None or len(stated) != len(inferred):
        return stated or inferred
    pairs = zip(stated.dims, inferred.dims, strict=True)
    return onnx_ir.Shape([x if isinstance(x, int) or x.value is not None else y for x, y in pairs])


def _complete_target(node: onnx_ir.Node) -> None:
    """Set the output shape of a Reshape, Expand or Slice from its target or axes, where inference gave up on them."""
    if node.op_type == "Slice":
        _complete_slice(node)
        return
    if node.op_type not in {"Reshape", "Expand"} or _is_complete(node.outputs[0]):
        return
    target, source = target_lengths(node.inputs[1]), node.inputs[0]
    if target is None or source is None:
        return
    before, output = dimensions(source), node.outputs[0]
    if node.op_type == "Reshape":
        keeps_zero = "allowzero" in node.attributes and bool(node.attributes["allowzero"].as_int())
        dims = [
            dim if keeps_zero and dim == 0 else _reshaped(target, before, axis, is_sure=keeps_zero)
            for axis, dim in enumerate(target)
        ]
        if target.count(-1) == 1:
            dims[target.index(-1)] = _remaining(before, dims)
    else:
        if before is None or len(before) > len(target):
            return
        aligned = [1] * (len(target) - len(before)) + before
        dims = [_expanded(dim, other) for dim, other in zip(target, aligned, strict=True)]
    output.shape = merged_shapes(output.shape, onnx_ir.Shape(dims)) if output.shape is not None else onnx_ir.Shape(dims)


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
    (one, symbols), (other, wanted) = map(_factors, others)
    return one != other and sorted(symbols) == sorted(wanted)


def is_zero_with(length: str, dims: Sequence[Dimension]) -> bool:
    """Return whether the product of `dims` is surely 0 wherever a symbolic length is."""
    return bool(set(_factors([length])[1]) & set(_factors(dims)[1]))


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
        return _multiple(first, second) if node.op_type == "Mul" else _fraction(first, second)
    return None


def _multiple(first: Dimension, second: Dimension) -> Dimension:
    if isinstance(first, int) and isinstance(second, int):
        return first * second if first > 0 and second > 0 else None  # 0 and -1 have a meaning of their own in targets
    symbol, number = (first, second) if isinstance(first, str) else (second, first)
    if not isinstance(symbol, str) or not isinstance(number, int) or number < 1:
        return None
    if number == 1:
        return symbol
    return f"{number}*{symbol}" if symbol.isidentifier() else None


def _fraction(first: Dimension, second: Dimension) -> Dimension:
    number, symbols = _factors([first])
    if not isinstance(second, int) or second < 1 or number % second or len(symbols) != 1:
        return None
    return symbols[0] if number == second else f"{number // second}*{symbols[0]}"


def _factors(dims: Sequence[Dimension]) -> tuple[int, list[str]]:
    """Return the product of the numbers, and the symbols; `6*batch` counts as both."""
    number, symbols = 1, []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        elif dim is not None:
            factor, _, symbol = dim.partition("*")
            is_multiple = factor.isdigit() and symbol.isidentifier()  # The sum 2*past+seq is not a multiple.
            number *= int(factor) if is_multiple else 1
            symbols.append(symbol if is_multiple else dim)
    return number, symbols


def _remaining(before: list[Dimension] | None, after: list[Dimension]) -> Dimension:
    """Return the length that a reshape infers for -1: what remains of the number of elements, or None if unknown.

    A symbol stands for the same length everywhere.
    """
    if before is None or None in before or after.count(None) != 1:
        return None
    (total, symbols), (known, others) = _factors(before), _factors(after)
    left = collections.Counter(symbols)
    left.subtract(others)
    names = [name for name, count in left.items() if count]
    if any(left[name] != 1 for name in names) or len(names) > 1 or not known or total % known:
        return None
    return _multiple(total // known, names[0]) if names and total != known else names[0] if names else total // known


def same(found: Sequence[Dimension], wanted: Sequence[Dimension]) -> bool:
    """Return whether two shapes are known to be the same: as many axes, and each an equal number or an equal symbol.

    Symbols of different names may be different lengths, and one of them may be 1, which broadcasts. So may a length
    that is unknown, and two unknown lengths are not the same either.
    """
    return len(found) == len(wanted) and all(
        one is not None and one == other for one, other in zip(found, wanted, strict=True)
    )


def may_be_same(found: Sequence[Dimension], wanted: Sequence[Dimension]) -> bool:
    """Return whether nothing denies that two shapes are the same one; this proves nothing.

    It is denied if they have different numbers of axes, if two lengths are different numbers, or if one length is 1 and
    the other has a name, since that would broadcast.
    """
    if len(found) != len(wanted):
        return False
    pairs = [{one, other} - {None} for one, other in zip(found, wanted, strict=True)]
    return all(len(pair) < 2 or (1 not in pair and not all(isinstance(dim, int) for dim in pair)) for pair in pairs)
