"""Judge a lossy model by its predictions: KL divergence of next-token distributions and top-1 agreement.

Users read tokens, not tensors: errors of single rows relative to the largest value say little about the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.passes.framework.accuracy import QualityBar
from passopt.predictions.divergence import Divergence
from passopt.verification.report import PREDICTIONS, Row
from passopt.verification.scenarios import Observation, Scenario

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The 99th percentile and the top-1 agreement are judged from so many positions of a text on; fewer say nothing.
ENOUGH = 256


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
