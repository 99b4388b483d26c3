"""Choose row kernels for large weights: compiled where numba is installed and has the dtype, else numpy.

Both give the same bits. numba is imported for large work only, because its import takes longer than all the numpy work
of a tiny model.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from passopt.ir.weights import rotation, row_math
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.rotation import Rotation
from passopt.ir.weights.row_math import Array

#: The bytes of source from which on importing numba pays.
COMPILED_FROM = 64 << 20

_BITS = {DataType.FLOAT: np.uint32, DataType.FLOAT16: np.uint16, DataType.BFLOAT16: np.uint16}


class RowKernels:
    """The row operations in numpy, on `values` of shape `[rows, columns]`.

    `through` is a dtype to which values are rounded first, or None. `along` is the axis that scales belong to: 0 for
    rows, 1 for columns.
    """

    name = "numpy"
    #: The bytes of fp32 and fp64 copies per element of a row while a result is computed.
    scratch_bytes = 24

    def absmax(self, values: Array, along: int, through: DataType | None) -> Array:
        """Return the largest magnitude per index of axis `along`, in fp32."""
        return row_math.absmax(values, along, through)

    def codes(self, values: Array, along: int, through: DataType | None, scales: Array, out: Array) -> None:
        """Write int8 codes to `out`, with one scale per index of axis `along`."""
        row_math.quantize_rows(values, along, through, scales, out)

    def cast(self, values: Array, dtype: DataType, out: Array) -> int:
        """Write `values`, rounded to `dtype`, to `out`, and return how many finite values became infinite."""
        return row_math.cast_rows(values, dtype, out)

    def transpose(self, values: Array, out: Array) -> None:
        """Write the transposed matrix to `out`."""
        out[...] = values.T

    def normalize(self, values: Array, through: DataType | None, epsilon: float, out: Array) -> None:
        """Write the rows, divided by max(L2 norm, epsilon), to `out`."""
        row_math.normalize_rows(values, through, epsilon, out)

    def rotate(self, values: Array, turn: Rotation, out: Array) -> None:
        """Write the fp32 rows, multiplied by R, to `out`."""
        out[...] = rotation.rotate_rows(values, turn)

    def rotate_columns(self, values: Array, turn: Rotation) -> None:
        """Multiply the columns of an fp32 matrix by R, in place."""
        rotation.rotate_columns(values, turn)


class CompiledRowKernels(RowKernels):
    """The row operations compiled by numba; numpy does what has no compiled kernel (fp64, NaN, integers)."""

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
        # Rounding keeps the order of numbers, so the rounded maximum is the maximum of the rounded values.
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

    def rotate(self, values: Array, turn: Rotation, out: Array) -> None:
        self._compiled.rotate(values, turn.signs, turn.block, out)

    def rotate_columns(self, values: Array, turn: Rotation) -> None:
        self._compiled.rotate_columns(values, turn.signs, turn.block)


def _bits(values: Array) -> Array | None:
    """Return the matrix as unsigned integers, or None if a compiled kernel cannot read it."""
    kind = _BITS.get(DataType.from_numpy(values.dtype))
    if kind is None or values.ndim != 2 or not values.flags.c_contiguous or not values.flags.aligned:
        return None
    return values.view(kind)


@functools.cache
def compiled_kernels() -> RowKernels:
    """Return the kernels of numba, or those of numpy if numba is missing or does not work."""
    try:
        from passopt.ir.weights.streaming import numba_rows
    except (ImportError, RuntimeError):  # numba may also reject this numpy, or find no folder for its cache.
        return RowKernels()
    return CompiledRowKernels(numba_rows)


def kernels_for(nbytes: int) -> RowKernels:
    """Return the kernels for `nbytes` bytes of source."""
    return compiled_kernels() if nbytes >= COMPILED_FROM else RowKernels()
