"""Activations to int8 codes with one scale per row, as W8A8 linears take them. In every bit Round(Div(x, scale))."""

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

#: Added to and taken from an fp32 within ±2^22 it rounds half to even, by the addition's own rounding.
ROUNDING = 1.5 * 2**23
#: Its bits: those of the sum exceed them by the rounded integer.
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))


@dataclasses.dataclass(frozen=True)
class CodesLayout:
    """How codes lie in memory: a matrix [M, width] of `dtype`, each element its code + `zero_point`.

    The columns from K to `width` hold code 0.
    """

    dtype: str
    zero_point: int
    width: int

    def store(self, codes: Array) -> Array:
        """Codes int8[M, K] as the kernels take them."""
        stored = np.full((len(codes), self.width), self.zero_point, self.dtype)
        stored[:, : codes.shape[1]] += codes.astype(self.dtype)
        return stored


def codes_layout(k: int, isa: Isa) -> CodesLayout:
    """What `quantize_rows(k, isa)` writes and the W8A8 linears of the same k and level read.

    Byte dot products take one operand unsigned; elsewhere products are of int16 pairs, so codes are stored widened.
    """
    size, dtype, zero_point = (1, "uint8", 128) if isa.has_byte_dot else (2, "int16", 0)
    stride = -(-k * size // 64) * 64
    # Rows a multiple of 1 KiB apart would compete for the same few lines of the L1 cache.
    stride += 64 if stride % 1024 == 0 else 0
    return CodesLayout(dtype, zero_point, stride // size)


def quantize_rows(k: int, isa: Isa) -> Any:
    """PrimFunc (x f32[M, k], codes [M, width] as `codes_layout` says, scales f32[M]).

    scale = absmax / 127, or 1 where that is 0; code = x / scale rounded half to even, within ±127. A row that holds NaN
    or infinity has a scale that is not finite either.
    """

    def emit_row(arguments: tuple[Any, ...], row: Any) -> Load:
        return lambda start, lanes: emit.load(arguments[0], [row, start], lanes)

    return _function(k, isa, lambda rows: (emit.argument("x", (rows, k)),), emit_row)


def quantize_computed(computed: ComputedRows, isa: Isa) -> Any:
    """PrimFunc (*arguments of `computed`, codes, scales): as `quantize_rows`, of rows that never go to memory."""

    def emit_row(arguments: tuple[Any, ...], row: Any) -> Load:
        held = emit.scratch(computed.width)
        computed.emit_row(arguments, row, lambda start, value, lanes: emit.store(held, value, [start], lanes))
        return lambda start, lanes: emit.load(held, [start], lanes)

    return _function(computed.width, isa, computed.arguments, emit_row)


#: `load(start, lanes)`: numbers of a row from column `start` on.
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
        # As integers, so that no rule of floating point may cancel the two additions.
        integer = T.reinterpret(emit.typed("int32", count), clipped + rounding)
        offset = emit.spread(T.int32(layout.zero_point - ROUNDING_BITS), count)
        emit.store(codes, (integer + offset).astype(emit.typed(layout.dtype, count)), [row, start], count)

    emit.each_span(k, lanes, write)
    if layout.width > k:
        with T.serial(k, layout.width) as column:
            T.buffer_store(codes, tirx.const(layout.zero_point, layout.dtype), [row, column])


def absmax_bits(load: Load, k: int, lanes: int) -> Any:
    """The largest |x| of a row, as bits: as integers they are ordered like the numbers, and NaN is above all."""
    from tvm.script.ir_builder import tirx as T

    step = 4 * lanes  # as many chains hide the latency of a maximum
    most = emit.local(step, dtype="int32")
    emit.store(most, emit.spread(T.int32(0), step), [0], step)

    def fold(start: Any, count: int) -> None:
        bits = T.reinterpret(emit.typed("int32", count), load(start, count))
        magnitude = bits & emit.spread(T.int32(0x7FFFFFFF), count)
        emit.store(most, T.max(emit.load(most, [0], count), magnitude), [0], count)

    emit.each_span(k, step, fold)
    return emit.fold_lanes(most, step, T.max)
