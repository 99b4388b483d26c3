"""ALiBi slopes: how much each attention head favours late columns. Needs the true head count, never a rank's share."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


def alibi_slopes(heads: int) -> Array:
    """[heads] in fp32, as in "Train Short, Test Long" (Press et al., 2022) and its reference code.

    For a power of two the slopes are 2^(-8/heads), its square, its cube …; for another count, those of the power of two
    below are followed by every other slope of the power of two above. So padding the count changes existing slopes.
    """
    if heads < 1:
        raise ValueError(f"a model has at least one head, not {heads}")
    below = 1 << (heads.bit_length() - 1)
    slopes = _geometric(below) + _geometric(2 * below)[0::2][: heads - below]
    return np.array(slopes, np.float32)


def _geometric(heads: int) -> list[float]:
    first = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
    return [first * first**index for index in range(heads)]
