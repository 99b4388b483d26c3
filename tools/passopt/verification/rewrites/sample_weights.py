"""Evaluate the weights of a cut over seeded random numbers instead of the bytes of their files.

Random weights need no disk, and they show errors that weights of zeros would hide. What a rule does to weights (slices,
casts, codes) is part of their expressions, so it is done to the random numbers as well.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.evaluator import Box, Evaluator
from passopt.ir.weights.expressions import Expression, Source

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The number of random values that repeat; a prime, so that no two rows of a weight are alike.
_PERIOD = 1_048_573


class SampledEvaluator(Evaluator):
    """An evaluator that reads random numbers in place of the files.

    Matrices hold normal numbers of the size of a trained linear's weights, vectors hold numbers near 1.
    """

    def read(self, expression: Expression, box: Box) -> Array:
        if not isinstance(expression, Source):
            return super().read(expression, box)
        (first, last), *rest = box or ((0, 1),)
        width = math.prod(expression.shape[1:])
        tile = _tile(expression)
        start = (zlib.crc32(expression.name.encode()) + first * width) % _PERIOD
        rows = np.resize(np.roll(tile, -start), (last - first, *expression.shape[1:]))
        part: Array = rows[(slice(None), *(slice(*bounds) for bounds in rest))]
        return part if box else part.reshape(())


def _tile(source: Source) -> Array:
    kind = source.dtype.numpy()
    if source.dtype not in FLOATS:
        return np.random.default_rng(1).integers(0, 2 if kind == np.bool_ else 100, _PERIOD).astype(kind)
    if len(source.shape) < 2:
        return (np.float32(1) + np.float32(0.1) * _normal()).astype(kind)
    return (_normal() / np.float32(math.sqrt(source.shape[-1]))).astype(kind)


@functools.cache
def _normal() -> Array:
    return np.random.default_rng(0).standard_normal(_PERIOD, np.float32)
