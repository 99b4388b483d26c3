"""Choose the kernel of a linear layer with fp32 activations, and the layout of its weights.

Weights may be floats or int8. The kernel for int8 activations is in `int8_int8`.
"""

from __future__ import annotations

from functools import partial

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression
from passopt.targets.tvm.compiler.kernels.linear.float_panels import linear
from passopt.targets.tvm.compiler.kernels.linear.int8_fp32 import MAX_INPUTS, int8_fp32_kernel
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.linear.panel_layout import Panels
from passopt.targets.tvm.machines import Isa

#: The names that TVM and the kernels' names use for the dtypes in which a float weight may be stored.
FLOAT_DTYPES = {DataType.FLOAT: "float32", DataType.FLOAT16: "float16", DataType.BFLOAT16: "bfloat16"}


def float_kernel(weight: Expression, isa: Isa) -> LinearKernel:
    """Return the kernel for a weight [N, K] in fp32, fp16 or bf16; it computes in fp32.

    Raises ModelError for a weight of another dtype or shape.
    """
    rows, columns = _matrix(weight)
    dtype = _float_dtype(weight, "weight")
    panels = Panels.of(rows, columns, dtype, isa)
    packed = weight.pack(panels.width)
    return LinearKernel(f"linear_{dtype}_{rows}_{columns}", (("packed", packed),), partial(linear, panels))


def int8_kernel(codes: Expression, scales: Expression, isa: Isa) -> LinearKernel:
    """Return the kernel for int8 codes [N, K] with one scale per row in fp32, fp16 or bf16; activations are fp32.

    It uses dot products of bytes where the level has them and K is at most MAX_INPUTS (`linear_planes`), and computes
    in fp32 otherwise. Raises ModelError for codes or scales of another dtype or shape.
    """
    rows, columns = _matrix(codes)
    if codes.dtype != DataType.INT8:
        raise ModelError(f"codes of a linear are int8, not {codes.dtype.name}{list(codes.shape)}")
    if scales.shape != (rows,):
        raise ModelError(f"codes {list(codes.shape)} take scales [{rows}], one per row, not {list(scales.shape)}")
    dtype = _float_dtype(scales, "scales")
    if isa.has_byte_dot and columns <= MAX_INPUTS:
        return int8_fp32_kernel(codes, scales, isa)
    panels = Panels.of(rows, columns, "int8", isa, scales=dtype)
    packed = codes.pack(panels.width)
    padded = scales.pad(0, panels.count * panels.width, value=1.0)
    suffix = "" if dtype == "float32" else f"_{dtype}"
    name = f"linear_int8_{rows}_{columns}{suffix}"
    return LinearKernel(name, (("packed", packed), ("scales", padded)), partial(linear, panels), "weights")


def _matrix(weight: Expression) -> tuple[int, int]:
    if len(weight.shape) != 2 or not all(weight.shape):
        raise ModelError(f"a linear takes a matrix [outputs, inputs], not {weight.dtype.name}{list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def _float_dtype(weight: Expression, what: str) -> str:
    if weight.dtype not in FLOAT_DTYPES:
        known = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
        raise ModelError(f"{what} of a linear in {weight.dtype.name}; kernels take {known}: cast it before")
    return FLOAT_DTYPES[weight.dtype]
