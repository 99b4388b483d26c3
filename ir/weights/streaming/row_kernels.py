"""Row kernels for large weights: compiled where numba is installed and the dtypes are its own, numpy otherwise.

Both give the same bits. numba is imported for large work only: it takes longer than all the numpy of a tiny model.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from passopt.ir.weights import row_math
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.row_math import Array

#: From so many bytes of source on, importing numba pays.
COMPILED_FROM = 64 << 20

_BITS = {DataType.FLOAT: np.uint32, DataType.FLOAT16: np.uint16, DataType.BFLOAT16: np.uint16}


class RowKernels:
    """The row operations in numpy. `values` are [rows, columns]; `through` is a dtype they are rounded to before.

    `along` is the axis that scales belong to: 0 for rows, 1 for columns.
    """

    name = "numpy"
    #: fp32 and fp64 copies while a result is computed, per element of a row.
    scratch_bytes = 24

    def absmax(self, values: Array, along: int, through: DataType | None) -> Array:
        return row_math.absmax(values, along, through)

    def codes(self, values: Array, along: int, through: DataType | None, scales: Array, out: Array) -> None:
        row_math.quantize_rows(values, along, through, scales, out)

    def cast(self, values: Array, dtype: DataType, out: Array) -> int:
        return row_math.cast_rows(values, dtype, out)

    def transpose(self, values: Array, out: Array) -> None:
        out[...] = values.T

    def normalize(self, values: Array, through: DataType | None, epsilon: float, out: Array) -> None:
        row_math.normalize_rows(values, through, epsilon, out)


class CompiledRowKernels(RowKernels):
    """The same by numba; what it has no kernel for (fp64, NaN, integers) goes the numpy way."""

    name = "numba"
    scratch_bytes = 0

    def __init__(self, compiled: ModuleType) -> None:
        self._compiled = compiled
        self._kinds = {
            DataType.FLOAT: compiled.FP32,
            DataType.FLOAT16: compiled.FP16,
            DataType.BFLOAT16: compiled.BF16,
        }

    def absmax(self, values: Array, along: int, through: DataType | None) -> Array:
        bits = _bits(values)
        if bits is None:
            return super().absmax(values, along, through)
        peaks = np.zeros(bits.shape[along], bits.dtype)
        (self._compiled.absmax if along == 0 else self._compiled.absmax_columns)(bits, peaks)
        # Rounding keeps order, so the rounded maximum is the maximum of the rounded.
        return row_math.widened(peaks.view(values.dtype), through)

    def codes(self, values: Array, along: int, through: DataType | None, scales: Array, out: Array) -> None:
        bits = _bits(values)
        own = DataType.from_numpy(values.dtype)
        target = through or own
        if bits is None or target not in self._kinds:
            super().codes(values, along, through, scales, out)
            return
        kinds = self._kinds[own], self._kinds[target]
        self._compiled.codes(bits, *kinds, scales.astype(np.float32), along, out)

    def cast(self, values: Array, dtype: DataType, out: Array) -> int:
        bits = _bits(values)
        if bits is None or dtype not in self._kinds:
            return super().cast(values, dtype, out)
        own = self._kinds[DataType.from_numpy(values.dtype)]
        lost, has_nan = self._compiled.cast(bits, own, self._kinds[dtype], out.view(_BITS[dtype]))
        return super().cast(values, dtype, out) if has_nan else int(lost)

    def transpose(self, values: Array, out: Array) -> None:
        bits = _bits(values)
        if bits is None:
            super().transpose(values, out)
        else:
            self._compiled.transpose(bits, out.view(bits.dtype))

    def normalize(self, values: Array, through: DataType | None, epsilon: float, out: Array) -> None:
        bits = _bits(values)
        own, result = DataType.from_numpy(values.dtype), DataType.from_numpy(out.dtype)
        target = through or own
        if bits is None or target not in self._kinds or result not in self._kinds:
            super().normalize(values, through, epsilon, out)
            return
        kinds = self._kinds
        raw = out.view(_BITS[result])
        self._compiled.normalize(bits, kinds[own], kinds[target], epsilon, raw, kinds[result])


def _bits(values: Array) -> Array | None:
    """The matrix as unsigned integers, if a kernel can read it so."""
    kind = _BITS.get(DataType.from_numpy(values.dtype))
    if kind is None or values.ndim != 2 or not values.flags.c_contiguous or not values.flags.aligned:
        return None
    return values.view(kind)


@functools.cache
def compiled_kernels() -> RowKernels:
    """Those of numba, or of numpy where it is missing or does not work."""
    try:
        from passopt.ir.weights.streaming import numba_rows
    except (ImportError, RuntimeError):  # also: a numpy that it does not know, or no folder for what it compiles
        return RowKernels()
    return CompiledRowKernels(numba_rows)


def kernels_for(nbytes: int) -> RowKernels:
    """The kernels for so many bytes of source."""
    return compiled_kernels() if nbytes >= COMPILED_FROM else RowKernels()
