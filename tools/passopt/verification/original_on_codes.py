"""Compare a quantised model with the original on the candidate's own codes: tightly, for all that int8 does not touch.

Predictions of a lossy model may move, and would hide a wrong norm or embedding. Where both models multiply the same
numbers, nothing is left that may differ by more than sums in another order do.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.attention.int8_cache import int8_caches
from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.verification.comparisons import compare_all
from passopt.verification.dequantised_twin import (
    dequantised_twin,
    is_quantized,
    without_int8_cache,
    without_quantised_rows,
)
from passopt.verification.layerwise import Label, OpenSession, run_layerwise
from passopt.verification.quantised_weights import ON_CODES, on_codes, quantised_names
from passopt.verification.report import Row
from passopt.verification.scenarios import Scenario, observe
from passopt.verification.tolerances import TOLERANCES, TWIN_TOLERANCES, deep, judgement_of, precision_of, widened
from passopt.verification.value_rows import Judge, Opener, Samples, Ties, compare_outputs

#: The comparison of a model whose cache alone is in 8 bits, with the cache as numbers.
WITH_NUMBERS = "against the original, with a cache of numbers"
#: Longer scenarios are left out: a wrong weight shows in short ones.
_LONGEST = 64


def against_original_on_codes(
    reference: onnx_ir.Model,
    candidate: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    session: OpenSession,
    scratch: Path | None,
    far: Sequence[Scenario] = (),
) -> list[Row]:
    """Return the rows of the candidate, with plain activations, against the original with the numbers of its codes.

    A cache in 8 bits is kept as numbers there. The result is empty if some codes stand for no weight of the original,
    as after its weights were split or rotated. Scenarios that are `far` run layer by layer, if the models can be cut.
    """
    has_cache = bool(int8_caches(candidate))
    # With the same weights, nothing but the cache differs, and late positions are compared as well.
    longest = _LONGEST if quantised_names(candidate) else math.inf
    short = [item for item in scenarios if not item.scored and item.past + _tokens(item) <= longest]
    if not short or not (has_cache or quantised_names(candidate)):
        return []
    exact = not precision_of(candidate).narrow
    allowed = deep(TWIN_TOLERANCES[DataType.FLOAT], candidate) if exact else TOLERANCES["bf16"]
    with tempfile.TemporaryDirectory(prefix="passopt-codes-", dir=scratch) as folder:
        both = _plain(reference, candidate, Path(folder))
        if both is None:
            return []
        expected, found = (observe(model, short, session) for model in both)
        rows = compare_all(ON_CODES if quantised_names(candidate) else WITH_NUMBERS, short, expected, found, allowed)
        if far:
            label = Label(f"{ON_CODES}, {far[0].name}, layer by layer", allowed.outputs)
            with contextlib.suppress(ModelError):
                rows += run_layerwise(*both, far, session, label, label, scratch).rows
    return rows


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

    A reference that is quantised itself has numbers of its own. Graphs in 16 bits run as fp32, and where the candidate
    holds a weight of the original rounded, both do.
    """
    reference, candidate = without_int8_cache(reference), without_int8_cache(candidate)
    own, others = folder / "candidate", folder / "original"
    own.mkdir()
    others.mkdir()
    if is_quantized(reference):
        original = dequantised_twin(without_quantised_rows(reference), others)
    elif (found := on_codes(reference, candidate, others)) is not None:
        original = found
    elif not is_quantized(candidate):
        original = reference
    else:
        return None
    plain = widened(dequantised_twin(without_quantised_rows(candidate), own))
    original = widened(original)
    _round_weights(original, plain)
    return original, plain


def _round_weights(original: onnx_ir.Model, candidate: onnx_ir.Model) -> None:
    """Round the weights of the original that the candidate holds rounded to 16 bits; others stay as they are."""
    for name, value in original.graph.initializers.items():
        other = candidate.graph.initializers.get(name)
        parts = [None if item is None else expression_of(item) for item in (value, other)]
        if value.dtype != DataType.FLOAT or other is None or other.dtype != DataType.FLOAT or None in parts:
            continue
        one, two = parts
        assert one is not None
        assert two is not None
        if one == two or one.shape != two.shape or one.depends_on_rank or two.depends_on_rank:
            continue
        with Evaluator() as evaluator:
            for dtype in (DataType.FLOAT16, DataType.BFLOAT16):
                rounded = one.cast(dtype).cast(DataType.FLOAT)
                if np.array_equal(evaluator.array(rounded), evaluator.array(two)):
                    value.const_value = LazyWeight(rounded, name)
                    break


def _tokens(scenario: Scenario) -> int:
    return sum(step.input_ids.shape[1] for step in scenario.steps)
