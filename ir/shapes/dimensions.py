"""Compare and compute shapes as lists of numbers, symbols and None; what is not proven is unknown."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TypeAlias

import onnx_ir

Dimension: TypeAlias = "int | str | None"


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


def merged_shapes(stated: onnx_ir.Shape | None, inferred: onnx_ir.Shape | None) -> onnx_ir.Shape | None:
    """Return `stated`, with the lengths that it leaves open taken from `inferred`."""
    if stated is None or inferred is None or len(stated) != len(inferred):
        return stated or inferred
    pairs = zip(stated.dims, inferred.dims, strict=True)
    return onnx_ir.Shape([x if isinstance(x, int) or x.value is not None else y for x, y in pairs])


def clash(one: onnx_ir.Shape | None, other: onnx_ir.Shape | None) -> bool:
    """Return whether both shapes are known and cannot be equal.

    They cannot be equal if numbers differ, or if the same symbols stand in another order.
    """
    if one is None or other is None:
        return False
    if len(one) != len(other):
        return True
    pairs = list(zip(one.dims, other.dims, strict=True))
    if any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs):
        return True
    symbols = [(x.value, y.value) for x, y in pairs if not isinstance(x, int) and not isinstance(y, int)]
    moved = [(x, y) for x, y in symbols if x != y]
    return (
        bool(moved)
        and None not in {x for pair in moved for x in pair}
        and {x for x, _ in moved} == {y for _, y in moved}
    )


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


def is_zero_with(length: str, dims: Sequence[Dimension]) -> bool:
    """Return whether the product of `dims` is surely 0 wherever a symbolic length is."""
    return bool(set(factors([length])[1]) & set(factors(dims)[1]))


def factors(dims: Sequence[Dimension]) -> tuple[int, list[str]]:
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


def multiple(first: Dimension, second: Dimension) -> Dimension:
    """Return the product of two lengths, of which one is a symbol at most; None if it has no name."""
    if isinstance(first, int) and isinstance(second, int):
        return first * second if first > 0 and second > 0 else None  # 0 and -1 have a meaning of their own in targets
    symbol, number = (first, second) if isinstance(first, str) else (second, first)
    if not isinstance(symbol, str) or not isinstance(number, int) or number < 1:
        return None
    if number == 1:
        return symbol
    return f"{number}*{symbol}" if symbol.isidentifier() else None


def fraction(first: Dimension, second: Dimension) -> Dimension:
    """Return a multiple of a symbol divided by a number that divides it; None for anything else."""
    number, symbols = factors([first])
    if not isinstance(second, int) or second < 1 or number % second or len(symbols) != 1:
        return None
    return symbols[0] if number == second else f"{number // second}*{symbols[0]}"


def remaining(before: list[Dimension] | None, after: list[Dimension]) -> Dimension:
    """Return the length that a reshape infers for -1: what remains of the number of elements, or None if unknown.

    A symbol stands for the same length everywhere.
    """
    if before is None or None in before or after.count(None) != 1:
        return None
    (total, symbols), (known, others) = factors(before), factors(after)
    left = collections.Counter(symbols)
    left.subtract(others)
    names = [name for name, count in left.items() if count]
    if any(left[name] != 1 for name in names) or len(names) > 1 or not known or total % known:
        return None
    return multiple(total // known, names[0]) if names and total != known else names[0] if names else total // known
