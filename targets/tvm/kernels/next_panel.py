"""Asking for the weights that come next, so that no tile waits for memory.

Every tile of a panel asks for its share of the panel after it, few lines per step: as many as memory delivers while the
tile is computed. More of them at once would fill the CPU's line buffers, and then the tile waits all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.kernels.emit import L2, LINE_BYTES, prefetch

#: Steps between two requests.
STRIDE = 4
#: Among how many tiles the requests for a panel are shared out, if there are as many; two at least.
SHARES = (8, 4, 2)


def share_out(tiles: Any, body: Callable[[int], None]) -> None:
    """`body(shares)` for the most shares that `tiles`, a number known when the kernel runs, have each a tile."""
    from tvm.script.ir_builder import tirx as T

    def most(shares: tuple[int, ...]) -> None:
        if len(shares) == 1:
            body(shares[0])
            return
        with T.If(tiles >= shares[0]):
            with T.Then():
                body(shares[0])
            with T.Else():
                most(shares[1:])

    most(SHARES)


@dataclasses.dataclass(frozen=True)
class NextPanel:
    """A panel of `steps` rows of `row_bytes`, from element `start` of the flat buffer `weights` on."""

    weights: Any
    start: Any
    steps: Any
    row_bytes: int
    item_bytes: int

    def each_step(self, tile: Any, shares: int, body: Callable[[Any], None]) -> None:
        """`body(step)` for all steps, with the requests of the tile of number `tile` among them."""
        from tvm.script.ir_builder import tirx as T

        lines = STRIDE * max(1, self.row_bytes // LINE_BYTES)
        requests = max(1, lines // shares)
        shares = lines // requests
        strides = T.bind(self.steps // STRIDE)
        line = LINE_BYTES // self.item_bytes
        first = T.bind(self.start + tile % shares * (strides * (requests * line)))
        with T.serial(0, strides) as stride:
            for request in range(requests):
                prefetch(self.weights, [first + (stride * requests + request) * line], L2)
            for step in range(STRIDE):
                body(stride * STRIDE + step)
        with T.serial(0, self.steps - strides * STRIDE) as rest:
            body(strides * STRIDE + rest)
