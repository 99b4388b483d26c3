"""Activations to int8 codes with one scale per row, as W8A8 linears take them. In every bit Round(Div(x, scale))."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from passopt.targets.tvm.features import Isa
from passopt.targets.tvm.kernels.emit import local

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

#: Added to and taken from an fp32 within ±127 it rounds half to even, by the addition's own rounding.
_ROUNDING = 1.5 * 2**23
#: Its bits: those of the sum exceed them by the rounded integer.
_ROUNDING_BITS = int(np.float32(_ROUNDING).view(np.int32))
#: Below so many rows waking threads costs more than the rows.
_SERIAL_ROWS = 8


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
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    layout = codes_layout(k, isa)
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        rows = tirx.Var("rows", "int64")
        x = T.match_buffer(T.arg("x", T.handle()), (rows, k), "float32")
        codes = T.match_buffer(T.arg("codes", T.handle()), (rows, layout.width), layout.dtype)
        scales = T.match_buffer(T.arg("scales", T.handle()), (rows,), "float32")
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            with T.If(rows < _SERIAL_ROWS):
                with T.Then(), T.serial(0, rows) as row:
                    _quantize_row(x, codes, scales, row, k, layout, isa.lanes)
                with T.Else(), T.parallel(0, rows) as row:
                    _quantize_row(x, codes, scales, row, k, layout, isa.lanes)
    return builder.get()


def _quantize_row(x: Any, codes: Any, scales: Any, row: Any, k: int, layout: CodesLayout, lanes: int) -> None:
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    absmax = T.bind(T.reinterpret("float32", _absmax_bits(x, row, k, lanes)))
    quotient = T.bind(absmax / T.float32(127))
    scale = T.bind(tirx.Select(quotient == T.float32(0), T.float32(1), quotient))
    T.buffer_store(scales, scale, [row])

    def store(start: Any, count: int) -> None:
        limit, rounding = (_spread(T.float32(value), count) for value in (127, _ROUNDING))
        scaled = x[row, _ramp(start, count)] / _spread(scale, count)
        clipped = T.max(T.min(scaled, limit), -limit)
        # As integers, so that no rule of floating point may cancel the two additions.
        integer = T.reinterpret(_type("int32", count), clipped + rounding)
        offset = _spread(T.int32(layout.zero_point - _ROUNDING_BITS), count)
        T.buffer_store(codes, (integer + offset).astype(_type(layout.dtype, count)), [row, _ramp(start, count)])

    with T.serial(0, k // lanes) as step:
        store(step * lanes, lanes)
    if k % lanes:
        with T.serial(k // lanes * lanes, k) as column:
            store(column, 1)
    if layout.width > k:
        with T.serial(k, layout.width) as column:
            T.buffer_store(codes, tirx.const(layout.zero_point, layout.dtype), [row, column])


def _absmax_bits(x: Any, row: Any, k: int, lanes: int) -> Any:
    """The largest |x| of a row, as bits: as integers they are ordered like the numbers, and NaN is above all."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    registers = 4  # as many chains hide the latency of a maximum
    step = registers * lanes
    most = local(step, dtype="int32")

    def fold(start: Any, register: int, count: int) -> None:
        bits = T.reinterpret(_type("int32", count), x[row, _ramp(start, count)])
        place = [_ramp(register * lanes, count)]
        magnitude = bits & _spread(T.int32(0x7FFFFFFF), count)
        T.buffer_store(most, T.max(most[place[0]], magnitude), place)

    for register in range(registers):
        T.buffer_store(most, _spread(T.int32(0), lanes), [_ramp(register * lanes, lanes)])
    with T.serial(0, k // step) as block:
        for register in range(registers):
            fold(block * step + register * lanes, register, lanes)
    if k % step:
        with T.serial(k // step * step, k) as column:
            fold(column, 0, 1)
    total = most[0]
    for index in range(1, step):
        total = tirx.max(total, most[index])
    return total


def _ramp(start: Any, count: int) -> Any:
    from tvm.script.ir_builder import tirx as T

    return T.ramp(start, 1, count) if count > 1 else start


def _spread(value: Any, count: int) -> Any:
    from tvm.script.ir_builder import tirx as T

    return T.broadcast(value, count) if count > 1 else value


def _type(dtype: str, count: int) -> str:
    return f"{dtype}x{count}" if count > 1 else dtype
