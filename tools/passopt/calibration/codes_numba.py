"""Compile the loop over the columns of a block by numba, without fast math, so that its bits are those of numpy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def round_block(weight: Array, scales: Array, upper: Array, largest: int, errors: Array, codes: Array) -> None:
    """Do what `codes.round_block_by_numpy` does, row by row."""
    rows, columns = weight.shape
    limit = np.float32(largest)
    for row in range(rows):
        for column in range(columns):
            value, scale = weight[row, column], scales[row, column]
            code = np.float32(np.rint(value / scale))
            code = min(max(code, -limit), limit)
            codes[row, column] = np.int8(code)
            error = np.float32(np.float32(value - np.float32(code * scale)) / upper[column, column])
            errors[row, column] = error
            for other in range(column + 1, columns):
                weight[row, other] -= np.float32(error * upper[column, other])
