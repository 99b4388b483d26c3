"""Compare a quantised model with its own codes, dequantised by numpy: tightly, since nothing but kernels differ."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.attention.int8_cache import int8_caches
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of
from passopt.ir.graph.linears import Linear
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import expression_of
from passopt.verification.comparisons import NUMPY_TWIN, ORIGINAL, compare_all
from passopt.verification.dequantised_twin import (
    dequantised_twin,
    dynamic_linears,
    has_dynamic_activations,
    is_quantized,
    without_int8_cache,
    without_quantised_rows,
)
from passopt.verification.layerwise import Label, OpenSession, run_layerwise
from passopt.verification.report import Row
from passopt.verification.scenarios import Observation, Scenario, Step, observe
from passopt.verification.tolerances import DYNAMIC_TWIN_TOLERANCE, TWIN_TOLERANCES, Tolerance, deep, widened
from passopt.verification.value_rows import Judge, Opener, Samples, Ties, compare_outputs

#: The comparison of a model's steps, on the cache that it made, with the same tokens in one step.
OWN_CACHE = "step by step against one step"


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
    later, so layers are compared one by one, each on the activations of the original. A graph in fp16 is compared as
    fp32, and a cache in 8 bits as numbers, since their roundings are large differences at the end, too.
    """
    if not is_quantized(candidate):
        return []
    if (wide := widened(without_int8_cache(candidate))) is not candidate:
        reference, candidate = widened(without_int8_cache(reference)), wide
        found = observe(candidate, scenarios, session)
    own = twin_tolerance(candidate)
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
    if has_dynamic_activations(candidate) or int8_caches(candidate):
        return DYNAMIC_TWIN_TOLERANCE
    return TWIN_TOLERANCES[decoder_of(candidate).dtype]


def outputs_against_own_codes(
    candidate: onnx_ir.Model, opened: Opener, samples: Samples, ties: Ties, scratch: Path | None
) -> list[Row]:
    """Return the rows of a graph of any kind against its own codes as numbers, on inputs by name.

    Where activations are quantised, each linear is compared by itself, on the codes that the graph computes: a half
    that rounds the other way would be a large difference at the end.
    """
    candidate = widened(candidate)
    judge = Judge(TWIN_TOLERANCES[DataType.FLOAT].outputs, False, ties, NUMPY_TWIN)
    rows = []
    if has_dynamic_activations(candidate):
        rows = _each_linear(candidate, opened, samples, judge)
        candidate = without_quantised_rows(candidate)
    with tempfile.TemporaryDirectory(prefix="passopt-twin-", dir=scratch) as folder:
        first, second = opened(dequantised_twin(candidate, Path(folder))), opened(candidate)
        return rows + compare_outputs(judge, first, second, samples)


def _each_linear(candidate: onnx_ir.Model, opened: Opener, samples: Samples, judge: Judge) -> list[Row]:
    """Return a row for each linear with quantised activations: its output against the product of its codes."""
    shown = candidate.clone()
    linears = dynamic_linears(shown)
    outputs = {value.name for value in shown.graph.outputs}
    for linear in linears:
        assert linear.rows is not None
        for value in (linear.rows.codes, linear.rows.scales, linear.output):
            if value.name not in outputs:
                outputs.add(value.name)
                shown.graph.outputs.append(value)
    run = opened(shown)
    seen = [(name, feeds, run(feeds)) for name, feeds in samples]
    rows = []
    for linear in linears:
        assert linear.rows is not None
        weight = _numbers(linear)
        for name, feeds, found in seen:
            codes, scales, output = (
                found[value.name or ""] for value in (linear.rows.codes, linear.rows.scales, linear.output)
            )
            product = (codes.astype(np.float32) @ weight) * scales.astype(np.float32)
            rows.append(judge.row(name, linear.output.name or "", product.astype(output.dtype), output, feeds))
    return rows


def _numbers(linear: Linear) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the weight [k, n] of a linear as numbers: its codes times its scales."""
    codes, scales = (expression_of(value) for value in (linear.weight.value, linear.weight.scales) if value is not None)
    assert codes is not None
    assert scales is not None
    with Evaluator() as evaluator:
        numbers, factors = (evaluator.array(part).astype(np.float32) for part in (codes, scales))
    found: np.ndarray[Any, np.dtype[Any]] = numbers.T if linear.weight.transposed else numbers
    return found * factors


def against_one_step(
    scenarios: Sequence[Scenario],
    found: Sequence[Observation],
    observed: Callable[[Sequence[Scenario]], Sequence[Observation]],
) -> list[Row]:
    """Return a row for the logits of each scenario of several steps that begins with an empty cache.

    Predictions of a text do not read a cache back, so a lossy cache that is read wrongly would not show in them. A row
    of a cache in 8 bits does not depend on how tokens are cut into steps.

    Args:
        scenarios: All scenarios.
        found: What the model gave in them.
        observed: Runs the same model through other scenarios.
    """
    several = [
        (scenario, seen)
        for scenario, seen in zip(scenarios, found, strict=True)
        if len(scenario.steps) > 1 and not scenario.scored and not scenario.past
    ]
    whole = [dataclasses.replace(scenario, steps=(_joined(scenario.steps),)) for scenario, _ in several]
    if not whole:
        return []
    expected = [Observation(seen.logits) for seen in observed(whole)]
    joined = [_in_one(seen, one) for (_, seen), one in zip(several, expected, strict=True)]
    rows = compare_all(OWN_CACHE, whole, expected, joined, DYNAMIC_TWIN_TOLERANCE)
    return [row for row in rows if row.output == "logits"]


def _joined(steps: Sequence[Step]) -> Step:
    """Return all steps as one."""
    ids, positions = (
        np.concatenate([getattr(step, name) for step in steps], axis=1) for name in ("input_ids", "position_ids")
    )
    return Step(ids, steps[-1].attention_mask, positions)


def _in_one(seen: Observation, whole: Observation) -> Observation:
    """Return the logits of all steps as those of one; only the last ones if the model gives no others."""
    logits = np.concatenate(seen.logits, axis=1)
    return Observation([logits[:, -whole.logits[0].shape[1] :]])
