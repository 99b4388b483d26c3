"""Compare a quantised model with its own codes, dequantised by numpy: tightly, since nothing but kernels differ."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of
from passopt.verification.comparisons import NUMPY_TWIN, ORIGINAL, compare_all
from passopt.verification.dequantised_twin import dequantised_twin, has_dynamic_activations, is_quantized
from passopt.verification.layerwise import Label, OpenSession, run_layerwise
from passopt.verification.report import Row
from passopt.verification.scenarios import Observation, Scenario, observe
from passopt.verification.tolerances import DYNAMIC_TWIN_TOLERANCE, TWIN_TOLERANCES, Tolerance, deep


def against_own_codes(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    found: Sequence[Observation],
    session: OpenSession,
    scratch: Path | None,
    *,
    by_layers: bool,
) -> list[Row]:
    """Return the rows of a quantised candidate against its own codes as numbers.

    Where activations are quantised, a half that rounds the other way in one layer is a large difference some layers
    later, so layers are compared one by one, each on the activations of the original.
    """
    own = twin_tolerance(candidate) if is_quantized(candidate) else None
    if own is None:
        return []
    if has_dynamic_activations(candidate) and by_layers:
        layers = _by_layers(reference, candidate, scenarios, own, session, scratch)
        if layers:  # a graph that is not cut into layers is compared as a whole
            text = [index for index, scenario in enumerate(scenarios) if scenario.scored]
            given, seen = [scenarios[index] for index in text], [found[index] for index in text]
            ends = (
                compare_all(NUMPY_TWIN, given, _twin_of(candidate, given, session, scratch), seen, own) if text else []
            )
            return [*layers, *(dataclasses.replace(row, judged=False) for row in ends)]
    twin = _twin_of(candidate, scenarios, session, scratch)
    return compare_all(NUMPY_TWIN, scenarios, twin, found, deep(own, candidate))


def _twin_of(
    candidate: onnx_ir.Model, scenarios: Sequence[Scenario], session: OpenSession, scratch: Path | None
) -> list[Observation]:
    with tempfile.TemporaryDirectory(prefix="passopt-twin-", dir=scratch) as folder:
        return observe(dequantised_twin(candidate, Path(folder)), scenarios, session)


def _by_layers(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    own: Tolerance,
    session: OpenSession,
    scratch: Path | None,
) -> list[Row]:
    plain = [scenario for scenario in scenarios if not scenario.scored]
    label = Label(f"{NUMPY_TWIN}, layer by layer", own.outputs)
    try:
        result = run_layerwise(reference, candidate, plain, session, Label(ORIGINAL, 1.0), label, scratch)
    except ModelError:
        return []
    return [row for row in result.rows if row.comparison == label.comparison]


def twin_tolerance(candidate: onnx_ir.Model) -> Tolerance:
    """Return the tolerance of a quantised model against its own codes as numbers."""
    if has_dynamic_activations(candidate):
        return DYNAMIC_TWIN_TOLERANCE
    return TWIN_TOLERANCES[decoder_of(candidate).cache_dtype]
