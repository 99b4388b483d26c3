"""The next token from logits: repetition penalty, temperature, top-k, top-p, defined and ordered as in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from passopt.ir.errors import UsageError

Scores = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. `top_k` 0 and `top_p` 1 switch theirs off; without `do_sample` only the penalty acts."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError with the option that is out of its range."""
        for name, holds, range_ in (
            ("temperature", self.temperature > 0, "above 0 (greedy instead of 0)"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {range_}")


class Sampler:
    """Chooses for several rows. Each has its own random numbers: what else is in a batch changes nothing."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Iterable[int]], vocab: int) -> None:
        """`prompts` are tokens that count as said already, per row."""
        self._sampling = sampling
        self._seen = np.zeros((len(prompts), vocab), bool)
        for row, prompt in enumerate(prompts):
            self._seen[row, list(prompt)] = True
        # Without a seed, rows still must not share their random numbers.
        seed = np.random.SeedSequence().entropy if sampling.seed is None else sampling.seed
        self._random = [np.random.default_rng([*_words(seed), row]) for row in range(len(prompts))]

    def choose(self, row: int, logits: Scores) -> int:
        """The next token of `row` from its logits [vocab]; it counts as said from now on."""
        scores = penalize(logits, self._seen[row], self._sampling.repetition_penalty)
        token = self._draw(row, scores) if self._sampling.do_sample else int(np.argmax(scores))
        self._seen[row, token] = True
        return token

    def _draw(self, row: int, scores: Scores) -> int:
        scores = keep_top_k(scores / np.float32(self._sampling.temperature), self._sampling.top_k)
        scores = keep_top_p(scores, self._sampling.top_p)
        kept = np.flatnonzero(scores > -np.inf)
        return int(self._random[row].choice(kept, p=_softmax(scores[kept])))


def _words(seed: object) -> list[int]:
    """A seed of any sign and size as numbers that numpy takes."""
    assert isinstance(seed, int)
    return [abs(seed), int(seed < 0)]


def penalize(logits: Scores, seen: npt.NDArray[np.bool_], penalty: float) -> Scores:
    """Scores of tokens that were `seen` [vocab] move away from being chosen, by a factor."""
    if penalty == 1:
        return logits
    factor = np.float32(penalty)
    return np.where(seen, np.where(logits < 0, logits * factor, logits / factor), logits)


def keep_top_k(scores: Scores, top_k: int) -> Scores:
    """All but the `top_k` largest become -inf; what equals the smallest of them stays."""
    if not 0 < top_k < len(scores):
        return scores
    smallest = np.partition(scores, -top_k)[-top_k]
    return np.where(scores < smallest, -np.float32(np.inf), scores)


def keep_top_p(scores: Scores, top_p: float) -> Scores:
    """The most likely tokens whose probabilities together reach `top_p`; the others become -inf."""
    if top_p >= 1:
        return scores
    kept = np.flatnonzero(scores > -np.inf)
    ascending = kept[np.argsort(scores[kept], kind="stable")]
    cumulative = np.cumsum(_softmax(scores[ascending]))
    dropped = ascending[:-1][cumulative[:-1] <= 1 - top_p]
    result = scores.copy()
    result[dropped] = -np.inf
    return result


def _softmax(scores: Scores) -> npt.NDArray[np.float64]:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return np.asarray(powers / powers.sum())
