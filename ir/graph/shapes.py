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
    """Return the elements of an int64 scalar or vector, or None if not even their number is known.

    An element is a `ConstantElement`, a `DimOf`, or None if nothing is known about it. A vector of more than 16
    elements is data and gives None.
    """
    if value is None:
        return None
    array = small_constant(value)
    if array is not None:
        if array.dtype.kind not in "iu" or array.size > _LONGEST:
            return None
        return [ConstantElement(int(item), value, index) for index, item in enumerate(array.reshape(-1))]
    node = value.producer()
    found = _elements_of(node) if node is not None and not node.domain else None
    if found is None and value.shape is not None and len(value.shape) <= 1:
        length = value.shape[0] if len(value.shape) else 1
        found = [None] * length if isinstance(length, int) and length <= _LONGEST else None
    return found


def _elements_of(node: onnx_ir.Node) -> list[Element] | None:
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Shape":
        if source is None or source.shape is None:
            return None
        ndim = len(source.shape)
        start, end = _bound(node, "start", 0, ndim), _bound(node, "end", ndim, ndim)
        return [DimOf(source, axis) for axis in range(start, end)]
    if node.op_type in {"Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"}:
        return elements(source)
    if node.op_type == "Concat":
        parts = [elements(item) for item in node.inputs]
        known = [part for part in parts if part is not None]
        return [item for part in known for item in part] if len(known) == len(parts) else None
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


def _gathered(node: onnx_ir.Node) -> list[Element] | None:
    table, index = elements(node.inputs[0]), small_constant(node.inputs[1])
    if table is None or index is None:
        return None
    positions = [int(item) for item in index.reshape(-1)]
    return [table[item] for item in positions] if all(-len(table) <= item < len(table) for item in positions) else None


def _sliced(node: onnx_ir.Node) -> list[Element] | None:
    source = elements(node.inputs[0])
    bounds = [small_constant(item) for item in node.inputs[1:]]
    if source is None or any(item is None or item.size != 1 for item in bounds):
        return None
    numbers = [int(item.reshape(-1)[0]) for item in bounds if item is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return source[numbers[0] : numbers[1] : step]


def _chosen(node: onnx_ir.Node) -> list[Element] | None:
    """Read Where(Equal(shape, -1), ones, shape), which exporters write for an Expand that keeps lengths given as -1."""
    compared = node.inputs[0].producer() if node.inputs[0] is not None else None
    if compared is None or compared.op_type != "Equal":
        return None
    vectors = [elements(value) for value in (*compared.inputs, *node.inputs[1:])]
    known = [vector for vector in vectors if vector is not None]
    if len(known) != 4 or len({len(vector) for vector in known}) != 1:
        return None
    found: list[Element] = []
    for first, second, then, otherwise in zip(*known, strict=True):
        equal = _equal(first, second)
        found.append(None if equal is None else then if equal else otherwise)
    return found


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
    target, source = elements(node.inputs[1]), node.inputs[0]
    if target is None or source is None:
        return
    keeps_zero = "allowzero" in node.attributes and bool(node.attributes["allowzero"].as_int())
    dims = [_dimension(item, source, position, keeps_zero=keeps_zero) for position, item in enumerate(target)]
    if None in target:
        symbols = _symbols_of_parts(node.inputs[1])
        dims = [
            symbol if item is None else dim for item, dim, symbol in zip(target, dims, symbols or dims, strict=True)
        ]
    inferred = [index for index, item in enumerate(target) if isinstance(item, ConstantElement) and item.number == -1]
    if node.op_type == "Reshape" and len(inferred) == 1:
        dims[inferred[0]] = _remaining(dimensions(source), dims)
    if node.op_type == "Expand":
        if source.shape is None or len(source.shape) != len(dims):
            return
        dims = [_expanded(dim, other) for dim, other in zip(dims, dimensions(source) or [], strict=True)]
    output = node.outputs[0]
    output.shape = merged_shapes(output.shape, onnx_ir.Shape(dims)) if output.shape is not None else onnx_ir.Shape(dims)


def _expanded(target: Dimension, length: Dimension) -> Dimension:
    """Return the length of an axis of `length` after Expand to `target`.

    Either of two symbols may be 1 and broadcast, so their result is unknown. If `length` is unknown, the result is
    `target`, because exporters expand to the length that comes out.
    """
    if target == length or length in (1, None):
        return target
    if target == 1 or isinstance(length, int):
        return target if isinstance(target, int) and target != 1 else length
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


def _symbols_of_parts(target: onnx_ir.Value | None) -> list[Dimension] | None:
    """Return the elements of a Concat as lengths, including multiples and fractions of a length; None if unreadable."""
    node = target.producer() if target is not None else None
    if node is None or node.op_type != "Concat":
        return None
    found: list[Dimension] = []
    for part in node.inputs:
        known = elements(part)
        if known is None:
            return None
        found += [single_length(part)] if known == [None] else [None] * len(known)
    return found


def single_length(value: onnx_ir.Value | None) -> Dimension:
    """Return one int64 element as a length: a number, a symbol, or a multiple such as `6*batch`, as torch writes it.

    The result is None if the element is neither a constant, the length of an axis, nor computed from one.
    """
    node = value.producer() if value is not None else None
    found = elements(value)
    if found is not None and len(found) == 1 and found[0] is not None:
        item = found[0]
        return item.number if isinstance(item, ConstantElement) else (dimensions(item.value) or [])[item.axis]
    if node is None or node.domain:
        return None
    if node.op_type in {"Unsqueeze", "Squeeze", "Reshape", "Cast"}:
        return single_length(node.inputs[0])
    if node.op_type in {"Mul", "Div"}:
        first, second = (single_length(item) for item in node.inputs)
        return _multiple(first, second) if node.op_type == "Mul" else _fraction(first, second)
    return None


def _multiple(first: Dimension, second: Dimension) -> Dimension:
    if isinstance(first, int) and isinstance(second, int):
        return first * second
    symbol, number = (first, second) if isinstance(first, str) else (second, first)
    if not isinstance(symbol, str) or not isinstance(number, int) or number < 1:
        return None
    if number == 1:
        return symbol
    return f"{number}*{symbol}" if symbol.isidentifier() else None


def _fraction(first: Dimension, second: Dimension) -> Dimension:
    number, symbols = _factors([first])
    if not isinstance(second, int) or not second or number % second or len(symbols) != 1:
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


def _dimension(item: Element, source: onnx_ir.Value, position: int, *, keeps_zero: bool) -> Dimension:
    if isinstance(item, ConstantElement):
        if item.number == 0 and source.shape is not None and not keeps_zero:
            return (dimensions(source) or [])[position]
        return item.number if item.number > 0 else None
    if isinstance(item, DimOf):
        return (dimensions(item.value) or [])[item.axis]
    return None


def fits(found: Sequence[Dimension], wanted: Sequence[Dimension]) -> bool:
    """Return whether two shapes may be the same one.

    They may not if they have different numbers of axes, if two lengths are different numbers, or if one length is 1 and
    the other is not, since that would broadcast. An exporter may leave a length out or make up a name for it, so
    otherwise None and symbols fit any length.
    """
    if len(found) != len(wanted):
        return False
    pairs = [{one, other} - {None} for one, other in zip(found, wanted, strict=True)]
    return all(len(pair) < 2 or (1 not in pair and not all(isinstance(dim, int) for dim in pair)) for pair in pairs)
