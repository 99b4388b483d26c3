"""Sampling against transformers' own processors, on random logits."""

import numpy as np
import pytest

from passopt.generation.sampling import Sampler, Sampling, keep_top_k, keep_top_p, penalize
from passopt.ir.errors import UsageError

VOCAB = 97
SEEN = [3, 3, 50, 96]


def logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(0.3, 5, 0.85, 1.05), (1.0, 0, 0.9, 1.0), (2.5, 40, 1.0, 0.7), (0.7, 200, 0.5, 1.5), (1.0, 1, 0.01, 1.0)],
)
def test_the_same_tokens_are_left_with_the_same_scores(seed, temperature, top_k, top_p, penalty):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    ids, scores = torch.tensor([SEEN]), torch.from_numpy(logits(seed)[None].copy())
    steps = [process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(temperature)]
    steps += [process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        scores = step(ids, scores)
    seen = np.zeros(VOCAB, bool)
    seen[SEEN] = True
    found = penalize(logits(seed), seen, penalty) / np.float32(temperature)
    found = keep_top_p(keep_top_k(found, top_k), top_p)
    np.testing.assert_allclose(found, scores[0].numpy(), rtol=1e-6)
    assert np.isfinite(found).any()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    sampling = Sampling(do_sample=True, temperature=0.8, top_k=6, top_p=0.95, seed=11)
    scores = keep_top_p(keep_top_k(logits(1) / np.float32(0.8), 6), 0.95)
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    sampler = Sampler(sampling, [[]], VOCAB)
    drawn = np.bincount([sampler.choose(0, logits(1)) for _ in range(4000)], minlength=VOCAB) / 4000
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(drawn, expected, atol=0.04)


def test_what_was_said_is_penalised_from_then_on():
    scores = np.zeros(VOCAB, np.float32)
    scores[[4, 9]] = [1.0, 0.9]
    sampler = Sampler(Sampling(repetition_penalty=1.2), [[9], []], VOCAB)
    assert [sampler.choose(0, scores) for _ in range(2)] == [4, 4]  # both said: 1/1.2 against 0.9/1.2
    assert [sampler.choose(1, scores) for _ in range(2)] == [4, 9]


def test_tokens_of_equal_score_at_the_border_of_top_k_stay():
    scores = np.array([1, 3, 2, 2, 0], np.float32)
    np.testing.assert_array_equal(keep_top_k(scores, 2), [-np.inf, 3, 2, 2, -np.inf])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": 1e-50},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e300},
    ],
)
def test_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        Sampling(**wrong)
