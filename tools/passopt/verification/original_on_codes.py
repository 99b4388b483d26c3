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
from passopt.verification.dequantised_twin import dequantised_twin, is_quantized, without_quantised_rows
from passopt.verification.layerwise import OpenSession
from passopt.verification.quantised_weights import ON_CODES, on_codes, quantised_names
from passopt.verification.report import Row
from passopt.verification.scenarios import Scenario, observe
from passopt.verification.tolerances import TOLERANCES, TWIN_TOLERANCES, Tolerance, deep, judgement_of, precision_of
from passopt.verification.value_rows import Judge, Opener, Samples, Ties, compare_outputs

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
        both = _plain(reference, candidate, Path(folder))
        if both is None:
            return []
        expected, found = (observe(model, short, session) for model in both)
    return compare_all(ON_CODES, short, expected, found, allowed)


def outputs_on_codes(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    opened: Opener,
    samples: Samples,
    ties: Ties,
    scratch: Path | None,
) -> list[Row]:
    """Return the same for a graph of any kind, on inputs by name."""
    floats = judgement_of(*(precision_of(model).floats for model in (reference, candidate)))
    judge = Judge(TOLERANCES[floats.kind].outputs, floats.differ, ties, ON_CODES)
    with tempfile.TemporaryDirectory(prefix="passopt-codes-", dir=scratch) as folder:
        both = _plain(reference, candidate, Path(folder))
        if both is None:
            return []
        first, second = (opened(model) for model in both)
        return compare_outputs(judge, first, second, samples)


def _plain(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, folder: Path
) -> tuple[onnx_ir.Model, onnx_ir.Model] | None:
    """Return both models with plain activations and the same numbers as weights; None if codes and weights do not fit.

    A reference that is quantised itself has numbers of its own.
    """
    own, others = folder / "candidate", folder / "original"
    own.mkdir()
    others.mkdir()
    if is_quantized(reference):
        original = dequantised_twin(without_quantised_rows(reference), others)
    elif (found := on_codes(reference, candidate, others)) is not None:
        original = found
    else:
        return None
    return original, dequantised_twin(without_quantised_rows(candidate), own)


def _tokens(scenario: Scenario) -> int:
    return sum(step.input_ids.shape[1] for step in scenario.steps)
