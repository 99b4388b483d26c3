"""Replace a stored ALiBi bias of one row per head by slopes times positions (the dematerialize-alibi-row pass)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.attention.dematerialize_alibi import equal_bias, single
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass

#: Bytes of the largest constant that is read: 128 heads and 128 Ki positions in fp32.
_LARGEST = 64 << 20


@dataclasses.dataclass(frozen=True)
class DematerializeAlibiRow(RewritePass):
    """Compute ALiBi's bias from one slope per head; MPT stores a row per head that is as long as the longest sequence.

    Before: ``bias = Slice(row, longest − total :, axis=-1)``, row [heads, 1, longest] a constant
    After:  ``bias = slopes · Range(1 − total, 1)``, in fp32, slopes [heads, 1, 1]
    To be sure that the constant is slope · (column − last column), the pass reads it. The formula also serves more
    positions than the constant has.
    """

    name = "dematerialize-alibi-row"
    accuracy = REASSOCIATED

    def pattern(self, op: Any, row: Any, start: Any, stop: Any, axis: Any, first: Any, rows_axis: Any) -> Any:
        """Match a row of which the last columns are taken, perhaps after a cut along another axis."""
        steps = op.any_of("steps", ones=[1], absent=None)
        rows = op.any_of("rows", cut=op.Slice(row, first, op.anything(), rows_axis, steps), whole=row)
        return op.Slice(rows, start, stop, axis, steps)

    def rewrite(
        self, op: Any, row: Any, start: Any, stop: Any, axis: Any, first: Any = None, rows_axis: Any = None
    ) -> Any:
        expression = op.weight(row)
        _check_shape(row.name, expression)
        *leading, _, length = expression.shape
        # On an axis of length 1, a cut from a computed start takes its only row, or leaves nothing to add.
        if first is not None and (small_constant(first) is not None or _length_along(op, row, rows_axis) != 1):
            raise Decline(f"cuts {row.name} along another axis before it takes its columns")
        if _axis(op, axis) % len(expression.shape) != len(expression.shape) - 1:
            raise Decline(f"takes a part of {row.name} along another axis than the columns")
        if op.number(stop) < length:
            raise Decline(f"takes the columns of {row.name} up to {op.constant(stop).tolist()}, not to the end")
        if not _counts_from_front(start):
            raise Decline(f"{start.name}, where the columns of {row.name} begin, may be negative: counted from the end")
        slopes = op.initializer("alibi.slopes", _slopes(row.name, expression).reshape(*leading, 1, 1))
        known = small_constant(start)
        begin = single(op, start, None if known is None else _position(int(known.reshape(-1)[0]), length))
        columns = op.Range(op.Sub(begin, np.int64(length - 1)), np.int64(1), np.int64(1))
        bias = op.Mul(slopes, op.Cast(columns, to=onnx_ir.DataType.FLOAT.value))
        return bias if row.dtype == onnx_ir.DataType.FLOAT else op.Cast(bias, to=row.dtype.value)


def _check_shape(name: str | None, row: Expression) -> None:
    """Raise Decline unless the constant is floating [heads, 1, longest], at most `_LARGEST` bytes."""
    shape = row.shape
    fits = len(shape) >= 3 and shape[-2] == 1 and shape[-1] >= 2 and all(dim == 1 for dim in shape[:-3])
    if not fits or row.dtype not in FLOATS or row.nbytes > _LARGEST:
        raise Decline(f"{name} is {row.dtype.name}{list(shape)}, not floating [heads, 1, longest]")


def _axis(op: Any, axis: onnx_ir.Value) -> int:
    return int(op.number(axis))


def _length_along(op: Any, value: onnx_ir.Value, axis: onnx_ir.Value) -> object:
    return (dimensions(value) or [])[_axis(op, axis)]


def _counts_from_front(start: onnx_ir.Value | None) -> bool:
    """Return True if the start of a Slice never counts from the end of the axis.

    That holds for max(0, …), and for longest − length, because the row is as long as the longest sequence. A constant
    passes too: the caller resolves it.
    """
    if small_constant(start) is not None:
        return True
    node = start.producer() if start is not None else None
    if node is None or node.domain:
        return False
    if node.op_type in {"Reshape", "Squeeze", "Unsqueeze", "Identity"}:
        return _counts_from_front(node.inputs[0])
    known = [small_constant(item) for item in node.inputs]
    if node.op_type == "Max":
        return any(item is not None and item.size == 1 and item.min() >= 0 for item in known)
    return node.op_type == "Sub" and known[0] is not None and known[0].size == 1 and known[0].min() >= 0


def _position(start: int, length: int) -> int:
    """Return the position that a constant start of a Slice means on an axis of `length`.

    A negative start counts from the end.
    """
    return max(0, min(length, start + length if start < 0 else start))


def _slopes(name: str | None, row: Expression) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the slopes [heads] in fp32.

    Raises Decline that names the first element in which the row is not slope · (column − last column).
    """
    length = row.shape[-1]
    with Evaluator() as evaluator:
        values = evaluator.array(row).reshape(-1, length)
    columns = np.arange(1 - length, 1, dtype=np.float32)
    formula = np.asarray(alibi_slopes(len(values)), np.float32)
    found = np.asarray(values[:, 0], np.float32) / columns[0]
    # A 16-bit row holds rounded slopes. If rounding the formula's slopes gives the same, those are the exact ones.
    is_formula = np.array_equal((formula * columns[0]).astype(values.dtype), values[:, 0])
    slopes = formula if is_formula else found
    with np.errstate(over="ignore", invalid="ignore"):  # if this is no ALiBi bias, the slope may be any number
        expected = (slopes[:, None] * columns).astype(values.dtype)
    wrong = np.argwhere(~equal_bias(values, expected))
    if len(wrong):
        head, column = (int(item) for item in wrong[0])
        raise Decline(
            f"{name}[{head}, 0, {column}] is {values[head, column]}, an ALiBi bias of slope {slopes[head]} "
            f"has {expected[head, column]} there"
        )
    return slopes
