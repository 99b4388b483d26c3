"""Compute casts, norms, scales and codes row by row in numpy: the definition that compiled kernels equal bit for bit.

Matrices are `[rows, columns]` of fp32, fp16, bf16 or fp64. All computing is done in fp32, except sums of squares, which
are fp64. A parameter `through` is a dtype to which values are rounded before they are used, or None.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights import expressions as ex

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The squares of a row are added up in this many partial sums, column j in sum j % LANES, so that the result has the
#: same bits for any width of vector registers.
LANES = 16


def absmax(values: Array, along: int, through: ex.DataType | None = None) -> Array:
    """Return the fp32 largest magnitude of `values`, rounded to `through`, per index of axis `along`; NaN stays NaN."""
    result: Array = np.abs(widened(values, through)).max(axis=1 - along, initial=0)
    return result


def quantize_rows(values: Array, along: int, through: ex.DataType | None, scales: Array, out: Array) -> None:
    """Write int8 codes of finite `values`, rounded to `through`, to `out`, with a scale per index of axis `along`."""
    out[...] = quantize_values(widened(values, through), scales[:, None] if along == 0 else scales[None, :])


def cast_rows(values: Array, dtype: ex.DataType, out: Array) -> int:
    """Write `values`, rounded to `dtype`, to `out`; return how many finite values became infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.astype(dtype.numpy())
    if dtype not in FLOATS:
        return 0
    return int(np.count_nonzero(np.isinf(out)) - np.count_nonzero(np.isinf(values)))


def normalize_rows(values: Array, through: ex.DataType | None, epsilon: float, out: Array) -> None:
    """Write finite rows, rounded to `through` and divided by max(L2 norm, epsilon), to `out`, in the dtype of `out`.

    The norm is the square root of a sum in fp64, rounded to fp32.
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


def unpack_rows(words: Array, bits: int, out: Array) -> None:
    """Write the codes of 8 or 4 bits in rows of int32 words, lowest bits first, less 2^(bits − 1), to int8 `out`."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    raw = out.view(np.uint8)
    if bits == 8:
        np.bitwise_xor(data, 128, out=raw)
        return
    np.bitwise_and(data, 15, out=raw[:, 0::2])
    np.right_shift(data, 4, out=raw[:, 1::2])
    np.subtract(out, 8, out=out)


def pack_rows(codes: Array, bits: int, out: Array) -> None:
    """Write rows of int8 codes of 8 or 4 bits, plus 2^(bits − 1), to int32 words `out`, the first in the lowest bits.

    A code of 4 bits is one of −8 to 7, which the caller has to see to.
    """
    raw = out.view(np.uint8)
    data = codes.view(np.uint8) if codes.flags.c_contiguous else np.ascontiguousarray(codes).view(np.uint8)
    if bits == 8:
        np.bitwise_xor(data, 128, out=raw)
        return
    np.left_shift(data[:, 1::2] ^ 8, 4, out=raw)
    np.bitwise_or(raw, (data[:, 0::2] ^ 8) & 15, out=raw)


def widened(values: Array, through: ex.DataType | None = None) -> Array:
    """Return a copy in fp32, first rounded to `through`; what overflows there becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values if through is None else values.astype(through.numpy())
        return np.array(rounded, np.float32)


def scales_of(absmax: Array, dtype: ex.DataType, largest: int = 127) -> Array:
    """Return absmax/`largest` in `dtype`, one scale per channel or group.

    A channel of zeros gets `SCALE_OF_ZEROS`. A rounded scale may be so small (subnormal) that the largest value would
    not fit in codes up to `largest`; then the next larger representable number is taken.
    """
    kind = dtype.numpy()
    exact = absmax / np.float32(largest)
    scales: Array = exact.astype(kind)
    short = absmax > scales.astype(np.float32) * np.float32(largest + 0.5)
    if short.any():
        scales[short] = _next_up(scales[short])
    scales[absmax == 0] = ex.SCALE_OF_ZEROS
    return scales


def _next_up(values: Array) -> Array:
    """Return the next larger floating-point numbers: the bits of positive floats are ordered like integers."""
    bits = values.view(f"u{values.dtype.itemsize}") + 1
    result: Array = bits.astype(f"u{values.dtype.itemsize}").view(values.dtype)
    return result


def quantize_values(values: Array, scales: Array, largest: int = 127) -> Array:
    """Return round-half-even(values / scales), clamped to ±`largest`, as int8; `values` (fp32) is overwritten."""
    np.divide(values, scales.astype(np.float32), out=values)
    np.rint(values, out=values)
    np.clip(values, -largest, largest, out=values)
    return values.astype(np.int8)
