"""Prefetch the weights that are needed next, so that no tile waits for memory.

Every tile of a panel prefetches its share of the following panel, a few cache lines per step: as many as memory
delivers while the tile is computed. More at once would fill the CPU's line buffers, and the tile would wait after all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.compiler.kernels.emit import L2, LINE_BYTES, opaque, prefetch

#: The number of steps between two requests.
STRIDE = 4
#: The numbers of tiles among which the requests for a panel may be shared out. The largest that is not more than the
#: number of tiles is used, or else the last one.
SHARES = (16, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class NextPanel:
    """The panel to prefetch: `steps` rows of `row_bytes` bytes, from element `start` of the flat buffer `weights` on.

    `item_bytes` is the size of an element in bytes.
    """

    weights: Any
    start: Any
    steps: Any
    row_bytes: int
    item_bytes: int

    def each_step(self, tile: Any, tiles: Any, body: Callable[[Any], None]) -> None:
        """Emit `body(step)` for all steps, with the prefetches of tile number `tile` of `tiles` in between."""
        from tvm.script.ir_builder import tirx as T

        lines = max(1, STRIDE * self.row_bytes // LINE_BYTES)
        requests = T.int64(max(1, lines // SHARES[-1]))
        for shares in reversed(SHARES[:-1]):
            requests = T.if_then_else(tiles >= shares, T.int64(max(1, lines // shares)), requests)
        # The number is a run-time value: separate code for each number would be three times as long and no faster.
        requests = opaque(requests)
        strides = self.steps // STRIDE if isinstance(self.steps, int) else opaque(self.steps // STRIDE)
        line = LINE_BYTES // self.item_bytes
        first = opaque(self.start + tile % (lines // requests) * (strides * requests * line))
        with T.serial(0, strides) as stride:
            with T.serial(0, requests) as request:
                prefetch(self.weights, [first + (stride * requests + request) * line], L2)
            for step in range(STRIDE):
                body(stride * STRIDE + step)
        if isinstance(self.steps, int) and self.steps % STRIDE == 0:
            return
        with T.serial(0, self.steps - strides * STRIDE) as rest:
            body(strides * STRIDE + rest)
