"""Emit linear layers in fp32: y = x · Wᵀ, with W packed in panels of w outputs as [N/w, K, w, 1].

The w outputs of a panel lie next to each other for every input. The layout serves any number of rows. Few rows read
each panel once from memory. Many rows are copied into blocks, which pass one by one over a chunk of a panel; the first
block converts the chunk to fp32 for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from passopt.targets.tvm.compiler.kernels.emit import (
    FUNCTION_ATTRIBUTES,
    argument,
    bind,
    load,
    local,
    opaque,
    prefetch_ahead,
    root_block,
    spread,
    store,
    symbol,
    to_float32,
)
from passopt.targets.tvm.compiler.kernels.linear.panel_layout import ITEM_BYTES, Panels
from passopt.targets.tvm.compiler.kernels.linear.prefetch import NextPanel

#: With up to so many blocks of rows, a thread takes one panel at a time, so that weights are read in memory order.
FEW_BLOCKS = 4
#: A weight of fewer elements is not worth waking threads for.
PARALLEL_WEIGHTS = 1 << 16


def linear(panels: Panels, residual: bool = False) -> Any:
    """Return the PrimFunc (x f32[M, K], packed, [scales,] [residual f32[M, N],] y f32[M, N]) of a linear layer.

    packed is [panels, K, width, 1] in the dtype of `panels`. Only int8 weights have scales [panels · width]. With
    `residual`, that argument is added to the result.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(FUNCTION_ATTRIBUTES)
        rows = symbol("rows")
        arguments = [
            ("x", (rows, panels.inputs), "float32"),
            ("packed", (panels.count, panels.inputs, panels.width, 1), panels.dtype),
            ("scales", (panels.count * panels.width,), panels.scales),
            ("residual", (rows, panels.outputs), "float32" if residual else None),
            ("y", (rows, panels.outputs), "float32"),
        ]
        buffers = {name: argument(name, shape, dtype) for name, shape, dtype in arguments if dtype is not None}
        with root_block():
            PanelLinear(panels, rows, **buffers).emit()
    return builder.get()


#: A function that emits the body given to it for every step (input) of a chunk.
Steps: TypeAlias = Callable[[Callable[[Any], None]], None]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Block number `block` of rows; its copy of a chunk starts at element `start` of the flat buffer `copied`."""

    copied: Any
    start: Any
    block: Any


@dataclasses.dataclass(frozen=True)
class _Place:
    """A chunk of a panel, and the block of rows that passes over it.

    If the weights are not fp32, the first block also stores the chunk as fp32 in `widen_to`, and the other blocks read
    it from there as `wide`.
    """

    panel: Any
    chunk: Any
    rows: _Rows
    wide: Any = None
    widen_to: Any = None


class PanelLinear:
    """Emit one kernel into the builder that is open."""

    def __init__(
        self, panels: Panels, m: Any, x: Any, packed: Any, y: Any, scales: Any = None, residual: Any = None
    ) -> None:
        from tvm.script.ir_builder import tirx as T

        self.panels, self.m = panels, m
        # Only the last index of an access may be a vector, so the last axis, of length 1, is dropped.
        self.packed = T.decl_buffer(packed.shape[:3], panels.dtype, data=packed.data)
        self.flat = T.decl_buffer((panels.count * panels.inputs * panels.width,), panels.dtype, data=packed.data)
        self.x, self.scales, self.residual, self.y = x, scales, residual, y
        self.lanes = panels.isa.lanes
        self.vectors = range(panels.vectors)
        self.columns = range(0, panels.width, self.lanes)
        self.chunk, self.span = panels.chunk, panels.blocks_per_span
        self.chunks = -(-panels.inputs // self.chunk)

    def emit(self) -> None:
        """Emit one branch for each size of tile, and one for all larger numbers of rows."""
        self._emit_for(list(self.panels.tiles))

    def _emit_for(self, sizes: list[int]) -> None:
        from tvm.script.ir_builder import tirx as T

        if not sizes:
            self.many_rows()
            return
        with T.If(self.m <= sizes[0]):
            with T.Then():
                self._few_rows(sizes[0])
            with T.Else():
                self._emit_for(sizes[1:])

    def _loop(self, extent: Any) -> Any:
        from tvm.script.ir_builder import tirx as T

        extent = T.int64(extent) if isinstance(extent, int) else extent
        if self.panels.outputs * self.panels.inputs < PARALLEL_WEIGHTS and not self.panels.isa.is_gpu:
            return T.serial(0, extent)
        return T.parallel(0, extent)

    # Few rows: each panel is read once from end to end, and its sums stay in registers.

    def _few_rows(self, rows: int) -> None:
        from tvm.script.ir_builder import tirx as T

        # If there are few results, each gets several partial sums, since an addition waits for the one before it.
        copies = max(1, 8 // (rows * len(self.vectors)))
        inputs = self.panels.inputs
        with self._loop(self.panels.count) as panel:
            sums = [self._sums(rows) for _ in range(copies)]
            with T.serial(0, inputs // copies) as step:
                first = (panel * inputs + step * copies) * self.panels.width
                prefetch_ahead(self.flat, first, copies * self.panels.width, ITEM_BYTES[self.panels.dtype])
                for copy, part in enumerate(sums):
                    self._add_products(part, rows, panel, step * copies + copy)
            for rest in range(inputs // copies * copies, inputs):
                self._add_products(sums[0], rows, panel, T.int64(rest))
            for row in range(rows):
                total = [self._total([part[row][vector] for part in sums]) for vector in self.vectors]
                self._finish_row(rows, row, panel, total)

    def _add_products(self, sums: Any, rows: int, panel: Any, k: Any) -> None:
        weights = [self._weights(panel, k, vector) for vector in self.vectors]
        for row in range(rows):
            value = spread(self.x[self._row(rows, row), k], self.lanes)
            for vector in self.vectors:
                into = sums[row][vector]
                store(into, load(into, [0], self.lanes) + value * weights[vector], [0], self.lanes)

    def _finish_row(self, rows: int, row: int, panel: Any, total: list[Any]) -> None:
        from tvm.script.ir_builder import tirx as T

        scaled = [
            value * self._scales(panel, vector) if self.scales is not None else value
            for vector, value in enumerate(total)
        ]
        if row == 0 or rows == 2:
            self._store_row(row, panel, scaled)
            return
        with T.If(self.m > row), T.Then():
            self._store_row(row, panel, scaled)

    def _store_row(self, row: Any, panel: Any, values: list[Any]) -> None:
        """Emit the writing of one row of a panel; the last panel may have fewer outputs."""
        from tvm.script.ir_builder import tirx as T

        width, outputs = self.panels.width, self.panels.outputs
        if outputs % width == 0:
            for vector, value in enumerate(values):
                at = [row, panel * width + vector * self.lanes]
                store(self.y, self._with_residual(value, at, self.lanes), at, self.lanes)
            return
        line = local(width)
        for vector, value in enumerate(values):
            store(line, value, [vector * self.lanes], self.lanes)
        with T.serial(0, self._least(width, outputs - panel * width)) as column:
            at = [row, panel * width + column]
            T.buffer_store(self.y, self._with_residual(line[column], at, 1), at)

    def _with_residual(self, value: Any, at: list[Any], lanes: int) -> Any:
        return value if self.residual is None else load(self.residual, at, lanes) + value

    # Many rows: blocks of rows and chunks of inputs.

    def many_rows(self) -> None:
        from tvm.script.ir_builder import tirx as T

        size = self.panels.rows
        blocks = T.bind((self.m + (size - 1)) // size)
        copied = T.alloc_buffer((self.chunks * blocks * self.chunk * size,), "float32")
        with self._loop(blocks) as block:
            self._copy_block(copied, blocks, block)
        # With few blocks, panels are read one after the other, as they lie in memory. With many, several panels form a
        # group, for which a chunk of the rows stays in the L2 cache.
        groups = T.bind(T.if_then_else(blocks > FEW_BLOCKS, T.int64(self.panels.groups), T.int64(self.panels.count)))
        with self._loop(groups) as index:
            wide = None if self.panels.dtype == "float32" else self._scratch()
            first = opaque(self.panels.first_of(index, groups))
            here = opaque(self.panels.first_of(index + 1, groups) - first)
            spans = (blocks + (self.span - 1)) // self.span
            with T.serial(0, self.chunks) as chunk, T.serial(0, spans) as span, T.serial(0, here) as within:
                panel = opaque(first + within)
                following = self._following(first, panel, chunk, within + 1 == here)
                first_block = opaque(span * self.span)
                count = opaque(self._least(self.span, blocks - first_block))
                with T.serial(0, count) as step:
                    block = opaque(first_block + step)
                    rows = _Rows(copied, opaque(self._block_start(blocks, chunk, block)), block)
                    steps = partial(following.each_step, step, count)
                    self._first_or_other_block(_Place(panel, chunk, rows, wide), steps, step)

    def _first_or_other_block(self, place: _Place, steps: Steps, step: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        if place.wide is None:
            self._block(place, steps)
            return
        with T.If(step == 0):
            with T.Then():
                self._block(dataclasses.replace(place, wide=None, widen_to=place.wide), steps)
            with T.Else():
                self._block(place, steps)

    def _following(self, first: Any, panel: Any, chunk: Any, last: Any) -> NextPanel:
        """Return the chunk of weights to prefetch: that of the next panel, or the next chunk of the group's first."""
        from tvm.script.ir_builder import tirx as T

        more = chunk + 1 < self.chunks
        next_panel = T.if_then_else(T.And(last, more), first, panel + 1)
        next_chunk = T.if_then_else(last, T.if_then_else(more, chunk + 1, 0), chunk)
        start = opaque((next_panel * self.panels.inputs + next_chunk * self.chunk) * self.panels.width)
        item_bytes = ITEM_BYTES[self.panels.dtype]
        return NextPanel(self.flat, start, self._length(chunk), self.panels.width * item_bytes, item_bytes)

    def _block_start(self, blocks: Any, chunk: Any, block: Any) -> Any:
        """Return where a block's copy of a chunk starts in [chunks, blocks, inputs of a chunk, rows of a block]."""
        return (chunk * blocks + block) * (self.chunk * self.panels.rows)

    def _scratch(self) -> Any:
        from tvm.script.ir_builder import tirx as T

        return T.alloc_buffer((self.chunk, self.panels.width), "float32")

    def _block(self, place: _Place, steps: Steps) -> None:
        """Emit one tile for a block of rows, of the smallest size that holds the rows that are left."""
        from tvm.script.ir_builder import tirx as T

        def tile(sizes: list[int]) -> None:
            if len(sizes) == 1:
                self._tile(sizes[0], place, steps)
                return
            with T.If(self.m - place.rows.block * self.panels.rows > sizes[1]):
                with T.Then():
                    self._tile(sizes[0], place, steps)
                with T.Else():
                    tile(sizes[1:])

        tile([size for size in reversed(self.panels.tiles) if size > 1])

    def _copy_block(self, copied: Any, blocks: Any, block: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        size = self.panels.rows
        with T.serial(0, self.chunks) as chunk:
            start = T.bind(self._block_start(blocks, chunk, block))
            with T.serial(0, self._length(chunk)) as k:
                for row in range(size):
                    source = self.x[self._least(block * size + row, self.m - 1), chunk * self.chunk + k]
                    T.buffer_store(copied, source, [start + k * size + row])

    def _tile(self, size: int, place: _Place, steps: Steps) -> None:
        from tvm.script.ir_builder import tirx as T

        sums = self._sums(size)
        start = opaque((place.panel * self.panels.inputs + place.chunk * self.chunk) * self.panels.width)

        def step(k: Any) -> None:
            if place.wide is not None:
                weights = [load(place.wide, [k, at], self.lanes) for at in self.columns]
            else:
                weights = self._converted(place, start, k)
            if place.widen_to is not None:
                weights = [bind(value) for value in weights]
                for at, value in zip(self.columns, weights, strict=True):
                    store(place.widen_to, value, [k, at], self.lanes)
            for row in range(size):
                value = spread(place.rows.copied[place.rows.start + k * self.panels.rows + row], self.lanes)
                for vector in self.vectors:
                    into = sums[row][vector]
                    store(into, load(into, [0], self.lanes) + value * weights[vector], [0], self.lanes)

        steps(step)
        if self.scales is not None:
            for row in sums:
                for vector in self.vectors:
                    scaled = load(row[vector], [0], self.lanes) * self._scales(place.panel, vector)
                    store(row[vector], scaled, [0], self.lanes)
        panel, chunk, block = place.panel, place.chunk, place.rows.block
        width, outputs = self.panels.width, self.panels.outputs
        whole = T.And(block * self.panels.rows + size <= self.m, panel * width + width <= outputs)
        with T.If(whole):
            with T.Then():
                self._add_whole_tile(sums, panel, chunk, block)
            with T.Else():
                self._add_part_of_tile(sums, panel, chunk, block)

    def _converted(self, place: _Place, start: Any, k: Any) -> list[Any]:
        """Return the weights of input `k` of a chunk in fp32; it starts at element `start` of `flat`."""
        stored = [load(self.flat, [start + k * self.panels.width + at], self.lanes) for at in self.columns]
        return [to_float32(value, self.panels.dtype, self.lanes, self.panels.isa) for value in stored]

    def _add_whole_tile(self, sums: Any, panel: Any, chunk: Any, block: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        for first in (True, False):
            with T.If(chunk == 0 if first else chunk > 0), T.Then():
                for row in range(len(sums)):
                    for vector in self.vectors:
                        at = [block * self.panels.rows + row, panel * self.panels.width + vector * self.lanes]
                        value = load(sums[row][vector], [0], self.lanes)
                        so_far = load(self.y, at, self.lanes) + value
                        total = self._with_residual(value, at, self.lanes) if first else so_far
                        store(self.y, total, at, self.lanes)

    def _add_part_of_tile(self, sums: Any, panel: Any, chunk: Any, block: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        size, width = len(sums), self.panels.width
        tile = T.alloc_buffer((size, width), "float32")
        for row in range(size):
            for vector in self.vectors:
                store(tile, load(sums[row][vector], [0], self.lanes), [row, vector * self.lanes], self.lanes)
        above = block * self.panels.rows
        here = self._least(size, self.m - above), self._least(width, self.panels.outputs - panel * width)
        with T.serial(0, here[0]) as row, T.serial(0, here[1]) as column:
            at = [above + row, panel * width + column]
            first = T.float32(0) if self.residual is None else self.residual[tuple(at)]
            before = T.if_then_else(chunk == 0, first, self.y[tuple(at)])
            T.buffer_store(self.y, before + tile[row, column], at)

    # Small helpers of both.

    def _sums(self, rows: int) -> list[list[Any]]:
        """Return sums for `rows` rows × the vectors of a panel, set to zero.

        Each vector has a buffer of its own, so that LLVM keeps each in a register.
        """
        from tvm.script.ir_builder import tirx as T

        sums = [[local(self.lanes) for _ in self.vectors] for _ in range(rows)]
        for row in sums:
            for vector in row:
                store(vector, spread(T.float32(0), self.lanes), [0], self.lanes)
        return sums

    def _total(self, parts: list[Any]) -> Any:
        values = [load(part, [0], self.lanes) for part in parts]
        while len(values) > 1:
            values = [sum(values[at + 1 : at + 2], values[at]) for at in range(0, len(values), 2)]
        return values[0]

    def _weights(self, panel: Any, k: Any, vector: int) -> Any:
        value = load(self.packed, [panel, k, vector * self.lanes], self.lanes)
        return to_float32(value, self.panels.dtype, self.lanes, self.panels.isa)

    def _scales(self, panel: Any, vector: int) -> Any:
        assert self.panels.scales is not None
        value = load(self.scales, [panel * self.panels.width + vector * self.lanes], self.lanes)
        return to_float32(value, self.panels.scales, self.lanes, self.panels.isa)

    def _length(self, chunk: Any) -> Any:
        if self.panels.inputs % self.chunk == 0:
            return self.chunk
        return self._least(self.chunk, self.panels.inputs - chunk * self.chunk)

    def _row(self, rows: int, row: int) -> Any:
        """Return a row number that exists in x, since some tiles have more rows than x."""
        return row if rows <= 2 or row == 0 else self._least(row, self.m - 1)

    def _least(self, left: Any, right: Any) -> Any:
        from tvm.script.ir_builder import tirx as T

        def wide(number: Any) -> Any:
            return T.int64(number) if isinstance(number, int) else number

        return T.min(wide(left), wide(right))
