"""Figures of predictions against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from passopt.predictions.divergence import divergence, kl_of, log_softmax, row_slices, surprises

#: Two rows over three tokens whose probabilities are halves, quarters and eighths.
P = np.log([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
Q = np.log([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])


def test_surprise_of_known_probabilities():
    found = surprises(log_softmax(P + 7.5), np.array([1, 2]))
    assert found == pytest.approx([math.log(4), -math.log(0.75)])


def test_divergence_of_known_probabilities():
    # 0.5·ln 2 + 0.25·ln ½ + 0 = 0.25·ln 2
    assert kl_of(log_softmax(P), log_softmax(Q)) == pytest.approx([0.25 * math.log(2), 0], abs=1e-15)
    found = divergence([(P.astype(np.float32), Q.astype(np.float32) - 3)])
    assert found.mean == pytest.approx(0.125 * math.log(2), rel=1e-6)
    assert found.top1 == 0.5


def test_tokens_that_the_reference_excludes_add_nothing_and_those_of_the_candidate_infinity():
    one = log_softmax(np.array([[0.0, -np.inf, 0.0]]))
    other = log_softmax(np.array([[0.0, 0.0, -np.inf]]))
    assert kl_of(one, log_softmax(np.zeros((1, 3)))) == pytest.approx([math.log(1.5)])
    assert kl_of(one, other)[0] == np.inf


def test_what_is_not_finite_becomes_nan():
    assert np.isnan(log_softmax(np.array([[0, np.nan], [np.inf, 0], [-np.inf, -np.inf]]))).any(axis=-1).all()


def test_rows_are_taken_a_few_at_a_time():
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (300, 1 << 20), (0, 0))
    slices = list(row_slices(logits))
    assert [slice_.stop - slice_.start for slice_ in slices] == [2] * 150
    assert list(row_slices(np.zeros((0, 4)))) == []
