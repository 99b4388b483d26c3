"""Emit linear layers with int8 weights and fp32 activations, using dot products of bytes.

Each row of x is turned into one scale times integers within ±LIMIT, and each integer is cut into its three bytes. So a
row becomes three rows of bytes, called planes. The sums of their products with the weights are exact in int32, and are
put together in fp32. Every number is thus rounded to 2^-22 of the largest number of its row. fp32 sums lose about as
much; they lose less where a number far larger than the others meets a small weight.

Three products of bytes take less time than one in fp32, and with few rows memory is the limit anyway. Layers that share
x each split it again, which takes less than 1 % of their time.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from onnx_ir import DataType

from passopt.ir.weights.expressions import Expression
from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import ByteKernel, byte_kernel
from passopt.targets.tvm.compiler.kernels.linear.byte_linear import ByteLinear, Outputs
from passopt.targets.tvm.compiler.kernels.linear.byte_tiles import Operands, whole_groups
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import (
    ROUNDING,
    ROUNDING_BITS,
    CodesLayout,
    absmax_bits,
    codes_layout,
)
from passopt.targets.tvm.machines import Isa

#: For each plane, how many bits lie below its byte; the plane of the highest byte comes first.
SHIFTS = (16, 8, 0)
PLANES = len(SHIFTS)
#: This is added to integers before they are stored, so that their bytes have no sign. The plane of the highest byte
#: thereby has a zero point of 64.
_ZERO = 1 << 22
LIMIT = _ZERO - 1
_ZERO_POINT = _ZERO >> SHIFTS[0]
#: The smallest scale. Scales must be normal fp32 numbers, since subnormal ones have too few bits; rows with smaller
#: numbers are rounded to multiples of it.
_SMALLEST = 2.0**-126
#: The largest K. With more inputs, sums of products of a byte (255) and a code (-128) could overflow int32.
MAX_INPUTS = (2**31 - 1) // (255 * 128)


def int8_fp32_kernel(codes: Expression, scales: Expression, isa: Isa) -> LinearKernel:
    """Return the kernel for y = x · (codes · scales)ᵀ, with int8 codes [N, K], K up to MAX_INPUTS, and scales [N].

    Its function takes (x f32[M, K], *weights, [residual f32[M, N],] y f32[M, N]).
    """
    n, k = codes.shape
    kernel = byte_kernel(isa)
    padded = -(-n // kernel.columns) * kernel.columns
    weights = (
        ("packed", codes.pad(1, whole_groups(k)).pack(kernel.columns, kernel.group)),
        ("scales", scales.cast(DataType.FLOAT).pad(0, padded)),
        ("sums", codes.row_sums().pad(0, padded)),
    )
    # Planes have the width of W8A8 codes. Only the highest plane has a zero point, which `_joined` takes off; nothing
    # is written behind column K, where the weights are zero.
    layout = dataclasses.replace(codes_layout(k, isa), zero_point=0)
    return LinearKernel(f"linear_int8_{n}_{k}", weights, partial(linear_planes, n, k, layout, kernel), "weights")


def linear_planes(n: int, k: int, layout: CodesLayout, kernel: ByteKernel, residual: bool = False) -> Any:
    """Return the PrimFunc that `int8_fp32_kernel` describes; `n` and `k` are N and K."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    blocks, groups = -(-n // kernel.columns), whole_groups(k) // kernel.group
    padded = blocks * kernel.columns
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        rows = emit.symbol("rows")
        x = emit.argument("x", (rows, k))
        packed = emit.argument("packed", (blocks, groups, kernel.columns, kernel.group), "int8")
        scales = emit.argument("scales", (padded,))
        sums = emit.argument("sums", (padded,), "int32")
        before = emit.argument("residual", (rows, n)) if residual else None
        y = emit.argument("y", (rows, n))
        with emit.root_block():
            flat = T.decl_buffer((groups * padded * kernel.group,), "int8", data=packed.data)
            codes = T.alloc_buffer((rows * PLANES, layout.width), layout.dtype, scope="global")
            row_scales = T.alloc_buffer((rows,), "float32", scope="global")
            emit.each_row(rows, k, partial(_split_row, x, codes, row_scales, k, kernel.lanes))
            operands = Operands(k, layout, kernel, rows * PLANES, codes, packed, flat)
            ByteLinear(operands, Outputs(n, y, before, partial(_joined, row_scales, scales, sums), PLANES)).emit()
    return builder.get()


def _split_row(x: Any, codes: Any, scales: Any, k: int, lanes: int, row: Any) -> None:
    """Emit the split of a row of x into planes of bytes, and its scale.

    The scale is not finite if the row holds a number that is not.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    def load(start: Any, count: int) -> Any:
        return emit.load(x, [row, start], count)

    absmax = emit.bind(T.reinterpret("float32", absmax_bits(load, k, lanes)))
    quotient, smallest = emit.bind(absmax / T.float32(LIMIT)), T.float32(_SMALLEST)
    scale = emit.bind(tirx.Select(quotient < smallest, smallest, quotient))
    T.buffer_store(scales, scale, [row])

    def write(start: Any, count: int) -> None:
        limit, rounding = (emit.spread(float(value), count) for value in (LIMIT, ROUNDING))
        scaled = load(start, count) / emit.spread(scale, count)
        clipped = T.max(T.min(scaled, limit), -limit)
        # The second addition is one of integers, so that no simplification of floating-point code can cancel the two.
        integer = T.reinterpret(emit.typed("int32", count), clipped + rounding)
        stored = emit.bind(integer + emit.spread(T.int32(_ZERO - ROUNDING_BITS), count))
        for plane, shift in enumerate(SHIFTS):
            byte = T.shift_right(stored, emit.spread(T.int32(shift), count)) & emit.spread(T.int32(255), count)
            emit.store(codes, byte.astype(emit.typed("uint8", count)), [row * PLANES + plane, start], count)

    emit.each_span(k, lanes, write)


def _joined(row_scales: Any, scales: Any, sums: Any, row: Any, totals: list[Any], at: Any, lanes: int) -> Any:
    """Return fp32 outputs from the int32 sums of the planes.

    The zero point of the highest plane is taken off, the sums are joined by place value, and both scales applied.
    """
    from tvm.script.ir_builder import tirx as T

    highest, *others = totals
    highest = highest - sums[at] * T.broadcast(T.int32(_ZERO_POINT), lanes)
    parts = [total.astype(f"float32x{lanes}") for total in (highest, *others)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined * T.broadcast(T.float32(256), lanes) + part
    return joined * T.broadcast(row_scales[row], lanes) * scales[at]
