"""Emit the quantisation of activations to int8 codes with one scale per row, which W8A8 linears read.

The codes are bit for bit those of ONNX's Round(Div(x, scale)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.computed_rows import ComputedRows
from passopt.targets.tvm.machines import Isa

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

#: Adding this to an fp32 number within ±2^22 and subtracting it again rounds the number to an integer, half to even,
#: because the addition itself rounds.
ROUNDING = 1.5 * 2**23
#: The bits of ROUNDING as an integer. The bits of x + ROUNDING, as an integer, are larger by exactly the rounded x.
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))


@dataclasses.dataclass(frozen=True)
class CodesLayout:
    """The layout of int8 codes in memory: a matrix [M, width] of `dtype`, each element a code plus `zero_point`.

    A row has K codes; the columns from K to `width` hold code 0.
    """

    dtype: str
    zero_point: int
    width: int

    def store(self, codes: Array) -> Array:
        """Return codes int8[M, K] in this layout."""
        stored = np.full((len(codes), self.width), self.zero_point, self.dtype)
        stored[:, : codes.shape[1]] += codes.astype(self.dtype)
        return stored


def codes_layout(k: int, isa: Isa) -> CodesLayout:
    """Return the layout that `quantize_rows(k, isa)` writes and the W8A8 linears of the same k and level read.

    Byte dot products take one operand unsigned, so codes are uint8 with zero point 128. Levels without them multiply
    int16 (on a CPU in pairs), so codes are stored as int16. Rows start at multiples of 64 bytes.
    """
    size, dtype, zero_point = (1, "uint8", 128) if isa.has_byte_dot else (2, "int16", 0)
    stride = -(-k * size // 64) * 64
    # Rows that lie a multiple of 1 KiB apart would compete for the same few lines of the L1 cache.
    stride += 64 if stride % 1024 == 0 else 0
    return CodesLayout(dtype, zero_point, stride // size)


def quantize_rows(k: int, isa: Isa) -> Any:
    """Return a PrimFunc (x f32[M, k], codes [M, width], scales f32[M]) that quantises each row of x.

    Codes lie as `codes_layout(k, isa)` says. The scale of a row is its largest |x| / 127, or 1 if that is 0. A code is
    x / scale, rounded half to even and clipped to ±127. A row that holds NaN or infinity has a scale that is not finite
    either.
    """

    def emit_row(arguments: tuple[Any, ...], row: Any) -> Load:
        return lambda start, lanes: emit.load(arguments[0], [row, start], lanes)

    return _function(k, isa, lambda rows: (emit.argument("x", (rows, k)),), emit_row)


def quantize_computed(computed: ComputedRows, isa: Isa) -> Any:
    """Return a PrimFunc (*arguments of `computed`, codes, scales) that quantises computed rows.

    It writes the same as `quantize_rows` would, but the rows themselves never become a tensor in memory.
    """

    def emit_row(arguments: tuple[Any, ...], row: Any) -> Load:
        held = emit.scratch(computed.width)
        computed.emit_row(arguments, row, lambda start, value, lanes: emit.store(held, value, [start], lanes))
        return lambda start, lanes: emit.load(held, [start], lanes)

    return _function(computed.width, isa, computed.arguments, emit_row)


#: The type of `load(start, lanes)`, which returns `lanes` numbers of a row from column `start` on.
Load = Callable[[Any, int], Any]


def _function(
    k: int,
    isa: Isa,
    declare: Callable[[Any], tuple[Any, ...]],
    emit_row: Callable[[tuple[Any, ...], Any], Load],
) -> Any:
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    layout = codes_layout(k, isa)
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        rows = emit.symbol("M")
        arguments = declare(rows)
        codes = emit.argument("codes", (rows, layout.width), layout.dtype)
        scales = emit.argument("scales", (rows,))

        def one(row: Any) -> None:
            _quantize_row(emit_row(arguments, row), codes, scales, row, k, layout, isa.lanes)

        with emit.root_block():
            emit.each_row(rows, k, one)
    return builder.get()


def _quantize_row(load: Load, codes: Any, scales: Any, row: Any, k: int, layout: CodesLayout, lanes: int) -> None:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    absmax = emit.bind(T.reinterpret("float32", absmax_bits(load, k, lanes)))
    quotient = emit.bind(absmax / T.float32(127))
    scale = emit.bind(tirx.Select(quotient == T.float32(0), T.float32(1), quotient))
    T.buffer_store(scales, scale, [row])

    def write(start: Any, count: int) -> None:
        limit, rounding = (emit.spread(float(value), count) for value in (127, ROUNDING))
        scaled = load(start, count) / emit.spread(scale, count)
        clipped = T.max(T.min(scaled, limit), -limit)
        # The second addition is one of integers, so that no simplification of floating-point code can cancel the two.
        integer = T.reinterpret(emit.typed("int32", count), clipped + rounding)
        offset = emit.spread(T.int32(layout.zero_point - ROUNDING_BITS), count)
        emit.store(codes, (integer + offset).astype(emit.typed(layout.dtype, count)), [row, start], count)

    emit.each_span(k, lanes, write)
    if layout.width > k:
        with T.serial(k, layout.width) as column:
            T.buffer_store(codes, tirx.const(layout.zero_point, layout.dtype), [row, column])


def absmax_bits(load: Load, k: int, lanes: int) -> Any:
    """Return the largest |x| of a row of `k` numbers, as its bits in an int32.

    The bits of positive numbers, compared as integers, have the order of the numbers; NaN is above all of them.
    """
    from tvm.script.ir_builder import tirx as T

    step = 4 * lanes  # Four independent chains hide the latency of the maximum.
    most = emit.local(step, dtype="int32")
    emit.store(most, emit.spread(T.int32(0), step), [0], step)

    def fold(start: Any, count: int) -> None:
        bits = T.reinterpret(emit.typed("int32", count), load(start, count))
        magnitude = bits & emit.spread(T.int32(0x7FFFFFFF), count)
        emit.store(most, T.max(emit.load(most, [0], count), magnitude), [0], count)

    emit.each_span(k, step, fold)
    return emit.fold_lanes(most, step, T.max)
