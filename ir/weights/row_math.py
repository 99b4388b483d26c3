"""What is computed per row of a weight, in numpy: the definition that compiled kernels equal bit for bit.

Matrices are [rows, columns] of fp32, fp16, bf16 or fp64; whatever is computed, is computed in fp32.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from passopt.ir.weights import expressions as ex

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Squares of a row are added up in this many sums, column j in sum j % LANES, so that any width of vector gets the
#: same bits.
LANES = 16
_SMALLEST_STEP = np.float32(127.5)


def absmax(values: Array, along: int, through: ex.DataType | None = None) -> Array:
    """Largest magnitude per index of axis `along`, fp32, of `values` rounded to `through`. NaN where there is one."""
    result: Array = np.abs(widened(values, through)).max(axis=1 - along, initial=0)
    return result


def quantize_rows(values: Array, along: int, through: ex.DataType | None, scales: Array, out: Array) -> None:
    """int8 codes of finite `values` rounded to `through`, by one scale per index of axis `along`, into `out`."""
    out[...] = quantize_values(widened(values, through), scales[:, None] if along == 0 else scales[None, :])


def cast_rows(values: Array, dtype: ex.DataType, out: Array) -> int:
    """`values` rounded to `dtype`, into `out`; returns how many finite ones became infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.astype(dtype.numpy())
    if dtype not in ex.FLOATS:
        return 0
    return int(np.count_nonzero(np.isinf(out)) - np.count_nonzero(np.isinf(values)))


def normalize_rows(values: Array, through: ex.DataType | None, epsilon: float, out: Array) -> None:
    """Finite rows of `values` rounded to `through`, by max(L2 norm, epsilon), rounded into `out`.

    The norm is the fp32 nearest to the root of a sum of fp64.
    """
    wide = widened(values, through)
    rows, columns = wide.shape
    squares = np.zeros((rows, -(-columns // LANES) * LANES))
    squares[:, :columns] = wide
    np.multiply(squares, squares, out=squares)
    sums = np.add.accumulate(squares.reshape(rows, -1, LANES), axis=1)[:, -1] if columns else squares
    length = np.sqrt(np.add.accumulate(sums, axis=1)[:, -1] if columns else np.zeros(rows)).astype(np.float32)
    np.divide(wide, np.maximum(length, np.float32(epsilon))[:, None], out=wide)
    out[...] = wide.astype(out.dtype)


def widened(values: Array, through: ex.DataType | None = None) -> Array:
    """A copy in fp32, rounded to `through` on the way; what overflows there becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values if through is None else values.astype(through.numpy())
        return np.array(rounded, np.float32)


def scales_of(absmax: Array, dtype: ex.DataType) -> Array:
    """absmax/127 in `dtype`, one per channel.

    A channel of zeros gets `SCALE_OF_ZEROS`. Where the rounded scale is so small (subnormal) that the largest value
    would not fit in ±127 codes, it is the next representable number.
    """
    kind = dtype.numpy()
    exact = absmax / np.float32(127)
    scales: Array = exact.astype(kind)
    short = absmax > scales.astype(np.float32) * _SMALLEST_STEP
    if short.any():
        scales[short] = _next_up(scales[short])
    scales[absmax == 0] = ex.SCALE_OF_ZEROS
    return scales


def _next_up(values: Array) -> Array:
    """The next larger number of the same floating type; the bits of positive floats are ordered like integers."""
    bits = values.view(f"u{values.dtype.itemsize}") + 1
    result: Array = bits.astype(f"u{values.dtype.itemsize}").view(values.dtype)
    return result


def quantize_values(values: Array, scales: Array) -> Array:
    """round-half-even(values / scales as stored), clamped to ±127. `values` (fp32) is overwritten."""
    np.divide(values, scales.astype(np.float32), out=values)
    np.rint(values, out=values)
    np.clip(values, -127, 127, out=values)
    return values.astype(np.int8)
