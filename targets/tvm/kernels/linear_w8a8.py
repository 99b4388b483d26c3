"""Linear layers over int8 weights and int8 activations: exact int32 sums, then row scale times weight scale, fp32.

The levels differ in the dot product and agree in every bit of the sums: |code| ≤ 127, so K ≤ 133,000 cannot overflow
int32, and no step saturates. One weight layout serves few rows (read from memory as it lies) and many (tiles in cache).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from onnx_ir import DataType

from passopt.ir.expressions import Expression
from passopt.targets.tvm.features import Isa
from passopt.targets.tvm.kernels.linear import LinearPlan
from passopt.targets.tvm.kernels.quantize_rows import CodesLayout, codes_layout


@dataclasses.dataclass(frozen=True)
class ByteKernel:
    """The inner product of a level and the sizes of its tiles.

    `dot(sums, codes, weights)` adds to `lanes` int32 sums the products of `group` neighbouring codes with as many of
    each weight row: codes are a broadcast vector of lanes · group elements of their dtype, weights of `panel_dtype`.
    """

    lanes: int
    group: int
    #: Vectors of outputs per block, and rows whose sums fit the registers together with them.
    tile_vectors: int
    few_rows: int
    #: The same where many rows share a panel.
    tile_rows: int
    #: What weights are widened to, once per panel; int8 is used where it lies.
    panel_dtype: str
    dot: Callable[[Any, Any, Any], Any]

    @property
    def paired(self) -> bool:
        """Two groups are multiplied at once, by Winograd's identity: half the products for more sums, all exact.

        x₀w₀ + x₂w₂ = (x₀ + w₂)(x₂ + w₀) - x₀x₂ - w₀w₂; what is taken off is per row and per output. Multiplying int16
        pairs has two ports, adding them four, and adds take ports from products: 87 to 75 products per ns on Zen 3.
        """
        return self.panel_dtype == "int16"

    @property
    def columns(self) -> int:
        """Outputs per block of packed weights."""
        return self.lanes * self.tile_vectors


def byte_kernel(isa: Isa) -> ByteKernel:
    if isa.has_byte_dot:
        return ByteKernel(16, 4, 4, 6, 6, "int8", _dot_vnni)
    if isa.is_gpu:
        return ByteKernel(4, 4, 1, 2, 2, "int8", _dot_numbers)
    if isa.name == "avx2":
        return ByteKernel(8, 2, 2, 6, 4, "int16", _dot_avx2)
    return ByteKernel(4, 2, 2, 4, 4, "int16", _dot_plain)


def plan_w8a8(codes: Expression, scales: Expression, isa: Isa) -> LinearPlan:
    """y = (codes of x · codesᵀ) · row scale · scales, for int8 codes [N, K] and scales [N].

    The function takes (codes as `codes_layout(K, isa)` says, row_scales f32[M], *weights, y f32[M, N]).
    """
    n, k = codes.shape
    kernel = byte_kernel(isa)
    padded = -(-n // kernel.columns) * kernel.columns
    weights = [
        ("packed", codes.pad(1, _whole(k)).pack(kernel.columns, kernel.group)),
        ("scales", scales.cast(DataType.FLOAT).pad(0, padded)),
    ]
    if codes_layout(k, isa).zero_point:
        weights.append(("sums", codes.row_sums().pad(0, padded)))
    function = linear_w8a8(n, k, codes_layout(k, isa), kernel)
    return LinearPlan(f"linear_w8a8_{n}_{k}", tuple(weights), function)


#: Inner products of a tile: its weights, 64 KiB at most, stay in cache while all rows pass by.
_DEPTH = 512
#: Rows and columns of a chunk of work; int32 sums of a chunk are kept between tiles.
_CHUNK_ROWS = 192
_CHUNK_COLUMNS = 128


def linear_w8a8(n: int, k: int, layout: CodesLayout, kernel: ByteKernel) -> Any:
    """The PrimFunc of `plan_w8a8`; row sums of the weights are an argument where codes have a zero point."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    blocks, groups = -(-n // kernel.columns), _whole(k) // kernel.group
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        rows = tirx.Var("rows", "int64")
        shape = (blocks, groups, kernel.columns, kernel.group)
        codes = T.match_buffer(T.arg("codes", T.handle()), (rows, layout.width), layout.dtype)
        row_scales = T.match_buffer(T.arg("row_scales", T.handle()), (rows,), "float32")
        packed = T.match_buffer(T.arg("packed", T.handle()), shape, "int8")
        scales = T.match_buffer(T.arg("scales", T.handle()), (blocks * kernel.columns,), "float32")
        sums = (
            T.match_buffer(T.arg("sums", T.handle()), (blocks * kernel.columns,), "int32")
            if layout.zero_point
            else None
        )
        y = T.match_buffer(T.arg("y", T.handle()), (rows, n), "float32")
        emitter = _Emitter(n, k, layout, kernel, rows, codes, row_scales, packed, scales, sums, y)
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            emitter.emit()
    return builder.get()


@dataclasses.dataclass(frozen=True)
class _Emitter:
    """Writes the body; the buffers are those of the PrimFunc."""

    n: int
    k: int
    layout: CodesLayout
    kernel: ByteKernel
    rows: Any
    codes: Any
    row_scales: Any
    packed: Any
    scales: Any
    sums: Any
    y: Any

    @property
    def groups(self) -> int:
        return _whole(self.k) // self.kernel.group

    @property
    def blocks(self) -> int:
        return -(-self.n // self.kernel.columns)

    def emit(self) -> None:
        """One branch per number of rows that fits the registers, the last for all that do not."""
        from tvm.script.ir_builder import tirx as T

        self._branch([count for count in (1, 2, 4) if count < self.kernel.few_rows] + [self.kernel.few_rows], T)

    def _branch(self, counts: list[int], T: Any) -> None:
        if not counts:
            self._many_rows()
            return
        with T.If(self.rows <= counts[0]):
            with T.Then():
                self._few_rows(counts[0])
            with T.Else():
                self._branch(counts[1:], T)

    def _few_rows(self, count: int) -> None:
        """At most `count` rows: every weight is read once and used for all of them."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        with T.parallel(0, self.blocks) as block:
            tile = self._tile(count)
            rows = [T.bind(T.min(T.int64(row), self.rows - 1)) for row in range(count)]
            self._clear(tile, count)
            vectors = range(kernel.tile_vectors)
            with T.serial(0, self.groups) as group:
                widened = [T.bind(self._widened(block, group, vector)) for vector in range(kernel.tile_vectors)]
                self._multiply(tile, rows, group, widened)
            for row in range(count):
                with T.If(row < self.rows), T.Then():
                    self._store(T.int64(row), block, [tile[row, vector, _lanes(kernel.lanes)] for vector in vectors])

    def _many_rows(self) -> None:
        """Chunks of rows and columns; in each, panels of `_DEPTH` products, their weights widened once."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        per_chunk = min(-(-_CHUNK_COLUMNS // kernel.columns), self.blocks)
        column_chunks = -(-self.blocks // per_chunk)
        depth = _DEPTH // kernel.group
        with T.parallel(0, (self.rows + _CHUNK_ROWS - 1) // _CHUNK_ROWS * column_chunks) as chunk:
            partial = T.alloc_buffer((per_chunk, _CHUNK_ROWS, kernel.columns), "int32", scope="global")
            panel = T.alloc_buffer((depth, kernel.columns * kernel.group), kernel.panel_dtype, scope="global")
            row_excess = T.alloc_buffer((_CHUNK_ROWS,), "int32", scope="global")
            excess = T.alloc_buffer((per_chunk, kernel.columns), "int32", scope="global")
            first_row = T.bind(chunk // column_chunks * _CHUNK_ROWS)
            first_block = T.bind(chunk % column_chunks * per_chunk)
            row_count = T.bind(T.min(T.int64(_CHUNK_ROWS), self.rows - first_row))
            block_count = T.bind(T.min(T.int64(per_chunk), self.blocks - first_block))
            if kernel.paired:
                with T.serial(0, row_count) as row:
                    self._row_excess(row_excess, row, first_row + row)
            with T.serial(0, -(-self.groups // depth)) as step:
                first_group = T.bind(step * depth)
                group_count = T.bind(T.min(T.int64(depth), self.groups - first_group))
                with T.serial(0, block_count) as block:
                    if kernel.paired:
                        self._panel(panel, excess, block, first_block + block, first_group, group_count, step)
                    with T.serial(0, (row_count + kernel.tile_rows - 1) // kernel.tile_rows) as index:
                        first = T.bind(first_row + index * kernel.tile_rows)
                        rows = [T.bind(T.min(first + row, self.rows - 1)) for row in range(kernel.tile_rows)]
                        tile = self._tile(kernel.tile_rows)
                        self._clear(tile, kernel.tile_rows)
                        if kernel.paired:
                            self._multiply_pairs(tile, rows, panel, first_group, group_count)
                        else:
                            self._multiply_groups(tile, rows, first_block + block, first_group, group_count)
                        self._keep(partial, tile, block, index, step)
            with T.serial(0, row_count) as row, T.serial(0, block_count) as block:
                parts = [T.ramp(vector * kernel.lanes, 1, kernel.lanes) for vector in range(kernel.tile_vectors)]
                totals = [partial[block, row, part] for part in parts]
                if kernel.paired:
                    taken = T.broadcast(row_excess[row], kernel.lanes)
                    totals = [total - taken - excess[block, part] for total, part in zip(totals, parts, strict=True)]
                self._store(first_row + row, first_block + block, totals)

    def _multiply_groups(self, tile: Any, rows: list[Any], block: Any, first: Any, count: Any) -> None:
        from tvm.script.ir_builder import tirx as T

        with T.serial(0, count) as group:
            weights = [
                T.bind(self._widened(block, first + group, vector)) for vector in range(self.kernel.tile_vectors)
            ]
            self._multiply(tile, rows, first + group, weights)

    def _multiply_pairs(self, tile: Any, rows: list[Any], panel: Any, first: Any, count: Any) -> None:
        """Two groups of columns at once, without what `paired` takes off."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        with T.serial(0, count // 2) as pair:
            low, high = (
                [T.bind(panel[pair * 2 + half, self._part(vector)]) for vector in range(kernel.tile_vectors)]
                for half in range(2)
            )
            for row, at in enumerate(rows):
                even, odd = (self._broadcast(at, first + pair * 2 + half) for half in range(2))
                for vector in range(kernel.tile_vectors):
                    place = [row, vector, _lanes(kernel.lanes)]
                    T.buffer_store(tile, kernel.dot(tile[tuple(place)], even + high[vector], odd + low[vector]), place)

    def _panel(
        self, panel: Any, excess: Any, block: Any, source: Any, first_group: Any, group_count: Any, step: Any
    ) -> None:
        """Widens the weights of one block and step; what their pairs add to every row goes to `excess`."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        vectors = range(kernel.tile_vectors)
        own = self._tile(1)
        self._clear(own, 1)
        with T.serial(0, group_count // 2) as pair:
            for vector in vectors:
                low, high = (T.bind(self._widened(source, first_group + pair * 2 + half, vector)) for half in range(2))
                for half, part in enumerate((low, high)):
                    T.buffer_store(panel, part, [pair * 2 + half, self._part(vector)])
                place = [0, vector, _lanes(kernel.lanes)]
                T.buffer_store(own, kernel.dot(own[tuple(place)], low, high), place)
        for vector in vectors:
            part = T.ramp(vector * kernel.lanes, 1, kernel.lanes)
            value = own[0, vector, _lanes(kernel.lanes)]
            with T.If(step == 0):
                with T.Then():
                    T.buffer_store(excess, value, [block, part])
                with T.Else():
                    T.buffer_store(excess, excess[block, part] + value, [block, part])

    def _row_excess(self, row_excess: Any, row: Any, at: Any) -> None:
        """What the pairs of a row's codes add to each of its outputs: the sum of even groups times odd ones."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        width = kernel.lanes * kernel.group
        own = T.alloc_buffer((kernel.lanes,), "int32", scope="local")
        T.buffer_store(own, T.broadcast(T.int32(0), kernel.lanes), [_lanes(kernel.lanes)])
        with T.serial(0, -(-self.k // width)) as step:
            codes = T.bind(self.codes.vload([at, step * width], f"{self.layout.dtype}x{width}"))
            # Odd groups moved onto the even ones of the same 64 bits; zeros onto the odd ones.
            halves = T.reinterpret(f"uint64x{width // 4}", codes)
            moved = T.shift_right(halves, T.broadcast(T.uint64(32), width // 4))
            shifted = T.reinterpret(f"{self.layout.dtype}x{width}", moved)
            T.buffer_store(own, kernel.dot(own[_lanes(kernel.lanes)], codes, shifted), [_lanes(kernel.lanes)])
        total = own[0]
        for lane in range(1, kernel.lanes):
            total = total + own[lane]
        T.buffer_store(row_excess, total, [row])

    def _keep(self, partial: Any, tile: Any, block: Any, index: Any, step: Any) -> None:
        """Add the tile to the sums of the chunk; the first one starts them."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel

        def write(add: bool) -> None:
            for row in range(kernel.tile_rows):
                for vector in range(kernel.tile_vectors):
                    place = [block, index * kernel.tile_rows + row, T.ramp(vector * kernel.lanes, 1, kernel.lanes)]
                    value = tile[row, vector, _lanes(kernel.lanes)]
                    T.buffer_store(partial, partial[tuple(place)] + value if add else value, place)

        with T.If(step == 0):
            with T.Then():
                write(False)
            with T.Else():
                write(True)

    def _tile(self, count: int) -> Any:
        from tvm.script.ir_builder import tirx as T

        return T.alloc_buffer((count, self.kernel.tile_vectors, self.kernel.lanes), "int32", scope="local")

    def _clear(self, tile: Any, count: int) -> None:
        from tvm.script.ir_builder import tirx as T

        for row in range(count):
            for vector in range(self.kernel.tile_vectors):
                zeros = T.broadcast(T.int32(0), self.kernel.lanes)
                T.buffer_store(tile, zeros, [row, vector, _lanes(self.kernel.lanes)])

    def _part(self, vector: int) -> Any:
        from tvm.script.ir_builder import tirx as T

        width = self.kernel.lanes * self.kernel.group
        return T.ramp(vector * width, 1, width)

    def _widened(self, block: Any, group: Any, vector: int) -> Any:
        """The weights of `lanes` outputs and one group, as the dot product takes them."""
        kernel = self.kernel
        width = kernel.lanes * kernel.group
        read = self.packed.vload([block, group, vector * kernel.lanes, 0], f"int8x{width}")
        return read if kernel.panel_dtype == "int8" else read.astype(f"{kernel.panel_dtype}x{width}")

    def _broadcast(self, row: Any, group: Any) -> Any:
        """One group of a row's codes, in all lanes."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        kernel, dtype = self.kernel, self.layout.dtype
        if kernel.dot is _dot_numbers:
            read = self.codes.vload([row, group * kernel.group], f"{dtype}x{kernel.group}")
            return tirx.Shuffle([read] * kernel.lanes, list(range(kernel.group * kernel.lanes)))
        word = T.reinterpret("int32", self.codes.vload([row, group * kernel.group], f"{dtype}x{kernel.group}"))
        return T.bind(T.reinterpret(f"{dtype}x{kernel.lanes * kernel.group}", T.broadcast(word, kernel.lanes)))

    def _multiply(self, tile: Any, rows: list[Any], group: Any, weights: list[Any]) -> None:
        """One group of columns of every row, times every vector of weights, onto the tile."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        for row, at in enumerate(rows):
            broadcast = self._broadcast(at, group)
            for vector, weight in enumerate(weights):
                place = [row, vector, _lanes(kernel.lanes)]
                T.buffer_store(tile, kernel.dot(tile[tuple(place)], broadcast, weight), place)

    def _store(self, row: Any, block: Any, totals: list[Any]) -> None:
        """Scaled sums of one row and one block of columns, without those past N."""
        from tvm.script.ir_builder import tirx as T

        kernel = self.kernel
        factor = self.row_scales[row]

        lanes = kernel.lanes
        for vector, total in enumerate(totals):
            column = block * kernel.columns + vector * lanes
            at = T.ramp(column, 1, lanes)
            if self.sums is not None:
                total = total - self.sums[at] * T.broadcast(T.int32(self.layout.zero_point), lanes)
            scaled = total.astype(f"float32x{lanes}") * T.broadcast(factor, lanes) * self.scales[at]
            if self.n % kernel.columns == 0:
                T.buffer_store(self.y, scaled, [row, at])
                continue
            with T.If(column + lanes <= self.n):
                with T.Then():
                    T.buffer_store(self.y, scaled, [row, at])
                with T.Else():
                    self._store_rest(row, column, scaled)

    def _store_rest(self, row: Any, column: Any, scaled: Any) -> None:
        """The columns of a vector that reaches past N, one at a time."""
        from tvm.script.ir_builder import tirx as T

        lanes = self.kernel.lanes
        spill = T.alloc_buffer((lanes,), "float32", scope="local")
        T.buffer_store(spill, scaled, [_lanes(lanes)])
        for lane in range(lanes):
            with T.If(column + lane < self.n), T.Then():
                T.buffer_store(self.y, spill[lane], [row, column + lane])


def _whole(k: int) -> int:
    """K with zeros up to whole groups of bytes and whole pairs of groups of int16."""
    return -(-k // 4) * 4


def _lanes(count: int) -> Any:
    from tvm.script.ir_builder import tirx as T

    return T.ramp(0, 1, count)


def _dot_vnni(sums: Any, codes: Any, weights: Any) -> Any:
    from tvm.script.ir_builder import tirx as T

    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, codes, weights)


def _dot_avx2(sums: Any, codes: Any, weights: Any) -> Any:
    """Products of int16 pairs fill int32 (vpmaddwd): nothing saturates, unlike the byte pairs of vpmaddubsw."""
    from tvm.script.ir_builder import tirx as T

    return sums + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", codes, weights)


def _dot_plain(sums: Any, codes: Any, weights: Any) -> Any:
    """The same in plain operations; LLVM finds SSE2's pmaddwd in them."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=2)


def _dot_numbers(sums: Any, codes: Any, weights: Any) -> Any:
    """For a GPU, whose lanes come apart into numbers: no word holds several codes."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=4)


def dot_of_operations(sums: Any, codes: Any, weights: Any, lanes: int, group: int) -> Any:
    """The definition of a dot product of groups, in operations that every target has."""
    from tvm import tirx

    dtype = f"int32x{lanes}"
    for part in range(group):
        picked = list(range(part, lanes * group, group))
        left, right = (tirx.Shuffle([vector], picked).astype(dtype) for vector in (codes, weights))
        sums = sums + left * right
    return sums
