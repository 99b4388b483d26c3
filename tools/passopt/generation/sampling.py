"""Choose the next token from logits.

Repetition penalty, temperature, top-k and top-p are defined and ordered as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from passopt.ir.errors import UsageError

Scores = npt.NDArray[np.float32]


#: The factors that leave scores of any size finite in fp32.
_LEAST, _MOST = 1e-6, 1e6
_SPAN = f"{_LEAST:g} to {_MOST:,.0f}"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of choosing tokens.

    A `top_k` of 0 and a `top_p` of 1 switch that limit off. Without `do_sample` only the repetition penalty has an
    effect.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UsageError: If an option is out of its range.
        """
        for name, holds, range_ in (
            ("temperature", _LEAST <= self.temperature <= _MOST, f"{_SPAN} (greedy instead of 0)"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", _LEAST <= self.repetition_penalty <= _MOST, _SPAN),
        ):
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {range_}")


class Sampler:
    """Choose tokens for several rows.

    Each row has its own random numbers, so its tokens do not depend on what else is in the batch.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Iterable[int]], vocab: int) -> None:
        """Prepare a row for each prompt; the tokens of the prompt count as said already."""
        self._sampling = sampling
        self._seen = np.zeros((len(prompts), vocab), bool)
        for row, prompt in enumerate(prompts):
            self._seen[row, list(prompt)] = True
        # Rows must not share their random numbers, so a seed is drawn if none is given.
        seed = np.random.SeedSequence().entropy if sampling.seed is None else sampling.seed
        self._random = [np.random.default_rng([*_words(seed), row]) for row in range(len(prompts))]

    def choose(self, row: int, logits: Scores) -> int:
        """Return the next token of `row` from its logits [vocab], and count it as said from now on."""
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
    """Return a seed of any sign and size as the non-negative numbers that numpy takes."""
    assert isinstance(seed, int)
    return [abs(seed), int(seed < 0)]


def penalize(logits: Scores, seen: npt.NDArray[np.bool_], penalty: float) -> Scores:
    """Return the logits with the scores of `seen` tokens [vocab] made less likely by the factor `penalty`."""
    if penalty == 1:
        return logits
    factor = np.float32(penalty)
    return np.where(seen, np.where(logits < 0, logits * factor, logits / factor), logits)


def keep_top_k(scores: Scores, top_k: int) -> Scores:
    """Return the scores with all but the `top_k` largest set to -inf; ties with the smallest of these stay."""
    if not 0 < top_k < len(scores):
        return scores
    smallest = np.partition(scores, -top_k)[-top_k]
    return np.where(scores < smallest, -np.float32(np.inf), scores)


def keep_top_p(scores: Scores, top_p: float) -> Scores:
    """Return the scores with all set to -inf but the most likely tokens whose probabilities together reach `top_p`."""
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
