"""Multiply two groups of int16 at once by Winograd's identity: half the products for more additions, all exact.

x₀w₀ + x₂w₂ = (x₀ + w₂)(x₂ + w₀) - x₀x₂ - w₀w₂. The products to take off, called the excess, are one number per row and
one per output. Zen 3 has two ports that multiply int16 pairs and four that add them. Since additions take ports from
products, the gain is less than a factor of two: 87 products per ns against 75.
"""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.compiler.kernels.emit import fold_lanes, local, span
from passopt.targets.tvm.compiler.kernels.linear.byte_tiles import Operands, Panel, Tile


class Pairs:
    """A panel of weights widened to int16, and the excess of pairs over true products, for one chunk of work.

    The chunk has up to `rows` rows of codes and `blocks` blocks of outputs.
    """

    def __init__(self, operands: Operands, rows: int, blocks: int) -> None:
        from tvm.script.ir_builder import tirx as T

        kernel = operands.kernel
        self.operands, self.kernel = operands, kernel
        shape = (operands.panel_groups, kernel.columns * kernel.group)
        self._panel = T.alloc_buffer(shape, kernel.panel_dtype, scope="global")
        self._row_excess = T.alloc_buffer((rows,), "int32", scope="global")
        self._column_excess = T.alloc_buffer((blocks, kernel.columns), "int32", scope="global")

    def excess(self, row: Any, block: Any, part: Any) -> Any:
        """Return what the pairs have added to a vector of outputs in a row of the chunk."""
        from tvm.script.ir_builder import tirx as T

        return T.broadcast(self._row_excess[row], self.kernel.lanes) + self._column_excess[block, part]

    def take_rows(self, first: Any, count: Any) -> None:
        """Emit the excess of `count` rows of codes from row `first` on.

        It is the same for all outputs of a row: the sum of the even groups times the odd groups.
        """
        from tvm.script.ir_builder import tirx as T

        kernel, dtype = self.kernel, self.operands.layout.dtype
        width = kernel.lanes * kernel.group
        with T.serial(0, count) as row:
            own, at = local(kernel.lanes, dtype="int32"), span(0, kernel.lanes)
            T.buffer_store(own, T.broadcast(T.int32(0), kernel.lanes), [at])
            with T.serial(0, -(-self.operands.k // width)) as step:
                codes = T.bind(self.operands.codes.vload([first + row, step * width], f"{dtype}x{width}"))
                # Within 64 bits, the odd group moves to where the even one is, and zeros to where the odd one was.
                halves = T.reinterpret(f"uint64x{width // 4}", codes)
                moved = T.shift_right(halves, T.broadcast(T.uint64(32), width // 4))
                T.buffer_store(own, kernel.dot(own[at], codes, T.reinterpret(f"{dtype}x{width}", moved)), [at])
            total = fold_lanes(own, kernel.lanes, lambda one, other: one + other)
            T.buffer_store(self._row_excess, total, [row])

    def take_panel(self, panel: Panel) -> None:
        """Emit the widening of a panel's weights, and add what their pairs contribute to the excess of each column."""
        from tvm.script.ir_builder import tirx as T

        kernel, vectors = self.kernel, range(self.kernel.tile_vectors)
        own = Tile(kernel, 1)
        with T.serial(0, panel.count // 2) as pair:
            for vector in vectors:
                groups = [panel.first + pair * 2 + half for half in range(2)]
                low, high = (T.bind(self.operands.weights(panel.source, group, vector)) for group in groups)
                for half, part in enumerate((low, high)):
                    T.buffer_store(self._panel, part, [pair * 2 + half, self._part(vector)])
                own.add(0, vector, low, high)
        for vector, value in enumerate(own.values(0)):
            place = [panel.block, span(vector * kernel.lanes, kernel.lanes)]
            with T.If(panel.step == 0):
                with T.Then():
                    T.buffer_store(self._column_excess, value, place)
                with T.Else():
                    T.buffer_store(self._column_excess, self._column_excess[tuple(place)] + value, place)

    def multiply(self, tile: Tile, rows: list[Any], panel: Panel) -> None:
        """Emit the products of each row's groups with the panel that was taken last, with the excess included."""
        from tvm.script.ir_builder import tirx as T

        vectors = range(self.kernel.tile_vectors)
        with T.serial(0, panel.count // 2) as pair:
            low, high = (
                [T.bind(self._panel[pair * 2 + half, self._part(vector)]) for vector in vectors] for half in range(2)
            )
            for row, at in enumerate(rows):
                even, odd = (self.operands.broadcast(at, panel.first + pair * 2 + half) for half in range(2))
                for vector in vectors:
                    tile.add(row, vector, even + high[vector], odd + low[vector])

    def _part(self, vector: int) -> Any:
        width = self.kernel.lanes * self.kernel.group
        return span(vector * width, width)
