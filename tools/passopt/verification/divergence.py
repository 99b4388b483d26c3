"""Judge a lossy model by its predictions: KL divergence of next-token distributions and top-1 agreement.

Users read tokens, not tensors: errors of single rows relative to the largest value say little about the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.passes.framework.accuracy import QualityBar
from passopt.verification.report import PREDICTIONS, Row
from passopt.verification.scenarios import Observation, Scenario

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The 99th percentile and the top-1 agreement are judged from so many positions of a text on; fewer say nothing.
ENOUGH = 256
#: Rows of logits that are compared at a time.
_ROWS = 256


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
        for start in range(0, len(reference), _ROWS):
            one, other = (_log_softmax(logits[start : start + _ROWS]) for logits in (reference, candidate))
            with np.errstate(invalid="ignore"):
                terms = np.where(np.isneginf(one), 0.0, np.exp(one) * (one - other))
            kl.append(terms.sum(axis=-1))
            same.append(one.argmax(axis=-1) == other.argmax(axis=-1))
    return Divergence(np.concatenate(kl), np.concatenate(same))


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # logits that are not finite make NaN, which no bar lets pass
        wide = wide - wide.max(axis=-1, keepdims=True)
        result: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def logit_pairs(
    scenarios: Sequence[Scenario], expected: Sequence[Observation], found: Sequence[Observation], *, text: bool
) -> list[tuple[Array, Array]]:
    """Return the logits of both models at the positions that hold tokens: of the text, or of the random tokens.

    Of a text, these are the positions that no window before has scored. A model that gives the logits of the last
    position only is compared there.
    """
    pairs = []
    for scenario, one, other in zip(scenarios, expected, found, strict=True):
        if bool(scenario.scored) != text:
            continue
        for step, first, second in zip(scenario.steps, one.logits, other.logits, strict=False):
            kept = min(first.shape[1], second.shape[1])
            valid = step.valid[:, -kept:]
            if scenario.scored:
                valid = valid & (np.arange(kept) >= kept - scenario.scored)
            pairs.append((first[:, -kept:][valid], second[:, -kept:][valid]))
    return pairs


def judged_rows(comparison: str, bar: QualityBar, found: Divergence, source: str) -> list[Row]:
    """Return the rows that judge a lossy model, from the logits of `source`: "text" or "random tokens".

    Random tokens are no text, and on them models are unsure: there the top-1 agreement is shown, but not judged.
    """
    count = len(found.kl)
    enough = count >= ENOUGH
    note = f"{count} positions of {source}"
    agreed = f"top-1 {found.top1:.3f}, "
    few = f"{note}; not judged below {ENOUGH}" if not enough else note
    unsure = agreed + (f"{note}; judged on a text only" if source != "text" else few)
    disagreement, allowed = 1 - found.top1, 1 - bar.top1
    return [
        Row(comparison, PREDICTIONS, "KL mean", found.mean, bar.kl, note),
        Row(comparison, PREDICTIONS, "KL 99 %", found.high, bar.kl99, few, judged=enough),
        Row(comparison, PREDICTIONS, "top-1 lost", disagreement, allowed, unsure, judged=enough and source == "text"),
    ]
