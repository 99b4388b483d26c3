"""Emit linear layers with int8 weights and bytes of activations: exact int32 sums in tiles, then fp32 outputs.

The same weight layout serves few rows, which read it once from memory as it lies, and many rows, which work on tiles in
the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.compiler.kernels.emit import CACHE_LINE, local, opaque, prefetch, span
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import ByteKernel
from passopt.targets.tvm.compiler.kernels.linear.byte_pairs import Pairs
from passopt.targets.tvm.compiler.kernels.linear.byte_tiles import Operands, Panel, Tile

#: The rows and columns of a chunk of work, whose int32 sums are kept in memory between panels.
_CHUNK_ROWS = 192
_CHUNK_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The output y f32[M, n] of a linear layer, and how it is computed from sums.

    Each row of y belongs to `planes` neighbouring rows of codes.
    """

    n: int
    y: Any
    #: A tensor f32[M, n] that is added to the output, or None.
    residual: Any
    #: `value(row, totals, at, lanes)` returns the fp32 numbers of y at columns `at` from the int32 sums of each plane.
    value: Callable[[Any, list[Any], Any, int], Any]
    planes: int = 1

    def store(self, row: Any, block: Any, totals: list[list[Any]], lanes: int) -> None:
        """Emit the outputs of one row of y in one block of columns, leaving out columns past n.

        `totals` are the int32 sums, as [planes][vectors].
        """
        from tvm.script.ir_builder import tirx as T

        width = len(totals[0]) * lanes
        for vector, of_planes in enumerate(zip(*totals, strict=True)):
            column = block * width + vector * lanes
            at = span(column, lanes)
            value = self.value(row, list(of_planes), at, lanes)
            if self.n % width == 0:
                self._write(value, row, at)
                continue
            with T.If(column + lanes <= self.n):
                with T.Then():
                    self._write(value, row, at)
                with T.Else():
                    self._store_rest(row, column, value, lanes)

    def expect(self, rows: list[Any], block: Any, columns: int) -> None:
        """Prefetch the cache lines of y that `store` will write for `rows` of codes, and those of the residual.

        A CPU has to read a line before it can write part of it.
        """
        for row in (of_codes // self.planes for of_codes in rows):
            for column in range(0, columns, CACHE_LINE):
                prefetch(self.y, [row, block * columns + column], write=True)
                if self.residual is not None:
                    prefetch(self.residual, [row, block * columns + column])

    def _store_rest(self, row: Any, column: Any, value: Any, lanes: int) -> None:
        """Write the columns of a vector that reaches past column n, one at a time."""
        from tvm.script.ir_builder import tirx as T

        spill = local(lanes)
        T.buffer_store(spill, value, [span(0, lanes)])
        for lane in range(lanes):
            with T.If(column + lane < self.n), T.Then():
                self._write(spill[lane], row, column + lane)

    def _write(self, value: Any, row: Any, at: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        T.buffer_store(self.y, value if self.residual is None else self.residual[row, at] + value, [row, at])


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The rows and blocks of columns that one thread computes completely, and their int32 sums.

    `sums` is [blocks, rows, columns].
    """

    first_row: Any
    row_count: Any
    first_block: Any
    block_count: Any
    sums: Any


@dataclasses.dataclass(frozen=True)
class ByteLinear:
    """Emit the body of a kernel: the sums of products over all rows of codes, and the `outputs` from them."""

    operands: Operands
    outputs: Outputs

    def __post_init__(self) -> None:
        """Raise ValueError unless tiles and chunks hold whole rows of y, that is all planes of a row."""
        kernel, planes = self.kernel, self.planes
        if any(count % planes for count in (kernel.few_rows, kernel.tile_rows)) or _CHUNK_ROWS % kernel.tile_rows:
            raise ValueError(f"tiles of {kernel.few_rows} and {kernel.tile_rows} rows do not hold {planes} planes")
        if kernel.paired and planes > 1:
            raise ValueError(f"a kernel that multiplies pairs of groups takes one plane, not {planes}")

    @property
    def kernel(self) -> ByteKernel:
        """Return the dot product and its tile sizes."""
        return self.operands.kernel

    @property
    def blocks(self) -> int:
        """Return the number of blocks of columns."""
        return -(-self.outputs.n // self.kernel.columns)

    @property
    def planes(self) -> int:
        """Return the number of rows of codes per row of y."""
        return self.outputs.planes

    def emit(self) -> None:
        """Emit one branch for each number of rows that fits the registers, and one for all larger numbers."""
        self._branch(self._counts(self.kernel.few_rows, (1, 2, 4)))

    def _counts(self, most: int, fewer: tuple[int, ...]) -> list[int]:
        """Return the numbers of rows of codes that a tile may have, the smallest first; all are whole rows of y."""
        return [self.planes * count for count in fewer if self.planes * count < most] + [most]

    def _branch(self, counts: list[int]) -> None:
        from tvm.script.ir_builder import tirx as T

        if not counts:
            self._many_rows()
            return
        with T.If(self.operands.rows <= counts[0]):
            with T.Then():
                self._few_rows(counts[0])
            with T.Else():
                self._branch(counts[1:])

    def _few_rows(self, count: int) -> None:
        """Emit the code for at most `count` rows of codes: every weight is read once and used for all of them."""
        from tvm.script.ir_builder import tirx as T

        operands = self.operands
        with T.parallel(0, self.blocks) as block:
            tile = Tile(self.kernel, count)
            rows = [T.bind(T.min(T.int64(row), operands.rows - 1)) for row in range(count)]
            with T.serial(0, operands.groups) as group:
                # With one row of codes the CPU's own prefetching keeps up, and ours would cost 1 %.
                if count > 1 and not self.kernel.paired:
                    operands.prefetch_ahead(block, group)
                operands.multiply(tile, rows, block, group)
            for row in range(count // self.planes):
                values = [tile.values(row * self.planes + plane) for plane in range(self.planes)]
                with T.If(row * self.planes < operands.rows), T.Then():
                    self.outputs.store(T.int64(row), block, values, self.kernel.lanes)

    def _many_rows(self) -> None:
        """Emit the code for many rows: chunks of rows and columns, and in each chunk panels that all its rows share."""
        from tvm.script.ir_builder import tirx as T

        kernel, operands = self.kernel, self.operands
        per_chunk = min(-(-_CHUNK_COLUMNS // kernel.columns), self.blocks)
        column_chunks = -(-self.blocks // per_chunk)
        # All chunks have about the same number of rows, since every thread gets the same number of chunks.
        row_chunks = T.bind((operands.rows + _CHUNK_ROWS - 1) // _CHUNK_ROWS)
        tiles = (operands.rows + row_chunks * kernel.tile_rows - 1) // (row_chunks * kernel.tile_rows)
        chunk_rows = T.bind(tiles * kernel.tile_rows)
        with T.parallel(0, row_chunks * column_chunks) as index:
            first_row = opaque(index // column_chunks * chunk_rows)
            first_block = opaque(index % column_chunks * per_chunk)
            row_count = opaque(T.max(T.int64(0), T.min(chunk_rows, operands.rows - first_row)))
            block_count = opaque(T.min(T.int64(per_chunk), self.blocks - first_block))
            sums = T.alloc_buffer((per_chunk, _CHUNK_ROWS, kernel.columns), "int32", scope="global")
            chunk = _Chunk(first_row, row_count, first_block, block_count, sums)
            pairs = Pairs(operands, _CHUNK_ROWS, per_chunk) if kernel.paired else None
            if pairs is not None:
                pairs.take_rows(first_row, row_count)
            depth = operands.panel_groups
            with T.serial(0, -(-operands.groups // depth)) as step:
                first = opaque(step * depth)
                count = opaque(T.min(T.int64(depth), operands.groups - first))
                with T.serial(0, block_count) as block:
                    panel = Panel(step, block, first_block + block, first, count)
                    if pairs is not None:
                        pairs.take_panel(panel)
                    self._tiles(chunk, panel, pairs)

    def _tiles(self, chunk: _Chunk, panel: Panel, pairs: Pairs | None) -> None:
        """Emit all rows of the chunk, a tile at a time; unless they work in pairs, tiles prefetch the next panel."""
        size = self.kernel.tile_rows
        tiles = opaque((chunk.row_count + size - 1) // size)
        if pairs is not None:
            self._each_tile(chunk, panel, tiles, pairs, lambda _, tile, rows: pairs.multiply(tile, rows, panel))
            return
        following = self.operands.panel_from(opaque(self._following(chunk, panel)), panel.count)

        def multiply(index: Any, tile: Tile, rows: list[Any]) -> None:
            def step(group: Any) -> None:
                self.operands.multiply(tile, rows, panel.source, panel.first + group)

            following.each_step(index, tiles, step)

        self._each_tile(chunk, panel, tiles, None, multiply)

    def _each_tile(
        self,
        chunk: _Chunk,
        panel: Panel,
        tiles: Any,
        pairs: Pairs | None,
        multiply: Callable[[Any, Tile, list[Any]], None],
    ) -> None:
        """Emit `multiply(index, tile, rows)` for every tile; the last tile has as few rows as possible."""
        from tvm.script.ir_builder import tirx as T

        size = self.kernel.tile_rows
        with T.serial(0, tiles) as index:
            first = T.bind(chunk.first_row + index * size)

            def one(count: int) -> None:
                rows = [T.bind(T.min(first + row, self.operands.rows - 1)) for row in range(count)]
                last = panel.first + panel.count == self.operands.groups
                with T.If(last), T.Then():
                    self.outputs.expect(rows[:: self.planes], panel.source, self.kernel.columns)
                tile = Tile(self.kernel, count)
                multiply(index, tile, rows)
                self._keep(chunk, panel, tile, index)
                with T.If(last), T.Then():
                    self._store_tile(chunk, panel, index, pairs)

            def smallest(counts: list[int]) -> None:
                if len(counts) == 1:
                    one(counts[0])
                    return
                with T.If(chunk.row_count - index * size > counts[-2]):
                    with T.Then():
                        one(counts[-1])
                    with T.Else():
                        smallest(counts[:-1])

            # A tile of one row would make the code a quarter longer, for a single last row, which is rare.
            smallest(self._counts(size, (2, 4) if self.planes == 1 else (1,)))

    def _following(self, chunk: _Chunk, panel: Panel) -> Any:
        """Return where the next panel starts, in groups: in the next block, else the next step, else the next chunk."""
        from tvm.script.ir_builder import tirx as T

        groups = self.operands.groups
        last_block, last_step = panel.block + 1 == chunk.block_count, panel.first + panel.count == groups
        block = T.if_then_else(T.And(last_block, T.Not(last_step)), chunk.first_block, panel.source + 1)
        first = T.if_then_else(last_step, T.int64(0), panel.first + panel.count)
        return block * groups + T.if_then_else(last_block, first, panel.first)

    def _keep(self, chunk: _Chunk, panel: Panel, tile: Tile, index: Any) -> None:
        """Add the tile to the sums of the chunk; the tile of the first panel starts them."""
        from tvm.script.ir_builder import tirx as T

        lanes = self.kernel.lanes

        def write(add: bool) -> None:
            for row in range(tile.count):
                for vector, value in enumerate(tile.values(row)):
                    place = [panel.block, index * self.kernel.tile_rows + row, span(vector * lanes, lanes)]
                    T.buffer_store(chunk.sums, chunk.sums[tuple(place)] + value if add else value, place)

        with T.If(panel.step == 0):
            with T.Then():
                write(False)
            with T.Else():
                write(True)

    def _store_tile(self, chunk: _Chunk, panel: Panel, index: Any, pairs: Pairs | None) -> None:
        """Emit the outputs of a tile after its last panel.

        y is in no cache by then, so it is written while the next tile is computed instead of all at the end.
        """
        from tvm.script.ir_builder import tirx as T

        lanes, size, planes = self.kernel.lanes, self.kernel.tile_rows, self.planes
        first = T.bind(index * size)
        rows = T.min(T.int64(size), chunk.row_count - first)
        with T.serial(0, rows // planes) as step:
            row = T.bind(first + step * planes)
            parts = [span(vector * lanes, lanes) for vector in range(self.kernel.tile_vectors)]
            totals = [[chunk.sums[panel.block, row + plane, part] for part in parts] for plane in range(planes)]
            if pairs is not None:
                excess = [pairs.excess(row, panel.block, part) for part in parts]
                totals = [[total - more for total, more in zip(totals[0], excess, strict=True)]]
            self.outputs.store((chunk.first_row + row) // planes, panel.source, totals, lanes)
