"""Emit the inner loops of attention: rows of queries against a tile of positions, with sums kept in registers.

A row is one query head at one position. The rows of all query heads that share a kv head are computed together, so that
keys and values are read only once for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK
from passopt.targets.tvm.machines import Isa

#: The number of positions per tile, after which the running softmax of a row is updated.
TILE = 128

#: The initial running maximum of a row. It is finite, so that no difference is NaN.
LOWEST = -3.4028234663852886e38

#: By level: (vectors per row, rows) of the results that are held in registers at once. Keys or values take as many more
#: registers as a row does.
_REGISTER_TILES = {"avx512-vnni": (2, 12), "avx2": (2, 6), "plain": (4, 3), "cuda": (16, 1)}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The sizes by which rows, positions and channels are cut, for one kv head with `group` query heads."""

    group: int
    head_dim: int
    isa: Isa

    @property
    def vectors(self) -> int:
        """Return the number of vectors per row that are computed at once for a full set of rows."""
        return _REGISTER_TILES[self.isa.name][0]

    @property
    def rows(self) -> int:
        """Return the number of rows in a full set, which are computed at once."""
        return _REGISTER_TILES[self.isa.name][1]

    @property
    def unit(self) -> int:
        """Return the number of positions, or channels, that are computed at once for a full set of rows."""
        return self.vectors * self.isa.lanes

    @property
    def channels(self) -> int:
        """Return the number of channels of a head, rounded up to whole units."""
        return -(-self.head_dim // self.unit) * self.unit

    @property
    def query_positions(self) -> int:
        """Return the number of query positions per work item of prefill.

        It is the largest divisor of QUERY_BLOCK that gives at most 48 rows over the whole group, or 1.
        """
        return max(n for n in range(1, QUERY_BLOCK + 1) if QUERY_BLOCK % n == 0 and (n == 1 or n * self.group <= 48))

    @property
    def query_rows(self) -> int:
        """Return the number of rows per work item of prefill, rounded up to whole sets."""
        return -(-self.query_positions * self.group // self.rows) * self.rows

    def vectors_for(self, rows: int, limit: int) -> int:
        """Return the number of vectors per row if only `rows` rows are computed at once.

        It is a power of two, and at most `limit`.
        """
        fit = min(limit, self.rows * self.vectors // rows)
        return 1 << (fit.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class RowState:
    """The state that a work item carries from tile to tile, as fp32 buffers in memory of the thread."""

    queries: Any  # [rows, d], already multiplied by the scale
    scores: Any  # [rows, TILE]; the softmax turns them into weights
    outputs: Any  # [rows, channels], still to be divided by `sums`
    largest: Any  # [rows]
    sums: Any  # [rows]

    @classmethod
    def allocate(cls, rows: int, tiles: Tiles) -> RowState:
        """Allocate the state of `rows` rows."""
        return cls(
            emit.scratch(rows, tiles.head_dim),
            emit.scratch(rows, TILE),
            emit.scratch(rows, tiles.channels),
            emit.scratch(rows),
            emit.scratch(rows),
        )

    def start(self, row: Any, tiles: Tiles) -> None:
        """Emit the initialisation of a row before its first tile; its query is stored elsewhere."""
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
    """Emit scores[first + i, start + …] = queries[first + i] · keys, for `rows` rows and `vectors` vectors of keys.

    `key(j, channel)` returns vector j of the keys for one channel; its lanes are neighbouring positions.
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
    """Emit outputs[first + i, start + …] += weights · values for `rows` rows, summed over `count` positions.

    The channels from `start` on are cut into neighbouring vectors of `widths`. `value(offset, lanes, position)` returns
    the vector of values that is `offset` channels from `start`.
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
    state: RowState,
    row: Any,
    column: Any,
    units: Any,
    columns: Any,
    bias: Callable[[Any, Any, int], Any],
    tiles: Tiles,
    scaled: Callable[[Any, Any, int], Any] | None = None,
) -> None:
    """Emit the update of the running softmax of `row` by one tile.

    The scores become weights relative to the largest score so far, and what was summed before is rescaled to it. The
    tile starts at `column` and has `units` units; positions from `columns` on get no weight. `bias(score, column,
    lanes)` returns the score with cap, mask and ALiBi bias applied. `scaled(weight, column, lanes)` returns it times
    the scales of the values at their columns, which does not change their sum; it is None if values are no codes.
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
        if scaled is not None:
            _scale_weights(state, row, column, emit.bind(index * unit), columns, scaled, unit)
    rescale = emit.bind(weight(before - largest, 1))
    T.buffer_store(state.sums, state.sums[row] * rescale + emit.fold_lanes(total, unit, lambda a, b: a + b), [row])
    with T.If(largest > before), T.Then():
        T.buffer_store(state.largest, largest, [row])

        def scale(start: Any, width: int) -> None:
            scaled = emit.load(state.outputs, [row, start], width) * emit.spread(rescale, width)
            emit.store(state.outputs, scaled, [row, start], width)

        emit.each_span(tiles.channels, lanes, scale)


def _scale_weights(
    state: RowState,
    row: Any,
    column: Any,
    start: Any,
    columns: Any,
    scaled: Callable[[Any, Any, int], Any],
    unit: int,
) -> None:
    """Emit the multiplication of a unit of weights by scales, but for columns that have none, where weights are 0."""
    from tvm.script.ir_builder import tirx as T

    def scale(at: Any, width: int) -> None:
        found = scaled(emit.load(state.scores, [row, at], width), column + at, width)
        emit.store(state.scores, found, [row, at], width)

    with T.If(column + start + unit <= columns):
        with T.Then():
            scale(start, unit)
        with T.Else(), T.serial(0, unit) as rest, T.If(column + start + rest < columns), T.Then():
            scale(start + rest, 1)


def weight(difference: Any, lanes: int) -> Any:
    """Return e^difference, or 0 where that is not a normal fp32 number, so that masked positions get no weight."""
    from tvm.script.ir_builder import tirx as T

    name = emit.bind(difference)
    return T.Select(name < emit.spread(emit.LOWEST_EXPONENT, lanes), emit.spread(0.0, lanes), emit.exp(name, lanes))
