"""Emit linear layers with int8 weights and int8 activations (W8A8).

Sums are exact in int32; they are then multiplied by the row's scale and the weight's scale in fp32. The instruction
levels use different dot products, but their sums agree in every bit: with codes of x within ±127, and of weights from
-128 on, sums over K ≤ 132,000 cannot overflow int32, and no step saturates.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from onnx_ir import DataType

from passopt.ir.weights.expressions import Expression
from passopt.targets.tvm.compiler.kernels.emit import FUNCTION_ATTRIBUTES, argument, root_block, symbol
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import ByteKernel, byte_kernel
from passopt.targets.tvm.compiler.kernels.linear.byte_linear import ByteLinear, Outputs
from passopt.targets.tvm.compiler.kernels.linear.byte_tiles import Operands, whole_groups
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import CodesLayout, codes_layout
from passopt.targets.tvm.machines import Isa


def int8_int8_kernel(codes: Expression, scales: Expression, isa: Isa) -> LinearKernel:
    """Return the kernel for y = (codes of x · codesᵀ) · row scale · scales, with int8 codes [N, K] and scales [N].

    Its function takes (codes of x as `codes_layout(K, isa)` says, row_scales f32[M], *weights, [residual f32[M, N],]
    y f32[M, N]).
    """
    n, k = codes.shape
    kernel = byte_kernel(isa)
    padded = -(-n // kernel.columns) * kernel.columns
    weights = [
        ("packed", codes.pad(1, whole_groups(k)).pack(kernel.columns, kernel.group)),
        ("scales", scales.cast(DataType.FLOAT).pad(0, padded)),
    ]
    if codes_layout(k, isa).zero_point:
        weights.append(("sums", codes.row_sums().pad(0, padded)))
    make = partial(linear_w8a8, n, k, codes_layout(k, isa), kernel)
    return LinearKernel(f"linear_w8a8_{n}_{k}", tuple(weights), make, "dynamic")


def linear_w8a8(n: int, k: int, layout: CodesLayout, kernel: ByteKernel, residual: bool = False) -> Any:
    """Return the PrimFunc that `int8_int8_kernel` describes; `n` and `k` are N and K.

    The row sums of the weights are an argument only if the codes of x have a zero point.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    blocks, groups = -(-n // kernel.columns), whole_groups(k) // kernel.group
    padded = blocks * kernel.columns
    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(FUNCTION_ATTRIBUTES)
        rows = symbol("rows")
        codes = argument("codes", (rows, layout.width), layout.dtype)
        row_scales = argument("row_scales", (rows,))
        packed = argument("packed", (blocks, groups, kernel.columns, kernel.group), "int8")
        scales = argument("scales", (padded,))
        sums = argument("sums", (padded,), "int32") if layout.zero_point else None
        before = argument("residual", (rows, n)) if residual else None
        y = argument("y", (rows, n))
        with root_block():
            flat = T.decl_buffer((groups * padded * kernel.group,), "int8", data=packed.data)
            operands = Operands(k, layout, kernel, rows, codes, packed, flat)
            value = partial(_scaled, row_scales, scales, sums, layout.zero_point)
            ByteLinear(operands, Outputs(n, y, before, value)).emit()
    return builder.get()


def _scaled(
    row_scales: Any, scales: Any, sums: Any, zero_point: int, row: Any, totals: list[Any], at: Any, lanes: int
) -> Any:
    """Return fp32 outputs from int32 sums: take off zero point times the weights' `sums`, then apply both scales."""
    from tvm.script.ir_builder import tirx as T

    (total,) = totals
    if sums is not None:
        total = total - sums[at] * T.broadcast(T.int32(zero_point), lanes)
    return total.astype(f"float32x{lanes}") * T.broadcast(row_scales[row], lanes) * scales[at]
