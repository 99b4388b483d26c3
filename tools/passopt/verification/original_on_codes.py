"""Compare a quantised model with the original on the candidate's own codes: tightly, for all that int8 does not touch.

Predictions of a lossy model may move, and would hide a wrong norm or embedding. Where both models multiply the same
numbers, nothing is left that may differ by more than sums in another order do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir

from passopt.ir.graph.decoder import decoder_of
from passopt.verification.comparisons import compare_all
from passopt.verification.dequantised_twin import dequantised_twin, without_quantised_rows
from passopt.verification.layerwise import OpenSession
from passopt.verification.quantised_weights import ON_CODES, on_codes, quantised_names
from passopt.verification.report import Row
from passopt.verification.scenarios import Scenario, observe
from passopt.verification.tolerances import TWIN_TOLERANCES, Tolerance, deep

#: Longer scenarios are left out: a wrong weight shows in short ones.
_LONGEST = 64


def against_original_on_codes(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    session: OpenSession,
    scratch: Path | None,
    tolerance: Tolerance | None = None,
) -> list[Row]:
    """Return the rows of the candidate, with plain activations, against the original with the numbers of its codes.

    The result is empty if some codes stand for no weight of the original, as after its weights were split or rotated.
    """
    short = [item for item in scenarios if not item.scored and item.past + _tokens(item) <= _LONGEST]
    if not short or not quantised_names(candidate):
        return []
    allowed = tolerance or deep(TWIN_TOLERANCES[decoder_of(candidate).cache_dtype], candidate)
    with tempfile.TemporaryDirectory(prefix="passopt-codes-", dir=scratch) as folder:
        original = on_codes(reference, candidate, Path(folder))
        if original is None:
            return []
        expected = observe(original, short, session)
        found = observe(dequantised_twin(without_quantised_rows(candidate), Path(folder)), short, session)
    return compare_all(ON_CODES, short, expected, found, allowed)


def _tokens(scenario: Scenario) -> int:
    return sum(step.input_ids.shape[1] for step in scenario.steps)
