"""Linears: which kernel computes one, and how its weights are laid out for it.

Weights in floats or int8 with fp32 activations; int8 activations are in `linear_w8a8`.
"""

from __future__ import annotations

from functools import partial

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression
from passopt.targets.tvm.compiler.kernels.linear.float_panels import linear
from passopt.targets.tvm.compiler.kernels.linear.int8_fp32 import MAX_INPUTS, plan_planes
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearPlan
from passopt.targets.tvm.compiler.kernels.linear.panel_layout import Panels
from passopt.targets.tvm.machines import Isa

#: What TVM and the kernels' names call the dtypes that a weight may be stored in.
FLOAT_DTYPES = {DataType.FLOAT: "float32", DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


def plan_float(weight: Expression, isa: Isa) -> LinearPlan:
    """A linear with a [N, K] weight in fp32, fp16 or bf16, computed in fp32. Raises ModelError for another weight."""
    rows, columns = _matrix(weight)
    dtype = _float_dtype(weight, "weight")
    panels = Panels.of(rows, columns, dtype, isa)
    packed = weight.pack(panels.width)
    return LinearPlan(f"linear_{dtype}_{rows}_{columns}", (("packed", packed),), partial(linear, panels))


def plan_int8(codes: Expression, scales: Expression, isa: Isa) -> LinearPlan:
    """A linear with int8 codes [N, K] and a scale per row in fp32, fp16 or bf16; activations stay fp32.

    Computed by dot products of bytes where the level has them (`linear_planes`), else in fp32. Raises ModelError for
    codes or scales of another dtype or shape.
    """
    rows, columns = _matrix(codes)
    if codes.dtype != DataType.INT8:
        raise ModelError(f"codes of a linear are int8, not {codes.dtype.name}{list(codes.shape)}")
    if scales.shape != (rows,):
        raise ModelError(f"codes {list(codes.shape)} take scales [{rows}], one per row, not {list(scales.shape)}")
    dtype = _float_dtype(scales, "scales")
    if isa.has_byte_dot and columns <= MAX_INPUTS:
        return plan_planes(codes, scales, isa)
    panels = Panels.of(rows, columns, "int8", isa, scales=dtype)
    packed = codes.pack(panels.width)
    padded = scales.pad(0, panels.count * panels.width, value=1.0)
    suffix = "" if dtype == "float32" else f"_{dtype}"
    name = f"linear_int8_{rows}_{columns}{suffix}"
    return LinearPlan(name, (("packed", packed), ("scales", padded)), partial(linear, panels), "weights")


def _matrix(weight: Expression) -> tuple[int, int]:
    if len(weight.shape) != 2 or not all(weight.shape):
        raise ModelError(f"a linear takes a matrix [outputs, inputs], not {weight.dtype.name}{list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def _float_dtype(weight: Expression, what: str) -> str:
    if weight.dtype not in FLOAT_DTYPES:
        known = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
        raise ModelError(f"{what} of a linear in {weight.dtype.name}; kernels take {known}: cast it before")
    return FLOAT_DTYPES[weight.dtype]
