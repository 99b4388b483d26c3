"""Compare what two decoders gave in all scenarios: outputs, perplexity and predictions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from passopt.passes.framework.accuracy import QualityBar
from passopt.predictions.divergence import divergence
from passopt.verification.divergence import judged_rows, logit_pairs
from passopt.verification.report import PREDICTIONS, TOP_1, Row, compare, compare_perplexity
from passopt.verification.scenarios import Observation, Scenario, perplexity
from passopt.verification.tolerances import Tolerance

#: A model that should agree may be off by this many times what the original moves by its own roundings, as long as
#: that is not more than so many times the tolerance.
_ROOM, _MOST = 2.0, 10.0

ORIGINAL = "against the original"
NUMPY_TWIN = "against its own codes, dequantised by numpy"


def compare_all(
    comparison: str,
    scenarios: Sequence[Scenario],
    expected: Sequence[Observation],
    found: Sequence[Observation],
    tolerance: Tolerance,
    bar: QualityBar | None = None,
    *,
    in_codes: bool = False,
) -> list[Row]:
    """Return the rows for all outputs of all scenarios, and one row for the perplexity of the text.

    With a `bar`, rows for the predictions decide, and the others are only shown. Of a model that keeps its cache
    `in_codes`, predictions after a cache of random numbers do not count: quantising numbers that no model has put there
    says nothing, and a trained model magnifies it.
    """
    rows: list[Row] = []
    for scenario, one, other in zip(scenarios, expected, found, strict=True):
        if not scenario.scored:
            rows += compare(comparison, scenario, one, other, tolerance.outputs)
    both = perplexity(scenarios, expected), perplexity(scenarios, found)
    rows += compare_perplexity(comparison, *both, tolerance.perplexity)
    if bar is None:
        return rows
    pairs, source = logit_pairs(scenarios, expected, found, text=True), "text"
    if not pairs:
        kept = [not (in_codes and scenario.past) for scenario in scenarios]
        judged = [list(itertools.compress(each, kept)) for each in (scenarios, expected, found)]
        pairs, source = logit_pairs(*judged, text=False), "random tokens"
    shown = [dataclasses.replace(row, judged=False) for row in rows if row.output != TOP_1]
    if any(one.shape != other.shape for one, other in pairs):
        return rows
    return judged_rows(comparison, bar, divergence(pairs), source) + shown


def suspects(rows: Sequence[Row]) -> set[str]:
    """Return the scenarios in which a comparison failed by so little that roundings may explain it."""
    return {row.scenario for row in rows if _is_suspect(row)}


def weigh_own_roundings(rows: Sequence[Row], moved: Sequence[Row]) -> list[Row]:
    """Return the rows, each failure judged again by how far the original moves when its own numbers are rounded.

    Some models magnify roundings: ALiBi adds numbers to scores that grow with the position, thousands near the end, and
    an fp32 score rounded there is off by 1e-4. A trained model may compute with large numbers that cancel, above all
    after a cache of random ones. The original itself is only known that well then. `moved` are rows of originals whose
    weights differ by a few roundings, against the original.
    """
    known: dict[tuple[str, str], float] = {}
    for row in moved:
        key = row.scenario, row.output
        known[key] = max(known.get(key, 0.0), row.error)
    return [_weighed(row, known.get((row.scenario, row.output), 0.0)) for row in rows]


def _weighed(row: Row, moved: float) -> Row:
    if not _is_suspect(row) or not row.error <= _ROOM * moved:
        return row
    note = f"roundings of its weights move the original by {moved:.1e}"
    tolerance = min(_ROOM * moved, _MOST * row.tolerance)
    return dataclasses.replace(row, tolerance=tolerance, note=", ".join(filter(None, (row.note, note))))


def _is_suspect(row: Row) -> bool:
    """Return whether outputs of models that should agree are beyond their tolerance by little."""
    is_output = row.judged and row.scenario != PREDICTIONS and row.output != TOP_1
    return is_output and row.tolerance < row.error <= _MOST * row.tolerance
