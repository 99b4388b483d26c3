"""Group the tensors of all output files by the base that they are made from, so that each base is read once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.raw_bytes import stored
from passopt.ir.weights.rotation import Rotate
from passopt.ir.weights.safetensors_layout import Layout, layout_of
from passopt.ir.weights.streaming.row_spans import (
    Part,
    Span,
    base_of,
    in_order,
    is_by_columns,
    is_bytes,
    matrix_shape,
    spans_of,
)


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weights.safetensors to write: its path, its tensors by name, and the rank whose shards they are.

    With `plain`, the file is laid out as checkpoints are.
    """

    path: Path
    weights: Mapping[str, ex.Expression]
    rank: int = 0
    plain: bool = False

    @functools.cached_property
    def layout(self) -> Layout:
        """Return the layout of the file."""
        return layout_of(self.weights, plain=self.plain)


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor in one output file: `spans` are its rows from first to last, `offset` is its first byte in the file.

    `file` is the index of that file. With a `block` (rows, blocks across, columns), rows are packed into blocks before
    they are written.
    """

    file: int
    name: str
    dtype: ex.DataType
    offset: int
    nbytes: int
    spans: tuple[Span, ...]
    block: tuple[int, int, int] | None = None

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row before any packing."""
        return int(sum(part.count for part in self.spans[0].parts) * self.dtype.itemsize) if self.spans else 0

    @property
    def unit_bytes(self) -> int:
        """Return the bytes that are written at once: a row, or a row of blocks."""
        if self.block is None:
            return self.row_bytes
        rows, across, columns = self.block
        return int(rows * across * columns * self.dtype.itemsize)

    def parts(self) -> Iterator[Part]:
        """Yield the parts of all spans."""
        return (part for span in self.spans for part in span.parts)


@dataclasses.dataclass(frozen=True)
class Group:
    """All outputs that are made from one base. `rank` matters only if the base itself depends on the rank."""

    base: ex.Expression
    rank: int
    outputs: tuple[Output, ...]

    @functools.cached_property
    def cores(self) -> list[ex.Expression]:
        """Return everything that is computed from the base, without repetitions, operands first."""
        found: dict[ex.Expression, None] = {}
        for output in self.outputs:
            for part in output.parts():
                if part.core is not None:
                    found.update(dict.fromkeys(reversed(list(_chain(part.core, self.base)))))
        return list(found)

    @functools.cached_property
    def stored_cores(self) -> list[ex.Expression]:
        """Return the cores that need memory: all but scales, and roundings that kernels do in passing."""
        shown = {part.core for output in self.outputs for part in output.parts()}
        takers: dict[ex.Expression, set[type]] = {}
        for core in self.cores:
            takers.setdefault(core.operands[0], set()).add(type(core))
        return [
            core
            for core in self.cores
            if not isinstance(core, ex.QuantizeScales)
            and (core in shown or not is_rounding(core) or not takers.get(core, set()) <= _ROUNDING_IN_PASSING)
        ]

    @functools.cached_property
    def grain(self) -> int:
        """Return the number of rows that must be read together, because boxes are cut along the base's first axis."""
        if is_bytes(self.base) or len(self.base.shape) <= 2:
            return 1
        return max(1, math.prod(self.base.shape[1:-1]))

    @functools.cached_property
    def measured(self) -> list[ex.Expression]:
        """Return the operands whose columns need scales; all of their rows are read once before any is written."""
        return list(dict.fromkeys(core.operands[0] for core in self.cores if is_by_columns(core)))

    def is_summary(self, output: Output) -> bool:
        """Return whether the output holds the scales of columns, which are known only after all rows have been read."""
        return any(isinstance(part.core, ex.QuantizeScales) and is_by_columns(part.core) for part in output.parts())

    def rows(self) -> tuple[int, int]:
        """Return the first and the last row (exclusive) of the base that any output needs."""
        starts, stops = [], []
        for output in self.outputs:
            if self.is_summary(output):
                continue
            for span in output.spans:
                for part in span.parts:
                    if part.core is not None:
                        starts.append(part.row)
                        stops.append(part.row + span.rows)
        return min(starts, default=0), max(stops, default=0)

    @property
    def is_boxed(self) -> bool:
        """Return whether only the evaluator of boxes can read the base."""
        return not is_bytes(self.base) and not is_turned(self.base) and not is_held(self.base)

    @property
    def read_bytes(self) -> int:
        """Return the bytes of the base that the outputs need, plus the whole base if columns are measured first.

        The evaluator of boxes may have to read some of them repeatedly.
        """
        start, stop = self.rows()
        rows = stop - start + (matrix_shape(self.base)[0] if self.measured else 0)
        return int(rows * matrix_shape(self.base)[1] * self.base.dtype.itemsize)

    @property
    def written_bytes(self) -> int:
        """Return the bytes of all outputs together."""
        return sum(output.nbytes for output in self.outputs)


def is_turned(base: ex.Expression) -> bool:
    """Return whether the base is a transposed matrix of a file, whose rows are read as panels of columns."""
    return isinstance(base, ex.Transpose) and is_bytes(base.operand) and base.permutation == (1, 0)


def is_held(base: ex.Expression) -> bool:
    """Return whether the base is a matrix whose columns are rotated, which is kept whole, as each row needs all."""
    return isinstance(base, Rotate) and base.by_columns


#: The operations whose kernels take values that are not rounded yet, and round them in passing.
_ROUNDING_IN_PASSING = {ex.QuantizeCodes, ex.QuantizeScales, ex.NormalizeRows}


def is_rounding(expression: ex.Expression) -> bool:
    """Return whether the expression is a cast between floats."""
    return isinstance(expression, ex.Cast) and {expression.dtype, expression.operand.dtype} <= FLOATS


def _chain(core: ex.Expression, base: ex.Expression) -> Iterator[ex.Expression]:
    """Yield the core and what it is computed from, down to the base, which is left out."""
    while core != base:
        yield core
        core = core.operands[0]


def schedule(files: Sequence[WeightFile]) -> list[Group]:
    """Return the groups that contain every tensor of every file once.

    Large groups come first, so that no worker is left with a large one at the end.
    """
    found: dict[tuple[ex.Expression, int], list[Output]] = {}
    for index, file in enumerate(files):
        for name, offset in file.layout.offsets.items():
            base, output = _output(index, file, name, offset)
            rank = file.rank if base.depends_on_rank else 0
            found.setdefault((base, rank), []).append(output)
    groups = [Group(base, rank, tuple(outputs)) for (base, rank), outputs in found.items()]
    return sorted(groups, key=lambda group: -group.read_bytes - group.written_bytes)


def _output(index: int, file: WeightFile, name: str, offset: int) -> tuple[ex.Expression, Output]:
    weight = stored(file.weights[name], name)
    base = rows_of = weight.operand if isinstance(weight, ex.Pack) else weight
    spans = spans_of(rows_of, file.rank)
    if in_order(spans, base_of):
        base = next(base_of(part.core) for span in spans for part in span.parts if part.core is not None)
    else:  # If rows come from several bases or run backwards, the evaluator of boxes has to put them together.
        rows, columns = matrix_shape(rows_of)
        spans = [Span(rows, (Part(rows_of, 0, 0, columns),))] if rows and columns else []
    block = (weight.shape[2], weight.shape[1], weight.shape[3]) if isinstance(weight, ex.Pack) else None
    return base, Output(index, name, weight.dtype, offset, weight.nbytes, tuple(spans), block)
