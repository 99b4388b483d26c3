"""Bring what is added to attention scores into the form of the fused operators: ALiBi apart, masked places finite.

For a row whose scores are all the lowest number or -inf, Attention gives 0, but for a row of lowest numbers softmax
gives the mean of the values. So masked places are lifted to half of the lowest number, which masks as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.shapes.dimensions import Dimension, dimensions, same
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant
from passopt.passes.framework.base import Decline

_FLOAT = onnx_ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """An ALiBi bias: `slopes` [h, 1, 1] in fp32 times `positions` [1 or b, t] in fp32."""

    slopes: onnx_ir.Value
    positions: onnx_ir.Value


def split_alibi(op: Any, terms: Sequence[onnx_ir.Value], heads: int) -> tuple[AlibiBias | None, list[onnx_ir.Value]]:
    """Find the ALiBi bias among the terms that are added to the scores; return it and the other terms.

    Without an ALiBi bias, returns None and the terms as they are.
    """
    addends = [addend for term in terms for addend in _addends(term)]
    for addend in addends:
        found = _slopes_times_positions(op, addend, heads)
        if found is not None:
            return found, [other for other in addends if other is not addend]
    return None, list(terms)


@dataclasses.dataclass(frozen=True)
class Extent:
    """The lengths that a mask must have: `rows` of the queries and `columns` of all keys, known or computed.

    Attributes:
        rows: The number of queries, a symbol, or None.
        columns: The number of keys with those of the cache, a symbol, or None.
        lengths: Makes both as one vector of two elements.
    """

    rows: Dimension
    columns: Dimension
    lengths: Callable[[], onnx_ir.Value]


def alibi_mask(op: Any, terms: Sequence[onnx_ir.Value], extent: Extent) -> onnx_ir.Value:
    """Return the terms beside an ALiBi bias as one mask [1 or b, 1, q, t] in fp32.

    Raises Decline if there are none, or if one of them differs between heads.
    """
    for term in terms:
        dims = dimensions(term) or []
        if len(dims) >= 3 and dims[-3] != 1:
            raise Decline(f"beside the ALiBi bias, {term.name} {dims} differs between heads")
    mask = _sum(op, terms, _FLOAT)
    if mask is None:
        raise Decline("has an ALiBi bias and no mask")
    missing = 4 - len(dimensions(mask) or [])
    if missing:
        mask = op.Unsqueeze(mask, list(range(missing)))
    return _of_extent(op, mask, extent)


def visible_mask(op: Any, terms: Sequence[onnx_ir.Value], extent: Extent, *, floored: bool) -> onnx_ir.Value | None:
    """Return the terms as one mask for Attention; None if there are no terms.

    Masked places are lifted to half of the lowest number. With `floored`, -inf is lifted like the lowest number,
    because the model itself lifts its scores to that; otherwise -inf stays.
    """
    mask = summed(op, terms)
    if mask is None:
        return None
    finite = op.Max(mask, _half_oflowest(mask))
    if not floored and not _is_finite(mask):
        finite = op.Where(op.IsInf(mask), mask, finite)
    return _of_extent(op, finite, extent)


def chosen(
    op: Any,
    condition: onnx_ir.Value,
    low: float,
    inner: onnx_ir.Value | None,
    *,
    shown: bool,
    query: onnx_ir.Value,
) -> onnx_ir.Value:
    """Return what to add to scores that are kept where `condition` is `shown`, and are `low` elsewhere.

    What was added to the scores that are kept is `inner`. A finite `low` is added as the lowest number of all. Put in
    place of a score, -1e9 hides it; added to the score, it might not.
    """
    kind = inner.dtype.numpy() if inner is not None and inner.dtype is not None else np.dtype(np.float32)
    number = low if np.isneginf(low) else lowest(query if inner is None else inner)
    kept, masked = np.zeros((), kind) if inner is None else inner, np.asarray(number, kind)
    mask: onnx_ir.Value = op.Where(condition, kept, masked) if shown else op.Where(condition, masked, kept)
    return mask


def summed(op: Any, terms: Sequence[onnx_ir.Value]) -> onnx_ir.Value | None:
    """Return the sum of all terms, in their dtype or in fp32 if they have several; None if there are no terms."""
    kinds = {term.dtype for term in terms}
    return _sum(op, terms, kinds.pop() if len(kinds) == 1 else _FLOAT)


def _addends(value: onnx_ir.Value) -> Iterator[onnx_ir.Value]:
    """Yield the values whose sum this is, each broadcast from the right.

    The search goes through casts and leading axes of length 1, which do not matter.
    """
    node = value.producer()
    if node is not None and not node.domain:
        if node.op_type == "Add":
            for item in node.inputs:
                if item is not None:
                    yield from _addends(item)
            return
        source = node.inputs[0] if node.inputs else None
        passes_on = node.op_type == "Cast" or (node.op_type == "Unsqueeze" and _leads(node))
        if passes_on and source is not None and _is_sum(source):
            yield from _addends(source)
            return
    yield value


def _is_sum(value: onnx_ir.Value) -> bool:
    """Return True if the value may be a sum, or a part of one, in a floating dtype."""
    node = value.producer()
    return node is not None and node.op_type in {"Add", "Unsqueeze", "Cast", "Mul"} and value.dtype in MODEL_FLOATS


def _leads(node: onnx_ir.Node) -> bool:
    """Return True for an Unsqueeze that adds its axes in front."""
    axes = small_constant(node.inputs[1])
    return axes is not None and sorted(axes.reshape(-1).tolist()) == list(range(axes.size))


def _slopes_times_positions(op: Any, value: onnx_ir.Value, heads: int) -> AlibiBias | None:
    """Return the ALiBi bias that `value` is, if it is slopes · positions, [.., h, 1, t]; else None.

    It may also be [b, h, t] that got its axis for the rows afterwards.
    """
    node, rows = value.producer(), True
    if node is not None and node.op_type in {"Unsqueeze", "Reshape"} and not _leads(node):
        inner, dims = node.inputs[0], dimensions(value) or []
        before = dimensions(inner) or [] if inner is not None else []
        if inner is None or len(dims) != 4 or dims[2] != 1 or not same(before, [dims[0], dims[1], dims[3]]):
            return None
        node, rows = inner.producer(), False
    if node is None or node.op_type != "Mul":
        return None
    for slopes, positions in (node.inputs, reversed(node.inputs)):
        if slopes is None or positions is None or constant_tensor(slopes) is None:
            continue
        shape, wanted = dimensions(slopes) or [], [heads, 1, 1] if rows else [heads, 1]
        if shape[-len(wanted) :] != wanted or any(dim != 1 for dim in shape[: -len(wanted)]):
            continue
        line = _line(op, positions, rows)
        if line is not None:
            return AlibiBias(_column(op, slopes, heads), line)
    return None


def _line(op: Any, positions: onnx_ir.Value, rows: bool) -> onnx_ir.Value | None:
    """Return positions as [1 or b, t] in fp32; None if they differ between heads or rows."""
    dims = dimensions(positions)
    if not dims:
        return None
    between = dims[-3 if rows else -2 : -1]
    if any(dim != 1 for dim in between) or len(dims) > (4 if rows else 3) or dims[-1] == 1:
        return None
    line = positions
    if between:
        first = len(dims) - 1 - len(between)
        line = op.Squeeze(line, list(range(first, len(dims) - 1)))
    if len(dims) - len(between) == 1:
        line = op.Unsqueeze(line, [0])
    return line if line.dtype == _FLOAT else op.Cast(line, to=_FLOAT.value)


def _column(op: Any, slopes: onnx_ir.Value, heads: int) -> onnx_ir.Value:
    """Return slopes as a constant [h, 1, 1] in fp32."""
    if dimensions(slopes) == [heads, 1, 1] and slopes.dtype == _FLOAT:
        return slopes

    def make() -> onnx_ir.Value:
        array = op.constant(slopes).reshape(heads, 1, 1).astype(np.float32)
        made: onnx_ir.Value = op.initializer(f"{slopes.name}.column", array)
        return made

    found: onnx_ir.Value = op.shared(("slopes", slopes.name), make)
    return found


def _sum(op: Any, terms: Sequence[onnx_ir.Value], dtype: onnx_ir.DataType | None) -> onnx_ir.Value | None:
    """Return the sum of all terms in `dtype`; None if there are no terms."""
    total = None
    for term in terms:
        wide = term if term.dtype == dtype or dtype is None else op.Cast(term, to=dtype.value)
        total = wide if total is None else op.Add(total, wide)
    return total


def _of_extent(op: Any, mask: onnx_ir.Value, extent: Extent) -> onnx_ir.Value:
    """Expand the mask to a row for every query and a column for every key: Attention broadcasts neither.

    A length of another name may be 1 at run time, so only equal lengths are left alone.
    """
    dims = dimensions(mask)
    if dims is None:
        raise Decline(f"the axes of the mask {mask.name} are unknown")
    if len(dims) > 4:
        raise Decline(f"the mask {mask.name} {dims} has more than four axes")
    wanted = [extent.rows, extent.columns]
    if len(dims) >= 2 and all(here is not None and here == there for here, there in zip(dims[-2:], wanted)):
        return mask
    lengths = extent.lengths()
    if len(dims) > 2:
        lengths = op.Concat([1] * (len(dims) - 2), lengths, axis=0)
    expanded: onnx_ir.Value = op.Expand(mask, lengths)
    return expanded


def lowest(value: onnx_ir.Value) -> float:
    """Return the lowest number of the dtype of `value`."""
    assert value.dtype is not None
    limits: Any = ml_dtypes.finfo(value.dtype.numpy())  # type: ignore[no-untyped-call]
    return float(limits.min)


def _half_oflowest(mask: onnx_ir.Value) -> np.ndarray[Any, np.dtype[Any]]:
    assert mask.dtype is not None
    return np.asarray(lowest(mask) / 2, mask.dtype.numpy())


def _is_finite(mask: onnx_ir.Value) -> bool:
    """Return True for a choice between finite constants, perhaps moved about.

    Nothing was added to it that could overflow to -inf.
    """
    node = mask.producer()
    if node is None or node.domain:
        return False
    if node.op_type in {"Unsqueeze", "Expand", "Slice", "Squeeze", "Reshape", "Identity"}:
        return node.inputs[0] is not None and _is_finite(node.inputs[0])
    if node.op_type != "Where":
        return False
    numbers = [small_constant(item) for item in node.inputs[1:]]
    return all(item is not None and np.isfinite(item).all() for item in numbers)
