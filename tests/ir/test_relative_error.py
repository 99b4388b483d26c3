"""The error between two roots: relative to the largest number, apart from what only masks."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.relative_error import rewrite_error

LOW = np.finfo(np.float32).min
INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("reference", "found", "error"),
    [
        ([1, 2, -4], [1, 2, -4], 0),
        ([1, 2, -4], [1, 2.5, -4], 0.125),
        ([0, 0], [0, 0.25], 0.25),
        ([], [], 0),
        ([1, NAN], [1, 7], 0),  # undefined before, so anything after
        ([1, 2], [1, NAN], INF),
        ([1, 2], [1, INF], INF),
        ([1, -INF], [1, LOW], 0),  # both say "masked"
        ([1, LOW], [1.5, -INF], 0.5),
        ([1, -INF], [1, INF], INF),
        ([1, LOW], [1, -1e4], INF),
        ([1, 2], [1, LOW], INF),
    ],
)
def test_errors(reference, found, error):
    assert rewrite_error(np.float32(reference), np.float32(found)) == pytest.approx(error)


def test_sixteen_bit_masks_are_told_by_their_own_largest_number():
    assert rewrite_error(np.float16([1, -65504]), np.float16([1, -INF])) == 0
    assert rewrite_error(np.float16([1, 300]), np.float16([1, 301])) == pytest.approx(1 / 300)


def test_integers_and_booleans_differ_or_not():
    assert rewrite_error(np.array([1, 2]), np.array([1, 2])) == 0
    assert rewrite_error(np.array([1, 2]), np.array([1, 3])) == 0.5
    assert rewrite_error(np.array([True, False]), np.array([True, True])) == 1


def test_large_arrays_are_compared_in_whole():
    reference = np.ones(3 << 20, np.float32)
    found = reference.copy()
    found[-1] = 1.25
    assert rewrite_error(reference, found) == 0.25
