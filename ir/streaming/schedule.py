"""What is written while what passes by: the tensors of all files, grouped by the base that they are made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from passopt.ir import expressions as ex
from passopt.ir.layout import Layout, plan_layout
from passopt.ir.streaming.spans import Part, Span, base_of, grain_of, in_order, is_by_columns, matrix_shape, spans_of


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weights.safetensors to write: its path, its tensors by name, and the rank whose shards they are."""

    path: Path
    weights: Mapping[str, ex.Expression]
    rank: int = 0

    @property
    def layout(self) -> Layout:
        return plan_layout(self.weights)


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor of one file: `spans` are its rows from the first to the last, `offset` is its first byte in the file."""

    file: int
    name: str
    dtype: ex.DataType
    offset: int
    nbytes: int
    spans: tuple[Span, ...]

    @property
    def row_bytes(self) -> int:
        return int(sum(part.count for part in self.spans[0].parts) * self.dtype.itemsize) if self.spans else 0

    def parts(self) -> Iterator[Part]:
        return (part for span in self.spans for part in span.parts)


@dataclasses.dataclass(frozen=True)
class Group:
    """Outputs of one base. `rank` matters to bases that only the evaluator of boxes reads."""

    base: ex.Expression
    rank: int
    outputs: tuple[Output, ...]

    @property
    def cores(self) -> list[ex.Expression]:
        """All that is computed of the base, without repetitions, operands first."""
        found: dict[ex.Expression, None] = {}
        for output in self.outputs:
            for part in output.parts():
                if part.core is not None:
                    found.update(dict.fromkeys(reversed(list(_chain(part.core, self.base)))))
        return list(found)

    @property
    def stored_cores(self) -> list[ex.Expression]:
        """The cores that need memory: no scales, and no rounding that kernels do in passing."""
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

    @property
    def grain(self) -> int:
        """Rows of the base that must be read together: what packs need, and what the base itself can give."""
        opaque = not isinstance(self.base, ex.Source)
        own = math.prod(self.base.shape[1:-1]) if opaque and len(self.base.shape) > 2 else 1
        return math.lcm(own, *(grain_of(core) for core in self.cores))

    @property
    def measured(self) -> list[ex.Expression]:
        """What must pass by once before anything is written, for the largest magnitude of its columns."""
        return list(dict.fromkeys(core.operands[0] for core in self.cores if is_by_columns(core)))

    def is_summary(self, output: Output) -> bool:
        """Whether it holds the scales of columns, which are known when all rows have passed by."""
        return any(isinstance(part.core, ex.QuantizeScales) and is_by_columns(part.core) for part in output.parts())

    def rows(self) -> tuple[int, int]:
        """First and last row of the base (exclusive) that an output needs."""
        starts, stops = [], []
        for output in self.outputs:
            if self.is_summary(output):
                continue
            for span in output.spans:
                for part in span.parts:
                    if part.core is not None:
                        grain = grain_of(part.core)
                        starts.append(part.row * grain)
                        stops.append((part.row + span.rows) * grain)
        return min(starts, default=0), min(max(stops, default=0), matrix_shape(self.base)[0])

    @property
    def read_bytes(self) -> int:
        start, stop = self.rows()
        rows = stop - start + (matrix_shape(self.base)[0] if self.measured else 0)
        return int(rows * matrix_shape(self.base)[1] * self.base.dtype.itemsize)

    @property
    def written_bytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


#: What takes values that are still to be rounded.
_ROUNDING_IN_PASSING = {ex.QuantizeCodes, ex.QuantizeScales, ex.NormalizeRows}


def is_rounding(expression: ex.Expression) -> bool:
    """Whether it is a cast between floats."""
    return isinstance(expression, ex.Cast) and {expression.dtype, expression.operand.dtype} <= ex.FLOATS


def _chain(core: ex.Expression, base: ex.Expression) -> Iterator[ex.Expression]:
    """The core and what it is computed from, down to the base, which is left out."""
    while core != base:
        yield core
        core = core.operands[0]


def schedule(files: Sequence[WeightFile]) -> list[Group]:
    """Every tensor of every file, once; large groups first, so that no worker is left with one at the end."""
    found: dict[tuple[ex.Expression, int], list[Output]] = {}
    for index, file in enumerate(files):
        for name, offset in file.layout.offsets.items():
            base, output = _output(index, file, name, offset)
            rank = file.rank if base.depends_on_rank else 0
            found.setdefault((base, rank), []).append(output)
    groups = [Group(base, rank, tuple(outputs)) for (base, rank), outputs in found.items()]
    return sorted(groups, key=lambda group: -group.read_bytes - group.written_bytes)


def _output(index: int, file: WeightFile, name: str, offset: int) -> tuple[ex.Expression, Output]:
    weight = file.weights[name]
    spans = spans_of(weight, file.rank)
    base = weight
    if in_order(spans, base_of):
        base = next(base_of(part.core) for span in spans for part in span.parts if part.core is not None)
    else:  # rows of several bases, or backwards: the evaluator of boxes puts them together
        rows, columns = matrix_shape(weight)
        spans = [Span(rows, (Part(weight, 0, 0, columns),))] if rows and columns else []
    return base, Output(index, name, weight.dtype, offset, weight.nbytes, tuple(spans))
