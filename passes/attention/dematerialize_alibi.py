"""Replace a baked ALiBi mask, a large constant, by slopes times positions (the dematerialize-alibi pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.shapes.elements import DimOf, elements
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

#: How many rows of each head are compared with the formula; a mask with no more rows is compared whole.
_SAMPLED_ROWS = 128


@dataclasses.dataclass(frozen=True)
class DematerializeAlibi(RewritePass):
    """Compute ALiBi's bias from one slope per head: a baked mask is gigabytes, which cannot be split by heads.

    Before: ``bias = Slice(Slice(mask, past:total, axis=1), 0:total, axis=2)``, mask [heads, n, n] a constant
    After:  ``bias = slopes · Range(total) + Where(column > row, -inf, 0)``, in fp32, slopes [heads, 1, 1]
    The bounds of the slices must be constants, lengths of graph inputs or sums of these. The formula also serves inputs
    of more positions than the mask has; with the mask, such an input fails where the mask is added to the scores.
    To be sure that the constant is an ALiBi mask, the pass reads up to 128 rows per head of it.
    """

    name = "dematerialize-alibi"
    accuracy = REASSOCIATED

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [(self.rows_first, self.rewrite), (self.columns_first, self.rewrite)]

    def rows_first(self, op: Any, mask: Any, start: Any, stop: Any, width: Any) -> Any:
        """Match a mask that is cut along its rows first, then along its columns."""
        steps = op.any_of("steps", ones=[1], absent=None)
        return op.Slice(op.Slice(mask, start, stop, [1], steps), [0], width, [2], steps)

    def columns_first(self, op: Any, mask: Any, start: Any, stop: Any, width: Any) -> Any:
        """Match a mask that is cut along its columns first, then along its rows."""
        steps = op.any_of("steps", ones=[1], absent=None)
        return op.Slice(op.Slice(mask, [0], width, [2], steps), start, stop, [1], steps)

    def rewrite(self, op: Rewriter, mask: Any, start: Any, stop: Any, width: Any) -> Any:
        expression = op.weight(mask)
        _, *square = expression.shape
        if len(square) != 2 or square[0] != square[1] or expression.dtype not in FLOATS:
            raise Decline(f"{mask.name} is {expression.dtype.name}{list(expression.shape)}, not floating [heads, n, n]")
        bounds = {value: _bound(value, square[0]) for value in (start, stop, width)}
        slopes = op.initializer("alibi.slopes", _slopes(mask.name, expression)[:, None, None])
        first, last = single(op, start, bounds[start]), single(op, width, bounds[width])
        columns = op.Range(np.int64(0), last, np.int64(1))
        rows = op.Range(first, last if stop is width else single(op, stop, bounds[stop]), np.int64(1))
        bias = op.Mul(slopes, op.Cast(columns, to=onnx_ir.DataType.FLOAT.value))
        later = op.Greater(op.Unsqueeze(columns, [0]), op.Unsqueeze(rows, [1]))
        causal = op.Where(later, np.float32(-np.inf), np.float32(0))
        result = op.Add(bias, causal)
        return result if mask.dtype == onnx_ir.DataType.FLOAT else op.Cast(result, to=mask.dtype.value)


def _bound(vector: onnx_ir.Value, length: int) -> int | None:
    """Resolve a bound of a Slice on an axis of `length`: return its position, or None if it is a run-time length.

    Raises Decline for a bound that is neither a constant nor the length of a graph input: Slice counts negative bounds
    from the end and clamps them, but Range would take them as they are.
    """
    constant = small_constant(vector)
    if constant is None:
        if vector.dtype != onnx_ir.DataType.INT64 or not _is_length(vector):
            raise Decline(f"the bound {vector.name} of the slice is neither a constant nor the length of a graph input")
        return None
    position = int(constant.reshape(-1)[0])
    return max(0, min(length, position + length if position < 0 else position))


def _is_length(value: onnx_ir.Value | None) -> bool:
    """Return True for the length of an axis of a graph input, and for a sum of such lengths."""
    node = value.producer() if value is not None else None
    if node is not None and not node.domain:
        if node.op_type in {"Reshape", "Squeeze", "Unsqueeze", "Identity"}:
            return _is_length(node.inputs[0])
        if node.op_type == "Add":
            return all(_is_length(term) for term in node.inputs)
    found = elements(value) or []
    return len(found) == 1 and isinstance(found[0], DimOf) and found[0].value.is_graph_input()


def single(op: Any, vector: onnx_ir.Value, constant: int | None) -> Any:
    """Return the bound of a Slice as a scalar.

    That is `constant` if it is given, else the scalar that an exporter reshaped to the vector, else a Squeeze of it.
    """
    if constant is not None:
        return np.int64(constant)
    node = vector.producer()
    source = node.inputs[0] if node is not None and node.op_type in {"Reshape", "Unsqueeze"} else None
    if source is not None and source.shape is not None and not len(source.shape):
        return source
    return op.Squeeze(vector)


def _slopes(name: str, mask: Expression) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the slopes [heads] in fp32, after comparing rows of the mask with slope · column.

    Raises Decline that names the first element in which the constant is not a causal ALiBi mask.
    """
    heads, length, _ = mask.shape
    if length < 2:
        raise Decline(f"{name} has {length} positions; the slopes cannot be read from it")
    kind = mask.dtype.numpy()
    with Evaluator() as evaluator:
        column = evaluator.read(mask, ((0, heads), (length - 1, length), (1, 2)))
        found = np.asarray(column, np.float32).reshape(heads)
        formula = np.asarray(alibi_slopes(heads), np.float32)
        # A 16-bit mask holds rounded slopes. If rounding the formula's slopes gives the same, those are the exact ones.
        slopes = formula if np.array_equal(formula.astype(kind), found.astype(kind)) else found
        for head, row, values in _sample(evaluator, mask):
            with np.errstate(over="ignore", invalid="ignore"):  # if this is no ALiBi mask, the slope may be any number
                expected = (slopes[head] * np.arange(length, dtype=np.float32)).astype(kind)
            expected[row + 1 :] = -np.inf
            wrong = np.flatnonzero(~equal_bias(values, expected))
            if wrong.size:
                at = int(wrong[0])
                raise Decline(
                    f"{name}[{head}, {row}, {at}] is {values[at]}, an ALiBi mask of slope {slopes[head]} "
                    f"has {expected[at]} there"
                )
    return slopes


def _sample(evaluator: Evaluator, mask: Expression) -> Iterator[tuple[int, int, np.ndarray[Any, np.dtype[Any]]]]:
    """Yield (head, row, values) for up to `_SAMPLED_ROWS` evenly spaced rows of each head."""
    heads, length, _ = mask.shape
    rows = np.unique(np.linspace(0, length - 1, min(length, _SAMPLED_ROWS)).astype(int)).tolist()
    for head in range(heads):
        for row in rows:
            yield head, row, evaluator.read(mask, ((head, head + 1), (row, row + 1), (0, length))).reshape(-1)


def equal_bias(values: Any, expected: Any) -> Any:
    """Compare two arrays element by element, up to one rounding step of the dtype of `values`.

    Where -inf is expected, the lowest number of the dtype is equal as well. Returns a boolean array.
    """
    limits: Any = ml_dtypes.finfo(values.dtype)  # type: ignore[no-untyped-call]
    masked = (values == limits.min) | np.isneginf(values)
    wide, target = values.astype(np.float32), expected.astype(np.float32)
    with np.errstate(invalid="ignore"):
        near = np.abs(wide - target) <= np.abs(target) * float(limits.eps)
    return np.where(np.isneginf(expected), masked, near)
