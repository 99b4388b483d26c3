"""Compare what two decoders gave in all scenarios: outputs, perplexity and predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from passopt.passes.framework.accuracy import QualityBar
from passopt.verification.divergence import divergence, judged_rows, logit_pairs
from passopt.verification.report import TOP_1, Row, compare, compare_perplexity
from passopt.verification.scenarios import Observation, Scenario, perplexity
from passopt.verification.tolerances import Tolerance

ORIGINAL = "against the original"
NUMPY_TWIN = "against its own codes, dequantised by numpy"


def compare_all(
    comparison: str,
    scenarios: Sequence[Scenario],
    expected: Sequence[Observation],
    found: Sequence[Observation],
    tolerance: Tolerance,
    bar: QualityBar | None = None,
) -> list[Row]:
    """Return the rows for all outputs of all scenarios, and one row for the perplexity of the text.

    With a `bar`, rows for the predictions decide, and the others are only shown.
    """
    rows: list[Row] = []
    for scenario, one, other in zip(scenarios, expected, found, strict=True):
        if not scenario.scored:
            allowed = tolerance.outputs * (tolerance.strange if scenario.strange else 1)
            rows += compare(comparison, scenario, one, other, allowed)
    both = perplexity(scenarios, expected), perplexity(scenarios, found)
    rows += compare_perplexity(comparison, *both, tolerance.perplexity)
    if bar is None:
        return rows
    pairs, source = logit_pairs(scenarios, expected, found, text=True), "text"
    if not pairs:
        pairs, source = logit_pairs(scenarios, expected, found, text=False), "random tokens"
    shown = [dataclasses.replace(row, judged=False) for row in rows if row.output != TOP_1]
    if any(one.shape != other.shape for one, other in pairs):
        return rows
    return judged_rows(comparison, bar, divergence(pairs), source) + shown
