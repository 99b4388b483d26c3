"""Estimate figures and their standard errors from values of consecutive positions, which depend on each other.

Neighbouring tokens are about the same thing, so the values are taken together in blocks: the spread of whole blocks
tells how far a figure would move on another text of the kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its standard error, which is NaN where there are too few values to tell."""

    value: float
    error: float = math.nan

    def mapped(self, value: float, slope: float) -> Estimate:
        """Return what a function makes of the figure: its value, and the error times the function's slope there."""
        return Estimate(value, abs(slope) * self.error)

    def to_json(self) -> dict[str, float | None]:
        """Return the figure for JSON, which has no number for what is not finite."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}


def block_starts(count: int, block: int) -> Array:
    """Return where blocks of about `block` positions begin, nearly equal ones, in so many positions."""
    blocks = max(1, round(count / block))
    return np.arange(blocks, dtype=np.int64) * count // blocks


def mean_of(values: Array, starts: Array) -> Estimate:
    """Return the mean of all values; the standard error is that of a ratio of sums over blocks."""
    mean = float(values.mean())
    blocks = len(starts)
    if blocks < 2:
        return Estimate(mean)
    counts = np.diff(np.append(starts, len(values)))
    spread = np.add.reduceat(np.asarray(values, np.float64), starts) - mean * counts
    return Estimate(mean, math.sqrt(float((spread**2).sum()) * blocks / (blocks - 1)) / len(values))


def quantile_of(values: Array, share: float, starts: Array) -> Estimate:
    """Return a quantile of all values.

    Its standard error is Woodruff's: half the distance between the quantiles at the two ends of the interval that one
    standard error of the share of smaller values spans.
    """
    value = float(np.quantile(values, share))
    error = mean_of((values <= value).astype(np.float64), starts).error
    if not math.isfinite(error):
        return Estimate(value)
    low, high = np.quantile(values, [max(share - error, 0.0), min(share + error, 1.0)])
    return Estimate(value, float(high - low) / 2)


def share_of(hits: Array) -> Estimate:
    """Return the share of hits among independent trials, such as questions, and its standard error.

    Where all or none of them are hits, their spread says nothing; the error is then that of two hits and two misses
    more.
    """
    count, total = int(hits.sum()), len(hits)
    if 0 < count < total:
        share = count / total
        return Estimate(share, math.sqrt(share * (1 - share) / (total - 1)))
    share = (count + 2) / (total + 4)
    return Estimate(count / total, math.sqrt(share * (1 - share) / (total + 4)))


def mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent figures, each of which counts the same."""
    value = sum(part.value for part in parts) / len(parts)
    return Estimate(value, math.sqrt(sum(part.error**2 for part in parts)) / len(parts))


def perplexity_of(surprise: Estimate) -> Estimate:
    """Return the exponential of a mean surprise; it is infinite where that is too large a number."""
    try:
        value = math.exp(surprise.value)
    except OverflowError:
        return Estimate(math.inf)
    return surprise.mapped(value, value)
