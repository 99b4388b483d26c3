"""Compute ALiBi slopes, which say how much each attention head favours late columns.

The slopes depend on the head count of the whole model, never on the share of one rank.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


def alibi_slopes(heads: int) -> Array:
    """Return the slope of each of `heads` attention heads, as an fp32 array `[heads]`.

    The formula is that of "Train Short, Test Long" (Press et al., 2022) and its reference code. For a power of two the
    slopes are 2^(-8/heads), its square, its cube and so on. For another count, the slopes of the power of two below are
    followed by every other slope of the power of two above. So padding the head count would change existing slopes.

    Raises:
        ValueError: If `heads` is less than 1.
    """
    if heads < 1:
        raise ValueError(f"a model has at least one head, not {heads}")
    below = 1 << (heads.bit_length() - 1)
    slopes = _geometric(below) + _geometric(2 * below)[0::2][: heads - below]
    return np.array(slopes, np.float32)


def _geometric(heads: int) -> list[float]:
    first = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
    return [first * first**index for index in range(heads)]
