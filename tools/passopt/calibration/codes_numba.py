"""Compile the loop over the columns of a block by numba, without fast math, so that its bits are those of numpy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


#: The rows of the weight that are rounded together, so that a block of them stays in a core's nearest caches.
_TOGETHER = 128


@numba.njit(nogil=True, cache=True, error_model="numpy")
def round_block(weight: Array, scales: Array, upper: Array, largest: int, errors: Array, codes: Array) -> None:
    """Do what `codes.round_block_by_numpy` does, for a few rows of the weight at a time."""
    columns, rows = weight.shape
    limit = np.float32(largest)
    for start in range(0, rows, _TOGETHER):
        part = slice(start, min(start + _TOGETHER, rows))
        for column in range(columns):
            values, steps = weight[column, part], scales[column, part]
            made, rounded = errors[column, part], codes[column, part]
            pivot = upper[column, column]
            for row in range(len(values)):  # counted from 0, or the compiler would not use vector registers
                code = min(max(np.float32(np.rint(values[row] / steps[row])), -limit), limit)
                rounded[row] = np.int8(code)
                made[row] = np.float32(values[row] - np.float32(code * steps[row])) / pivot
            for other in range(column + 1, columns):
                factor, later = upper[column, other], weight[other, part]
                for row in range(len(later)):
                    later[row] -= np.float32(factor * made[row])
