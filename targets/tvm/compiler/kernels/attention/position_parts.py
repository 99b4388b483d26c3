"""Emit decoding with few kv heads: the positions are cut into parts, one work item each, and the results joined.

Otherwise a step of one sequence could use no more threads than there are kv heads; with multi-query attention, one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.attention.tiles import TILE, RowState, Tiles, weight

#: The number of work items to cut positions for. That many threads use the whole memory bandwidth.
ITEMS = 8

#: The number of positions below which a part of its own is not worthwhile.
_LEAST = 2 * TILE


def count_parts(items: Any, columns: Any) -> Any:
    """Return into how many parts to cut `columns` positions, given `items` pairs of a sequence and a kv head."""
    from tvm.script.ir_builder import tirx as T

    return T.max(1, T.min(ITEMS // items, columns // _LEAST))


def part_of(first: Any, last: Any, number: Any, parts: Any) -> tuple[Any, Any]:
    """Return where part `number` of the positions `first` to `last` begins and ends.

    A part has whole tiles; the last part has what is left, which may be nothing.
    """
    from tvm.script.ir_builder import tirx as T

    tiles = (last - first + TILE - 1) // TILE
    share = emit.bind((tiles + parts - 1) // parts * TILE)
    begin = emit.opaque(T.min(first + number * share, last))
    return begin, emit.opaque(T.min(begin + share, last))


@dataclasses.dataclass(frozen=True)
class PartialRows:
    """The results of work items: for each row the largest score, the sum of weights, and outputs not yet divided."""

    tiles: Tiles
    outputs: Any  # [ITEMS, group, d]
    largest: Any  # [ITEMS, group]
    sums: Any  # [ITEMS, group]

    @classmethod
    def allocate(cls, tiles: Tiles) -> PartialRows:
        """Allocate memory for the results of all work items."""
        rows = (ITEMS, tiles.group)
        return cls(tiles, emit.scratch(*rows, tiles.head_dim), emit.scratch(*rows), emit.scratch(*rows))

    def keep(self, item: Any, row: Any, state: RowState) -> None:
        """Emit the code that stores one row of a work item."""
        from tvm.script.ir_builder import tirx as T

        T.buffer_store(self.largest, state.largest[row], [item, row])
        T.buffer_store(self.sums, state.sums[row], [item, row])

        def copy(start: Any, width: int) -> None:
            emit.store(self.outputs, emit.load(state.outputs, [row, start], width), [item, row, start], width)

        emit.each_span(self.tiles.head_dim, self.tiles.isa.lanes, copy)

    def join(self, first: Any, parts: Any, row: Any, y: Any, at: list[Any]) -> None:
        """Emit the code that joins `parts` work items from `first` on to the output of `row`, written to y[at].

        The output is 0 if the row has no weight at all.
        """
        from tvm.script.ir_builder import tirx as T

        best, total = emit.local(1), emit.local(1)
        T.buffer_store(best, self.largest[first, row], [0])
        with T.serial(1, parts) as part:
            T.buffer_store(best, T.max(best[0], self.largest[first + part, row]), [0])
        T.buffer_store(total, T.float32(0), [0])
        with T.serial(0, parts) as part:
            T.buffer_store(
                total, total[0] + self._share(first + part, row, best[0]) * self.sums[first + part, row], [0]
            )
        factor = emit.bind(T.if_then_else(total[0] > T.float32(0), T.float32(1) / total[0], T.float32(0)))

        def add(start: Any, width: int) -> None:
            joined = emit.local(width)
            emit.store(joined, emit.spread(0.0, width), [0], width)
            with T.serial(0, parts) as part:
                scale = emit.spread(emit.bind(self._share(first + part, row, best[0]) * factor), width)
                found = emit.load(self.outputs, [first + part, row, start], width)
                emit.store(joined, emit.load(joined, [0], width) + scale * found, [0], width)
            emit.store(y, emit.load(joined, [0], width), [*at, start], width)

        emit.each_span(self.tiles.head_dim, self.tiles.isa.lanes, add)

    def _share(self, item: Any, row: Any, best: Any) -> Any:
        return weight(self.largest[item, row] - best, 1)
