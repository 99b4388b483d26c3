"""Standard errors against direct formulas, and against the true spread of what they estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from passopt.predictions.standard_errors import (
    Estimate,
    block_starts,
    mean_of,
    mean_of_means,
    perplexity_of,
    quantile_of,
    share_of,
)


def test_blocks_are_nearly_equal():
    assert block_starts(20, 6).tolist() == [0, 6, 13]
    assert block_starts(3, 128).tolist() == [0]


def test_equal_blocks_have_the_error_of_their_means():
    values = np.array([1.0, 3, 2, 2, 7, 9])
    found = mean_of(values, np.array([0, 2, 4]))
    assert found.value == 4
    assert found.error == pytest.approx(np.std([2, 2, 8], ddof=1) / math.sqrt(3))


def test_one_block_tells_no_error():
    found = mean_of(np.array([1.0, 5.0]), np.array([0]))
    assert found.value == 3
    assert math.isnan(found.error)
    assert Estimate(3.0).to_json() == {"value": 3.0, "error": None}


def test_values_that_depend_on_their_neighbours_spread_as_blocks_say():
    random = np.random.default_rng(5)
    noise = random.standard_normal((200, 2048 + 31))
    texts = np.stack([np.convolve(row, np.ones(32) / 32, "valid") for row in noise])
    starts = block_starts(2048, 128)
    errors = [mean_of(text, starts).error for text in texts]
    true = texts.mean(axis=1).std()
    assert np.mean(errors) == pytest.approx(true, rel=0.2)
    alone = texts[0].std() / math.sqrt(2048)
    assert alone < 0.3 * true  # as if all were independent


def test_errors_of_quantiles_match_their_true_spread():
    random = np.random.default_rng(6)
    texts = random.exponential(size=(200, 4096))
    starts = block_starts(4096, 128)
    for share in (0.5, 0.99):
        errors = [quantile_of(text, share, starts).error for text in texts]
        assert np.mean(errors) == pytest.approx(np.quantile(texts, share, axis=1).std(), rel=0.25)
    assert quantile_of(np.array([1.0, 2, 4]), 0.5, np.array([0])).value == 2


def test_share_of_questions():
    found = share_of(np.array([True, False, True, True]))
    assert found == Estimate(0.75, pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2))
    assert share_of(np.ones(4, bool)) == Estimate(1.0, pytest.approx(math.sqrt(0.75 * 0.25 / 8)))


def test_figures_made_of_figures():
    assert mean_of_means([Estimate(1.0, 3.0), Estimate(3.0, 4.0)]) == Estimate(2.0, 2.5)
    assert perplexity_of(Estimate(math.log(8), 0.25)) == Estimate(pytest.approx(8), pytest.approx(2))
    assert perplexity_of(Estimate(1e6, 1.0)).value == math.inf
