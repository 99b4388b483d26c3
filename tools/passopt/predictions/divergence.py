"""Compute log-probabilities, surprise and KL divergence of next-token distributions from logits, in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The logits that are turned into fp64 at a time, in numbers: more would not stay in the caches of the CPU.
_AT_ONCE = 1 << 21


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL divergence of each position in nats, and whether both models predict the same token there."""

    kl: Array
    same: Array

    @property
    def mean(self) -> float:
        """Return the mean divergence."""
        return float(self.kl.mean()) if self.kl.size else 0.0

    @property
    def high(self) -> float:
        """Return the 99th percentile of the divergence."""
        return float(np.quantile(self.kl, 0.99)) if self.kl.size else 0.0

    @property
    def top1(self) -> float:
        """Return the share of positions at which both models predict the same token."""
        return float(self.same.mean()) if self.same.size else 1.0


def divergence(pairs: Iterable[tuple[Array, Array]]) -> Divergence:
    """Return the divergence of a candidate from a reference over pairs of logits [positions, vocab]."""
    kl: list[Array] = [np.zeros(0)]
    same: list[Array] = [np.zeros(0, bool)]
    for reference, candidate in pairs:
        for rows in row_slices(reference):
            one, other = log_softmax(reference[rows]), log_softmax(candidate[rows])
            kl.append(kl_of(one, other))
            same.append(one.argmax(axis=-1) == other.argmax(axis=-1))
    return Divergence(np.concatenate(kl), np.concatenate(same))


def row_slices(logits: Array) -> Iterable[slice]:
    """Yield slices of the rows of logits [positions, vocab], so few at a time that fp64 copies of them are small."""
    step = max(1, _AT_ONCE // max(logits.shape[-1], 1))
    return (slice(start, start + step) for start in range(0, len(logits), step))


def log_softmax(logits: Array) -> Array:
    """Return the logarithms of the probabilities, in fp64; a row of logits that are not finite becomes NaN."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def kl_of(reference: Array, candidate: Array) -> Array:
    """Return the KL divergence of each row from log-probabilities [positions, vocab], in nats."""
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(reference), 0.0, np.exp(reference) * (reference - candidate))
    found: Array = terms.sum(axis=-1)
    return found


def surprises(log_probabilities: Array, targets: Array) -> Array:
    """Return −log p of the target of each row, in nats."""
    found: Array = -log_probabilities[np.arange(len(targets)), targets]
    return found
