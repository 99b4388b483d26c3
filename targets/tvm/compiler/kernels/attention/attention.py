"""Emit attention over the KV cache: softmax(capped q·kᵀ·scale + bias)·v, in one pass over positions (online softmax).

The function has two paths. Decoding one position reads the cache as it lies. Longer inputs work on blocks of query rows
and copy each tile of keys (unless they are fp32) and values to fp32 once for the whole block. Positions that no row of
a block sees are skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.ir.errors import ModelError
from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK
from passopt.targets.tvm.compiler.kernels.attention.position_parts import ITEMS, PartialRows, count_parts, part_of
from passopt.targets.tvm.compiler.kernels.attention.tiles import (
    TILE,
    RowState,
    Tiles,
    emit_outputs,
    emit_scores,
    emit_softmax,
)
from passopt.targets.tvm.machines import Isa

# Half of fp32's lowest number, as in the body of passopt::AlibiAttention.
_LOWEST_BIAS = -1.7014117e38


def attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    cache_dtype: str,
    isa: Isa,
    alibi: bool,
    softcap: float = 0.0,
) -> Any:
    """Return a PrimFunc (q, kc, vc, [ks, vs,] mask, extents, [slopes, positions,] y) for attention over the cache.

    q and y are f32[b, s, h, d]; kc is [b, hkv, B, d, 16] and vc is [b, hkv, 16·B, d], both in `cache_dtype`; mask is
    f32[mb, 1, s, t]; extents is int32[mb, ceil(s / QUERY_BLOCK), 2]. Only with `alibi` there are slopes f32[h] and
    positions f32[pb, t]. mb and pb are 1 or b. Only a cache of int8 codes has scales ks and vs f32[b, hkv, 16·B], one
    for each position and head. The cache holds t ≥ s positions. A `softcap` other than 0 caps scores.

    A row with a finite mask gets the softmax over that mask, even if it sees nothing (then about the mean of all
    values). A row of -inf gives 0, but with `alibi` the mean, as in the body of passopt::AlibiAttention.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    if heads % kv_heads:
        raise ModelError(f"attention of {heads} query heads over {kv_heads} kv heads: not a whole number for each")

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        batch, length, columns, blocks = (emit.symbol(name) for name in ("b", "s", "t", "B"))
        masks, alibis = (emit.symbol(name) for name in ("mb", "pb"))
        queries = emit.argument("q", (batch, length, heads, head_dim))
        keys = emit.argument("kc", (batch, kv_heads, blocks, head_dim, BLOCK), cache_dtype)
        values = emit.argument("vc", (batch, kv_heads, blocks * BLOCK, head_dim), cache_dtype)
        rows_of_scales = (batch, kv_heads, blocks * BLOCK)
        in_codes = cache_dtype == "int8"
        key_scales = emit.argument("ks", rows_of_scales) if in_codes else None
        value_scales = emit.argument("vs", rows_of_scales) if in_codes else None
        mask = emit.argument("mask", (masks, 1, length, columns))
        rows = (length + QUERY_BLOCK - 1) // QUERY_BLOCK
        extents = emit.argument("extents", (masks, rows, 2), "int32")
        slopes = emit.argument("slopes", (heads,)) if alibi else None
        positions = emit.argument("positions", (alibis, columns)) if alibi else None
        y = emit.argument("y", (batch, length, heads, head_dim))
        kernel = _Attention(
            Tiles(heads // kv_heads, head_dim, isa),
            kv_heads,
            scale,
            softcap,
            queries,
            keys,
            values,
            key_scales,
            value_scales,
            mask,
            extents,
            slopes,
            positions,
            y,
        )
        with emit.root_block(), T.If(length == 1):
            with T.Then():
                kernel.steps(batch)
            with T.Else(), T.parallel(0, batch * kv_heads * kernel.query_blocks) as index:
                kernel.block(index)
    return builder.get()


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Emit the code of the work items; the fields are the settings and the arguments of the function.

    Numbers from which many indices and conditions are computed are opaque to TVM, whose analyzer would otherwise take
    four times as long for the whole function. LLVM sees through it.
    """

    tiles: Tiles
    kv_heads: int
    scale: float
    softcap: float
    queries: Any
    keys: Any
    values: Any
    key_scales: Any
    value_scales: Any
    mask: Any
    extents: Any
    slopes: Any
    positions: Any
    y: Any

    @property
    def length(self) -> Any:
        return self.queries.shape[1]

    @property
    def columns(self) -> Any:
        return self.mask.shape[3]

    @property
    def query_blocks(self) -> Any:
        return (self.length + self.tiles.query_positions - 1) // self.tiles.query_positions

    def steps(self, batch: Any) -> None:
        """Emit decoding of one position per sequence; a work item is a kv head or, with few heads, a part of one."""
        from tvm.script.ir_builder import tirx as T

        items = batch * self.kv_heads
        if 2 * self.kv_heads > ITEMS or self.tiles.isa.is_gpu:
            with T.parallel(0, items) as index:
                self._step(index)
            return
        parts = emit.opaque(count_parts(items, self.columns))
        with T.If(parts == 1):
            with T.Then(), T.parallel(0, items) as index:
                self._step(index)
            with T.Else():
                found = PartialRows.allocate(self.tiles)
                with T.parallel(0, items * parts) as index:
                    self._part(index, parts, found)
                emit.each_row(
                    items, self.tiles.group * parts * self.tiles.head_dim, lambda i: self._join(i, parts, found)
                )

    def _step(self, index: Any) -> None:
        """Emit one work item of decoding: one kv head of one sequence, with its group of query heads."""
        from tvm.script.ir_builder import tirx as T

        item, kv_head = emit.opaque(index // self.kv_heads), emit.opaque(index % self.kv_heads)
        first, last = self._extent(item, 0)
        state = self._step_state(item, kv_head, first, last)
        with T.serial(0, self.tiles.group) as row:
            self._finish_row(state, row, item, 0, kv_head * self.tiles.group + row)

    def _part(self, index: Any, parts: Any, found: PartialRows) -> None:
        """Emit a work item as `_step` does, but over a part of the positions; its results are kept in `found`."""
        from tvm.script.ir_builder import tirx as T

        pair = emit.bind(index // parts)
        item, kv_head = emit.opaque(pair // self.kv_heads), emit.opaque(pair % self.kv_heads)
        first, last = part_of(*self._extent(item, 0), index % parts, parts)
        state = self._step_state(item, kv_head, first, last)
        with T.serial(0, self.tiles.group) as row:
            found.keep(index, row, state)

    def _join(self, pair: Any, parts: Any, found: PartialRows) -> None:
        from tvm.script.ir_builder import tirx as T

        item, kv_head = emit.opaque(pair // self.kv_heads), emit.opaque(pair % self.kv_heads)
        with T.serial(0, self.tiles.group) as row:
            found.join(pair * parts, parts, row, self.y, [item, 0, kv_head * self.tiles.group + row])

    def _step_state(self, item: Any, kv_head: Any, first: Any, last: Any) -> RowState:
        """Emit the attention of the query heads of one kv head over columns `first` to `last`."""
        from tvm.script.ir_builder import tirx as T

        tiles, lanes, group = self.tiles, self.tiles.isa.lanes, self.tiles.group
        state = RowState.allocate(group, tiles)
        with T.serial(0, group) as row:
            self._start_row(state, row, item, 0, kv_head * group + row)
        sets = [(start, min(tiles.rows, group - start)) for start in range(0, group, tiles.rows)]
        with T.serial(0, (last - first + TILE - 1) // TILE) as tile:
            column = emit.opaque(first + tile * TILE)
            width = emit.opaque(T.min(TILE, last - column))
            for start, rows in sets:
                self._step_scores(state, start, rows, item, kv_head, column, width)
            units = emit.opaque((width + tiles.unit - 1) // tiles.unit)
            with T.serial(0, group) as row:
                self._softmax(state, row, item, 0, kv_head * group + row, column, units)
            for start, rows in sets:
                full = tiles.vectors_for(rows, 8) * lanes

                def value(base: Any, offset: int, width: int, position: Any, column: Any = column) -> Any:
                    at = [item, kv_head, column + position, base + offset]
                    self._fetch_ahead(self.values, [item, kv_head, at[2] + TILE, at[3]])
                    return emit.load_float32(self.values, at, width, tiles.isa)

                def add(base: Any, span: int, start: int = start, rows: int = rows, width: Any = width) -> None:
                    widths = [lanes] * (span // lanes) or [span]
                    emit_outputs(state, start, rows, base, widths, width, lambda *at: value(base, *at))

                emit.each_span(tiles.head_dim, full, add)
        return state

    def _step_scores(
        self, state: RowState, start: int, rows: int, item: Any, kv_head: Any, column: Any, width: Any
    ) -> None:
        """Emit the scores of one set of rows for a tile, with several blocks of keys at once."""
        from tvm.script.ir_builder import tirx as T

        tiles, lanes = self.tiles, self.tiles.isa.lanes
        vectors = max(tiles.vectors_for(rows, TILE // lanes), BLOCK // lanes)
        positions = vectors * lanes
        with T.serial(0, (width + positions - 1) // positions) as part:
            start_block = (column + part * positions) // BLOCK
            numbers = [self._key_block(start_block + block) for block in range(positions // BLOCK)]

            def key(j: int, channel: Any) -> Any:
                at = [item, kv_head, numbers[j * lanes // BLOCK], channel, j * lanes % BLOCK]
                self._fetch_ahead(self.keys, [item, kv_head, at[2] + TILE // BLOCK, *at[3:]])
                return emit.load_float32(self.keys, at, lanes, tiles.isa)

            emit_scores(state, start, rows, part * positions, vectors, key, tiles)

    def block(self, index: Any) -> None:
        """Emit one work item of prefill: a block of query positions for one kv head of one sequence."""
        from tvm.script.ir_builder import tirx as T

        tiles, unit, group = self.tiles, self.tiles.unit, self.tiles.group
        count = self.query_blocks
        head_index, turn = emit.bind(index // count), emit.bind(index % count)
        item, kv_head = emit.opaque(head_index // self.kv_heads), emit.opaque(head_index % self.kv_heads)
        # The order is first, last, second, last but one …, so that neighbours, which one thread computes, take as long
        # together as other neighbours do.
        number = emit.opaque(T.if_then_else(turn % 2 == 0, turn // 2, count - 1 - turn // 2))
        position = emit.opaque(number * tiles.query_positions)
        used = emit.opaque(T.min(tiles.query_positions, self.length - position) * group)
        sets = emit.opaque((used + tiles.rows - 1) // tiles.rows)

        state = RowState.allocate(tiles.query_rows, tiles)
        new_keys = None if self.keys.dtype == "float32" else emit.scratch(TILE // BLOCK, tiles.head_dim, BLOCK)
        new_values = emit.scratch(tiles.channels // unit, TILE, unit)

        def place(row: Any) -> tuple[Any, Any]:
            """Return the position and the head of a row; rows behind the end repeat the last position."""
            return T.min(position + row // group, self.length - 1), kv_head * group + row % group

        with T.serial(0, sets * tiles.rows) as row:
            self._start_row(state, row, item, *place(row))
        first, last = self._extent(item, position // QUERY_BLOCK)
        with T.serial(0, (last - first + TILE - 1) // TILE) as tile:
            column = emit.opaque(first + tile * TILE)
            units = emit.opaque((T.min(TILE, last - column) + unit - 1) // unit)
            self._fetch_mask(item, position, column)
            if new_keys is not None:
                self._copy_keys(new_keys, item, kv_head, column, units)
            self._copy_values(new_values, item, kv_head, column, units)
            with T.serial(0, units) as part:
                key = self._keys_of(new_keys, item, kv_head, column, part)
                with T.serial(0, sets) as set_:
                    emit_scores(state, set_ * tiles.rows, tiles.rows, part * unit, tiles.vectors, key, tiles)
            with T.serial(0, sets * tiles.rows) as row:
                self._softmax(state, row, item, *place(row), column, units)
            with T.serial(0, tiles.channels // unit) as chunk, T.serial(0, sets) as set_:

                def value(offset: int, width: int, at: Any, chunk: Any = chunk) -> Any:
                    return emit.load(new_values, [chunk, at, offset], width)

                widths = [tiles.isa.lanes] * tiles.vectors
                emit_outputs(state, set_ * tiles.rows, tiles.rows, chunk * unit, widths, units * unit, value)
        with T.serial(0, used) as row:
            self._finish_row(state, row, item, *place(row))

    def _keys_of(self, copy: Any, item: Any, kv_head: Any, column: Any, part: Any) -> Any:
        """Return the function that loads vector j of a unit of keys: from the copy, or from an fp32 cache itself."""
        lanes, count = self.tiles.isa.lanes, self.tiles.unit // BLOCK
        numbers = [part * count + block for block in range(count)]
        if copy is None:
            numbers = [self._key_block(column // BLOCK + number) for number in numbers]

        def key(j: int, channel: Any) -> Any:
            at = [numbers[j * lanes // BLOCK], channel, j * lanes % BLOCK]
            return emit.load(self.keys, [item, kv_head, *at], lanes) if copy is None else emit.load(copy, at, lanes)

        return key

    def _key_block(self, number: Any) -> Any:
        """Return a block number inside the cache; a tile may reach past its end, where positions get no weight."""
        from tvm.script.ir_builder import tirx as T

        return emit.bind(T.min(number, self.keys.shape[2] - 1))

    def _fetch_ahead(self, cache: Any, at: list[Any]) -> None:
        """Prefetch part of the next tile of a narrow cache; an fp32 tile takes long enough to arrive in time."""
        if cache.dtype != "float32":
            emit.prefetch(cache, at, emit.L2)

    def _fetch_mask(self, item: Any, position: Any, column: Any) -> None:
        """Prefetch a tile of the mask: short pieces of long rows, which no hardware prefetcher foresees."""
        from tvm.script.ir_builder import tirx as T

        mask_item = emit.bind(T.min(item, self.mask.shape[0] - 1))
        with T.serial(0, self.tiles.query_positions) as row, T.unroll(TILE // emit.CACHE_LINE) as line:
            at = (
                mask_item,
                0,
                T.min(position + row, self.length - 1),
                T.min(column + line * emit.CACHE_LINE, self.columns - 1),
            )
            emit.prefetch(self.mask, at)

    def _copy_keys(self, copy: Any, item: Any, kv_head: Any, column: Any, units: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        with T.serial(0, units * (self.tiles.unit // BLOCK)) as block:
            number = self._key_block(column // BLOCK + block)
            with T.serial(0, self.tiles.head_dim) as channel:
                key = emit.load_float32(self.keys, [item, kv_head, number, channel, 0], BLOCK, self.tiles.isa)
                emit.store(copy, key, [block, channel, 0], BLOCK)

    def _copy_values(self, copy: Any, item: Any, kv_head: Any, column: Any, units: Any) -> None:
        """Copy a tile of values, grouped by units of channels, with zeros behind the last position and channel."""
        from tvm.script.ir_builder import tirx as T

        tiles, unit = self.tiles, self.tiles.unit

        def fill(position: Any, start: Any, width: int, value: Any) -> None:
            emit.store(copy, value, [start // unit, position, start % unit], width)

        with T.serial(0, units * unit) as position, T.If(column + position < self.columns):
            with T.Then():

                def take(start: Any, width: int) -> None:
                    at = [item, kv_head, column + position, start]
                    fill(position, start, width, emit.load_float32(self.values, at, width, tiles.isa))

                emit.each_span(tiles.head_dim, unit, take)
                for start, width in emit.spans_between(tiles.head_dim, tiles.channels):
                    fill(position, start, width, emit.spread(0.0, width))
            with T.Else():
                emit.each_span(
                    tiles.channels, unit, lambda start, width: fill(position, start, width, emit.spread(0.0, width))
                )

    def _extent(self, item: Any, block: Any) -> tuple[Any, Any]:
        """Return the first column of a block of rows, rounded down to a block of keys, and one past the last."""
        from tvm.script.ir_builder import tirx as T

        number = emit.bind(T.min(item, self.mask.shape[0] - 1))
        first = emit.opaque(T.Cast("int64", self.extents[number, block, 0]) // BLOCK * BLOCK)
        return first, emit.opaque(T.Cast("int64", self.extents[number, block, 1]))

    def _start_row(self, state: RowState, row: Any, item: Any, position: Any, head: Any) -> None:
        def scale(start: Any, width: int) -> None:
            query = emit.load(self.queries, [item, position, head, start], width)
            emit.store(state.queries, query * emit.spread(self.scale, width), [row, start], width)

        emit.each_span(self.tiles.head_dim, self.tiles.isa.lanes, scale)
        state.start(row, self.tiles)

    def _finish_row(self, state: RowState, row: Any, item: Any, position: Any, head: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        total = emit.bind(state.sums[row])
        factor = emit.bind(T.if_then_else(total > T.float32(0), T.float32(1) / total, T.float32(0)))

        def divide(start: Any, width: int) -> None:
            result = emit.load(state.outputs, [row, start], width) * emit.spread(factor, width)
            emit.store(self.y, result, [item, position, head, start], width)

        emit.each_span(self.tiles.head_dim, self.tiles.isa.lanes, divide)

    def _softmax(self, state: RowState, row: Any, item: Any, position: Any, head: Any, column: Any, units: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        mask_item = emit.bind(T.min(item, self.mask.shape[0] - 1))
        row_position = emit.bind(position)
        kv_head = emit.bind(head // self.tiles.group) if self.key_scales is not None else None

        def read(score: Any, at: Any, lanes: int) -> Any:
            """Return a score of numbers, capped; one of codes is multiplied by the scales of their positions."""
            if kv_head is not None:
                score = score * emit.load(self.key_scales, [item, kv_head, at], lanes)
            return self._cap(score, lanes)

        def scaled(weights: Any, at: Any, lanes: int) -> Any:
            return weights * emit.load(self.value_scales, [item, kv_head, at], lanes)

        def masked(score: Any, at: Any, lanes: int) -> Any:
            return read(score, at, lanes) + emit.load(self.mask, [mask_item, 0, row_position, at], lanes)

        in_codes = scaled if kv_head is not None else None
        if self.slopes is None:
            emit_softmax(state, row, column, units, self.columns, masked, self.tiles, in_codes)
            return

        slope = emit.bind(self.slopes[head])
        alibi_item = emit.bind(T.min(item, self.positions.shape[0] - 1))
        newest = emit.bind(self.positions[alibi_item, self.columns - 1])

        def biased(score: Any, at: Any, lanes: int) -> Any:
            # Distances are relative to the newest position. That changes no weight, but near it, where weights matter,
            # the bias is small and adds no rounding; otherwise it would take 12 of 24 bits at position 4095.
            distance = emit.load(self.positions, [alibi_item, at], lanes) - emit.spread(newest, lanes)
            bias = distance * emit.spread(slope, lanes)
            bias = bias + emit.load(self.mask, [mask_item, 0, row_position, at], lanes)
            return read(score, at, lanes) + T.max(bias, emit.spread(_LOWEST_BIAS, lanes))

        emit_softmax(state, row, column, units, self.columns, biased, self.tiles, in_codes)

    def _cap(self, score: Any, lanes: int) -> Any:
        """Return softcap·tanh(score / softcap), computed as tanh(z) = 1 - 2 / (e^2z + 1)."""
        if not self.softcap:
            return score
        power = emit.exp(score * emit.spread(2 / self.softcap, lanes), lanes)
        share = emit.spread(2 * self.softcap, lanes) / (power + emit.spread(1.0, lanes))
        return emit.spread(float(self.softcap), lanes) - share
