"""Describe weights as spans of rows: which rows and columns of which core each row of an output consists of, per rank.

Slices, shards, padding and concatenations only place values; what they place is a *core*, whose row i is computed from
row i of its *base*. So all outputs of one base can be made while the base is read once. If columns have scales, the
base is read once more before that, to measure the columns.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeGuard

import numpy as np

from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import Concat
from passopt.ir.weights.groups import FOUR_BITS, GroupCodes, GroupScales, GroupZeros, Nibbles, Unsigned
from passopt.ir.weights.literals import Fill
from passopt.ir.weights.packed_codes import PackCodes, UnpackCodes
from passopt.ir.weights.rotation import Rotate
from passopt.ir.weights.scaling import ScaleAlong

#: The operations on rows that codes of 4 bits consist of.
GroupRows: TypeAlias = GroupCodes | GroupScales | GroupZeros | Nibbles | Unsigned


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns `first` to `first + count` of a `core`, from `row` on; without a core, the number `value` everywhere."""

    core: ex.Expression | None
    row: int
    first: int
    count: int
    value: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Return whether the part has all columns of its core."""
        return self.core is not None and self.first == 0 and self.count == matrix_shape(self.core)[1]


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive rows of an output: `rows` is their number, and the `parts` are side by side."""

    rows: int
    parts: tuple[Part, ...]

    @property
    def is_filled(self) -> bool:
        """Return whether no part has a core, so that every value is known."""
        return all(part.core is None for part in self.parts)

    def cropped(self, start: int, stop: int) -> Span:
        """Return rows `start` to `stop` of the span."""
        return Span(stop - start, tuple(dataclasses.replace(part, row=part.row + start) for part in self.parts))

    def columns(self, start: int, stop: int) -> Span:
        """Return columns `start` to `stop` of the span."""
        kept, position = [], 0
        for part in self.parts:
            lower, upper = max(start - position, 0), min(stop - position, part.count)
            if lower < upper:
                kept.append(dataclasses.replace(part, first=part.first + lower, count=upper - lower))
            position += part.count
        return Span(self.rows, tuple(kept))


_Packing: TypeAlias = UnpackCodes | PackCodes


def matrix_shape(expression: ex.Expression) -> tuple[int, int]:
    """Return the rows and columns as which a tensor is streamed.

    The last axis is a row; a tensor with one axis, or none, has rows of one element.
    """
    shape = expression.shape
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def base_of(core: ex.Expression) -> ex.Expression:
    """Return what the core is computed from, row by row.

    That is a tensor in a file, or something that only the evaluator of boxes can read.
    """
    while is_row_operation(core):
        core = core.operand  # type: ignore[attr-defined]
    return core


def is_bytes(base: ex.Expression) -> TypeGuard[ex.Source]:
    """Return whether a base is read from its file as it lies; codes of 4 bits have to be taken apart first."""
    return isinstance(base, ex.Source) and base.dtype not in FOUR_BITS


def is_row_operation(expression: ex.Expression) -> bool:
    """Return whether row i of the result needs only row i of the operand and, at most, the scales of all columns."""
    if isinstance(expression, ex.Cast):
        return not _is_summary(expression.operand)
    if isinstance(expression, Rotate):
        return expression.by_rows
    kinds = ex.QuantizeCodes | ex.QuantizeScales | ex.NormalizeRows | ex.RowSums | ScaleAlong | GroupRows | _Packing
    return isinstance(expression, kinds)


def is_by_columns(core: ex.Expression) -> bool:
    """Return whether the core needs the largest magnitude of every operand column, and so all rows of the operand."""
    return isinstance(core, ex.QuantizeCodes | ex.QuantizeScales) and core.along == 1


def _is_summary(core: ex.Expression) -> bool:
    """Return whether the rows of the core are the columns of its operand."""
    return isinstance(core, ex.QuantizeScales) and core.along == 1


def spans_of(expression: ex.Expression, rank: int) -> list[Span]:
    """Return the tensor as spans from its first row to its last, without empty ones."""
    spans = (Span(span.rows, tuple(part for part in span.parts if part.count)) for span in _spans(expression, rank))
    return [span for span in spans if span.rows and span.parts]


def _spans(expression: ex.Expression, rank: int) -> list[Span]:
    if isinstance(expression, Fill):
        rows, columns = matrix_shape(expression)
        return [Span(rows, (Part(None, 0, 0, columns, expression.value),))]
    if isinstance(expression, ex.Transpose) and isinstance(expression.operand, ex.Cast):
        cast = expression.operand  # Rounding and transposing commute.
        turned = dataclasses.replace(expression, dtype=cast.operand.dtype, operand=cast.operand)
        return _spans(dataclasses.replace(cast, shape=turned.shape, operand=turned), rank)
    if isinstance(expression, ex.Transpose) and isinstance(expression.operand, Rotate | ScaleAlong):
        return _spans(_turned(expression, expression.operand), rank)
    if is_by_columns(expression) or (isinstance(expression, ScaleAlong) and expression.along == 0):
        return _of_columns(expression, rank)  # type: ignore[arg-type]
    if is_row_operation(expression):
        return _of_rows(expression, rank)  # type: ignore[arg-type]
    placed = _placed(expression, rank)
    return _itself(expression) if placed is None else placed


def _itself(expression: ex.Expression) -> list[Span]:
    rows, columns = matrix_shape(expression)
    return [Span(rows, (Part(expression, 0, 0, columns),))]


def _turned(transpose: ex.Transpose, inside: Rotate | ScaleAlong) -> ex.Expression:
    """Return a transposed operation along an axis as the same operation along the other axis, of the transposed."""
    operand = inside.operand.transpose(transpose.permutation)
    along = transpose.permutation.index(inside.along)
    return dataclasses.replace(inside, shape=transpose.shape, operand=operand, along=along)


def _of_columns(expression: ex.QuantizeCodes | ex.QuantizeScales | ScaleAlong, rank: int) -> list[Span]:
    """Return the spans of what has a number per column, or a factor per row, of the whole operand.

    It cannot be done part by part.

    The placement of the operand is looked through only if it places a whole core.
    """
    core = _whole(_spans(expression.operand, rank), expression.operand)
    return _itself(expression if core is None else dataclasses.replace(expression, operand=core))


def _whole(spans: list[Span], expression: ex.Expression) -> ex.Expression | None:
    """Return the core if the spans show all of it, first row to last and all columns; else None."""
    if len(spans) != 1 or len(spans[0].parts) != 1 or not spans[0].parts[0].is_whole:
        return None
    (part,) = spans[0].parts
    return part.core if part.row == 0 and part.core is not None and part.core.shape == expression.shape else None


def _of_rows(
    expression: ex.Cast | ex.NormalizeRows | ex.RowSums | Rotate | ScaleAlong | GroupRows | _Packing, rank: int
) -> list[Span]:
    """Apply an operation on rows within the spans of its operand, where it commutes with their placement.

    It commutes with the placement of whole rows; a cast commutes with that of columns too.
    """
    columns = matrix_shape(expression)[1]
    spans = _spans(expression.operand, rank)
    if any(part.core is not None and _is_summary(part.core) for span in spans for part in span.parts):
        return _itself(expression)
    if isinstance(expression, ex.Cast):
        return [Span(span.rows, tuple(_applied(expression, part, part.count) for part in span.parts)) for span in spans]
    if not all(len(span.parts) == 1 and _is_row(span.parts[0], expression) for span in spans):
        return _itself(expression)
    return [Span(span.rows, (_applied(expression, span.parts[0], columns),)) for span in spans]


def _is_row(part: Part, operation: ex.Expression) -> bool:
    """Return whether the part is a whole row of a core, or of zeros of which the operation makes zeros."""
    is_zero = part.core is None and part.value == 0
    return part.is_whole or (is_zero and not isinstance(operation, _Packing))


def _applied(operation: ex.Expression, part: Part, columns: int) -> Part:
    """Return the operation on what `part` shows; for a part that is filled with one number, the result is known."""
    if part.core is None:
        scale = isinstance(operation, ex.QuantizeScales | GroupScales)
        return Part(None, 0, 0, columns, ex.SCALE_OF_ZEROS if scale else _rounded(part.value, operation))
    core = part.core
    shape = core.shape[:1] if isinstance(operation, ex.QuantizeScales | ex.RowSums) else core.shape
    if isinstance(operation, GroupScales | GroupZeros | Nibbles):
        shape = (core.shape[0], operation.shape[1])
    if isinstance(operation, _Packing):
        shape = (core.shape[0], columns)
    made = dataclasses.replace(operation, shape=shape, operand=core)  # type: ignore[call-arg]
    return Part(made, part.row, part.first, columns)


def _rounded(value: float, operation: ex.Expression) -> float:
    """Return the number as the operand's dtype holds it."""
    return float(np.asarray(value, operation.operands[0].dtype.numpy()))


def _placed(expression: ex.Expression, rank: int) -> list[Span] | None:
    """Return the spans of a placement along rows or columns, or None for anything else."""
    if isinstance(expression, Concat):
        return _joined(expression, rank)
    if not isinstance(expression, ex.Slice | ex.Shard | ex.Pad):
        return None
    along, last = expression.along, max(len(expression.shape) - 1, 1)
    if along not in {0, last}:
        return None
    spans = _spans(expression.operand, rank)
    ranges = list(_ranges(expression, rank))
    if along == 0:
        inner = math.prod(expression.shape[1:-1])
        width = matrix_shape(expression)[1]
        return [span for piece in ranges for span in _rows(spans, piece, inner, width)]
    return [Span(span.rows, _columns(span, ranges)) for span in spans]


@dataclasses.dataclass(frozen=True)
class _Range:
    """A range of `count` indexes of the operand from `start` on; without a start, `count` times `value`."""

    start: int | None
    count: int
    value: float = 0.0


def _ranges(expression: ex.Slice | ex.Shard | ex.Pad, rank: int) -> Iterator[_Range]:
    """Yield what the axis of a placement holds, from its first index to its last."""
    length = expression.shape[expression.along]
    whole = expression.operand.shape[expression.along]
    if isinstance(expression, ex.Slice):
        yield _Range(expression.start, length)
        return
    local, full = length // expression.segments, whole // expression.segments
    for segment in range(expression.segments):
        if isinstance(expression, ex.Shard):
            yield _Range(segment * full + rank * local, local)
        else:
            yield _Range(segment * full, full)
            yield _Range(None, local - full, expression.value)


def _rows(spans: list[Span], piece: _Range, inner: int, width: int) -> list[Span]:
    if piece.start is None:
        return [Span(piece.count * inner, (Part(None, 0, 0, width, piece.value),))]
    start, stop = piece.start * inner, (piece.start + piece.count) * inner
    found, position = [], 0
    for span in spans:
        lower, upper = max(start - position, 0), min(stop - position, span.rows)
        if lower < upper:
            found.append(span.cropped(lower, upper))
        position += span.rows
    return found


def _columns(span: Span, ranges: Iterable[_Range]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for piece in ranges:
        if piece.start is not None:
            parts.extend(span.columns(piece.start, piece.start + piece.count).parts)
        elif piece.count:
            parts.append(Part(None, 0, 0, piece.count, piece.value))
    return tuple(parts)


def _joined(expression: Concat, rank: int) -> list[Span] | None:
    lists = [_spans(part, rank) for part in expression.parts]
    if expression.along == 0:
        return [span for spans in lists for span in spans]
    if expression.along == len(expression.shape) - 1:
        return list(_side_by_side(lists))
    return None


def _side_by_side(lists: list[list[Span]]) -> Iterator[Span]:
    """Yield spans that join the lists side by side, cut wherever one of the lists begins a new span."""
    bounds = sorted({position for spans in lists for position in _bounds(spans)})
    for start, stop in itertools.pairwise(bounds):
        pieces = [_rows(spans, _Range(start, stop - start), 1, 0) for spans in lists]
        yield Span(stop - start, tuple(part for spans in pieces for span in spans for part in span.parts))


def _bounds(spans: list[Span]) -> Iterator[int]:
    position = 0
    yield position
    for span in spans:
        position += span.rows
        yield position


def in_order(spans: list[Span], base: Callable[[ex.Expression], object]) -> bool:
    """Return whether the spans can be written while a single base is read once, so that its rows only go forward."""
    bases: set[object] = set()
    row = 0
    for span in spans:
        cores = [part for part in span.parts if part.core is not None]
        bases.update(base(part.core) for part in cores if part.core is not None)
        starts = {part.row for part in cores}
        if len(bases) > 1 or len(starts) > 1:
            return False
        if starts:
            (start,) = starts
            if start < row:
                return False
            row = start + span.rows
    return len(bases) == 1
