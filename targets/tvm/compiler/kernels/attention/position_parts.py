"""Decode with few kv heads: positions are cut into parts, a work item each, whose results are then joined.

Otherwise a step of one sequence would have no more threads than kv heads: of multi-query attention, one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.attention.tiles import TILE, RowState, Tiles, weight

#: Work items that positions are cut for: as many threads read all that memory gives.
ITEMS = 8

#: Positions that are not worth a part of their own.
_LEAST = 2 * TILE


def count_parts(items: Any, columns: Any) -> Any:
    """Parts of `columns` positions where there are `items` pairs of a sequence and a kv head."""
    from tvm.script.ir_builder import tirx as T

    return T.max(1, T.min(ITEMS // items, columns // _LEAST))


def part_of(first: Any, last: Any, number: Any, parts: Any) -> tuple[Any, Any]:
    """Where part `number` of `first` to `last` begins and ends: whole tiles, the last part with what is left."""
    from tvm.script.ir_builder import tirx as T

    tiles = (last - first + TILE - 1) // TILE
    share = emit.bind((tiles + parts - 1) // parts * TILE)
    begin = emit.bind(T.min(first + number * share, last))
    return begin, emit.bind(T.min(begin + share, last))


@dataclasses.dataclass(frozen=True)
class PartialRows:
    """What work items have found: of each row the largest score, the sum of weights, and outputs not yet divided."""

    tiles: Tiles
    outputs: Any  # [ITEMS, group, d]
    largest: Any  # [ITEMS, group]
    sums: Any  # [ITEMS, group]

    @classmethod
    def allocate(cls, tiles: Tiles) -> PartialRows:
        rows = (ITEMS, tiles.group)
        return cls(tiles, emit.scratch(*rows, tiles.head_dim), emit.scratch(*rows), emit.scratch(*rows))

    def keep(self, item: Any, row: Any, state: RowState) -> None:
        """The rows of one work item."""
        from tvm.script.ir_builder import tirx as T

        T.buffer_store(self.largest, state.largest[row], [item, row])
        T.buffer_store(self.sums, state.sums[row], [item, row])

        def copy(start: Any, width: int) -> None:
            emit.store(self.outputs, emit.load(state.outputs, [row, start], width), [item, row, start], width)

        emit.each_span(self.tiles.head_dim, self.tiles.isa.lanes, copy)

    def join(self, first: Any, parts: Any, row: Any, y: Any, at: list[Any]) -> None:
        """y[at] = the output of `row` over the work items from `first` on; 0 where it has no weight at all."""
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
