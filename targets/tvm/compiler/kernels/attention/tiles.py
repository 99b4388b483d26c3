"""The inner loops of attention: rows of queries against a tile of positions, with sums kept in registers.

A row is one query head at one position. Rows of all query heads that share a kv head are computed together, so that
keys and values are read once for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK
from passopt.targets.tvm.machines import Isa

#: Positions per tile, after which the softmax of a row is brought up to date.
TILE = 128

#: Where the running maximum of a row starts: finite, so that no difference is NaN.
LOWEST = -3.4028234663852886e38

#: (vectors per row, rows) computed at once by the registers of a level; each row takes its vectors, and so do the keys.
_REGISTER_TILES = {"avx512-vnni": (2, 12), "avx2": (2, 6), "plain": (4, 3), "cuda": (16, 1)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How rows, positions and channels are cut for one kv head with `group` query heads."""

    group: int
    head_dim: int
    isa: Isa

    @property
    def vectors(self) -> int:
        return _REGISTER_TILES[self.isa.name][0]

    @property
    def rows(self) -> int:
        return _REGISTER_TILES[self.isa.name][1]

    @property
    def unit(self) -> int:
        """Positions, or channels, computed at once for a full set of rows."""
        return self.vectors * self.isa.lanes

    @property
    def channels(self) -> int:
        """Channels of a head, rounded up to whole units."""
        return -(-self.head_dim // self.unit) * self.unit

    @property
    def query_positions(self) -> int:
        """Positions per work item: a part of QUERY_BLOCK, so that the rows of a group are about as many."""
        return max(n for n in range(1, QUERY_BLOCK + 1) if QUERY_BLOCK % n == 0 and (n == 1 or n * self.group <= 48))

    @property
    def query_rows(self) -> int:
        """Rows per work item, rounded up to whole sets."""
        return -(-self.query_positions * self.group // self.rows) * self.rows

    def vectors_for(self, rows: int, limit: int) -> int:
        """Vectors per row when only `rows` are computed at once: a power of two, at most `limit`."""
        fit = min(limit, self.rows * self.vectors // rows)
        return 1 << (fit.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class RowState:
    """What a work item carries from tile to tile, in memory of the thread."""

    queries: Any  # [rows, d], scaled
    scores: Any  # [rows, TILE], then weights
    outputs: Any  # [rows, channels], to be divided by sums
    largest: Any  # [rows]
    sums: Any  # [rows]

    @classmethod
    def allocate(cls, rows: int, tiles: Tiles) -> RowState:
        return cls(
            emit.scratch(rows, tiles.head_dim),
            emit.scratch(rows, TILE),
            emit.scratch(rows, tiles.channels),
            emit.scratch(rows),
            emit.scratch(rows),
        )

    def start(self, row: Any, tiles: Tiles) -> None:
        """A row before its first tile."""
        from tvm.script.ir_builder import tirx as T

        lanes = tiles.isa.lanes
        emit.each_span(
            tiles.channels,
            lanes,
            lambda start, width: emit.store(self.outputs, emit.spread(0.0, width), [row, start], width),
        )
        T.buffer_store(self.largest, T.float32(LOWEST), [row])
        T.buffer_store(self.sums, T.float32(0), [row])


def emit_scores(
    state: RowState, first: Any, rows: int, start: Any, vectors: int, key: Callable[[int, Any], Any], tiles: Tiles
) -> None:
    """scores[first + i, start + …] = queries[first + i] · keys, for `rows` rows and `vectors` vectors of positions.

    `key(j, channel)` is vector j of the keys.
    """
    from tvm.script.ir_builder import tirx as T

    lanes = tiles.isa.lanes
    sums = [[emit.local(lanes) for _ in range(vectors)] for _ in range(rows)]
    places = [(i, j) for i in range(rows) for j in range(vectors)]
    for i, j in places:
        emit.store(sums[i][j], emit.spread(0.0, lanes), [0], lanes)
    with T.serial(0, tiles.head_dim) as channel:
        keys = [emit.bind(key(j, channel)) for j in range(vectors)]
        queries = [emit.bind(emit.spread(state.queries[first + i, channel], lanes)) for i in range(rows)]
        for i, j in places:
            total = emit.load(sums[i][j], [0], lanes) + queries[i] * keys[j]
            emit.store(sums[i][j], total, [0], lanes)
    for i, j in places:
        emit.store(state.scores, emit.load(sums[i][j], [0], lanes), [first + i, start + j * lanes], lanes)


def emit_outputs(
    state: RowState,
    first: Any,
    rows: int,
    start: Any,
    widths: list[int],
    count: Any,
    value: Callable[[int, int, Any], Any],
) -> None:
    """outputs[first + i, start + …] += weights · values over `count` positions, for neighbouring vectors of `widths`.

    `value(offset, lanes, position)` is the vector of values `offset` channels from `start`.
    """
    from tvm.script.ir_builder import tirx as T

    sums = [[emit.local(width) for width in widths] for _ in range(rows)]
    offsets = [sum(widths[:j]) for j in range(len(widths))]
    for i in range(rows):
        for j, width in enumerate(widths):
            emit.store(sums[i][j], emit.load(state.outputs, [first + i, start + offsets[j]], width), [0], width)
    with T.serial(0, count) as position:
        values = [emit.bind(value(offset, width, position)) for offset, width in zip(offsets, widths, strict=True)]
        for i in range(rows):
            weight = emit.bind(state.scores[first + i, position])
            for j, width in enumerate(widths):
                total = emit.load(sums[i][j], [0], width) + emit.spread(weight, width) * values[j]
                emit.store(sums[i][j], total, [0], width)
    for i in range(rows):
        for j, width in enumerate(widths):
            emit.store(state.outputs, emit.load(sums[i][j], [0], width), [first + i, start + offsets[j]], width)


def emit_softmax(
    state: RowState, row: Any, column: Any, units: Any, columns: Any, bias: Callable[[Any, Any, int], Any], tiles: Tiles
) -> None:
    """Turns the scores of `row` into weights relative to its largest score so far; rescales what was summed before.

    The tile starts at `column` and has `units` units; positions from `columns` on have no weight. `bias(score, column,
    lanes)` is the score with cap and mask.
    """
    from tvm.script.ir_builder import tirx as T

    unit, lanes, scores = tiles.unit, tiles.isa.lanes, state.scores
    best, total = emit.local(unit), emit.local(unit)
    emit.store(best, emit.spread(float("-inf"), unit), [0], unit)
    emit.store(total, emit.spread(0.0, unit), [0], unit)

    def finish(start: Any, width: int) -> None:
        emit.store(scores, bias(emit.load(scores, [row, start], width), column + start, width), [row, start], width)

    with T.serial(0, units) as index:
        start = emit.bind(index * unit)
        with T.If(column + start + unit <= columns):
            with T.Then():
                finish(start, unit)
            with T.Else(), T.serial(0, unit) as rest, T.If(column + start + rest < columns):
                with T.Then():
                    finish(start + rest, 1)
                with T.Else():
                    T.buffer_store(scores, T.float32(float("-inf")), [row, start + rest])
        emit.store(best, T.max(emit.load(best, [0], unit), emit.load(scores, [row, start], unit)), [0], unit)

    before = emit.bind(state.largest[row])
    largest = emit.bind(T.max(before, emit.fold_lanes(best, unit, T.max)))
    with T.serial(0, units) as index:
        weights = emit.bind(weight(emit.load(scores, [row, index * unit], unit) - emit.spread(largest, unit), unit))
        emit.store(scores, weights, [row, index * unit], unit)
        emit.store(total, emit.load(total, [0], unit) + weights, [0], unit)
    rescale = emit.bind(weight(before - largest, 1))
    T.buffer_store(state.sums, state.sums[row] * rescale + emit.fold_lanes(total, unit, lambda a, b: a + b), [row])
    with T.If(largest > before), T.Then():
        T.buffer_store(state.largest, largest, [row])

        def scale(start: Any, width: int) -> None:
            scaled = emit.load(state.outputs, [row, start], width) * emit.spread(rescale, width)
            emit.store(state.outputs, scaled, [row, start], width)

        emit.each_span(tiles.channels, lanes, scale)


def weight(difference: Any, lanes: int) -> Any:
    """e^difference, and 0 where that is no normal number: a masked position has no weight at all."""
    from tvm.script.ir_builder import tirx as T

    name = emit.bind(difference)
    return T.Select(name < emit.spread(emit.LOWEST_EXPONENT, lanes), emit.spread(0.0, lanes), emit.exp(name, lanes))
