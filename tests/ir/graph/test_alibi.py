"""ALiBi slopes against the published values and the recursive definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from passopt.ir.graph.alibi import alibi_slopes


def by_recursion(heads: int) -> list[float]:
    if math.log2(heads).is_integer():
        first = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [first * first**index for index in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return by_recursion(below) + by_recursion(2 * below)[0::2][: heads - below]


def test_eight_heads_halve() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]


def test_every_count_follows_the_definition() -> None:
    for heads in range(1, 130):
        slopes = alibi_slopes(heads)
        assert slopes.dtype == np.float32
        assert np.array_equal(slopes, np.array(by_recursion(heads), np.float32))


def test_a_padded_count_has_other_slopes() -> None:
    """Why slopes are computed from the true head count and padded afterwards."""
    assert not np.array_equal(alibi_slopes(6), alibi_slopes(8)[:6])


def test_no_heads() -> None:
    with pytest.raises(ValueError, match="at least one head"):
        alibi_slopes(0)
