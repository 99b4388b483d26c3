"""Compare a quantised model with the original on the candidate's own codes: tightly, for all that int8 does not touch.

Predictions of a lossy model may move, and would hide a wrong norm or embedding. Where both models multiply the same
numbers, nothing is left that may differ by more than sums in another order do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.graph.decoder import decoder_of
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.sources import external_source
from passopt.verification.comparisons import compare_all
from passopt.verification.dequantised_twin import dequantised_twin, without_quantised_rows
from passopt.verification.layerwise import OpenSession
from passopt.verification.quantised_weights import CODES, SCALES, numbers_of_codes
from passopt.verification.report import Row
from passopt.verification.scenarios import Scenario, observe
from passopt.verification.tolerances import TWIN_TOLERANCES, Tolerance, deep

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

COMPARISON = "against the original on the candidate's own codes"
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
    names = _quantised(candidate)
    if not short or not names or not all(name in reference.graph.initializers for name in names):
        return []
    allowed = tolerance or deep(TWIN_TOLERANCES[decoder_of(candidate).cache_dtype], candidate)
    with tempfile.TemporaryDirectory(prefix="passopt-codes-", dir=scratch) as folder:
        original = _on_codes(reference, candidate, names, Path(folder))
        if original is None:
            return []
        expected = observe(original, short, session)
        found = observe(dequantised_twin(without_quantised_rows(candidate), Path(folder)), short, session)
    return compare_all(COMPARISON, short, expected, found, allowed)


def _tokens(scenario: Scenario) -> int:
    return sum(step.input_ids.shape[1] for step in scenario.steps)


def _quantised(candidate: onnx_ir.Model) -> list[str]:
    given = candidate.graph.initializers
    return [name.removesuffix(CODES) for name, value in given.items() if name.endswith(CODES) and value.uses()]


def _on_codes(
    reference: onnx_ir.Model, candidate: onnx_ir.Model, names: Sequence[str], folder: Path
) -> onnx_ir.Model | None:
    """Return a clone of the original that reads the numbers of the candidate's codes, or None if they do not fit."""
    original = reference.clone()
    graph = original.graph
    for index, name in enumerate(names):
        weight, kept = graph.initializers[name], candidate.graph.initializers.get(name)
        codes, scales = (candidate.graph.initializers.get(name + part) for part in (CODES, SCALES))
        parts = [None if value is None else expression_of(value) for value in (weight, codes, scales)]
        if any(part is None or part.depends_on_rank for part in parts):
            return None
        made = numbers_of_codes(*parts)  # type: ignore[arg-type]
        if made is None:
            return None
        source = folder / f"codes-{index}.bin"
        dtype = parts[0].dtype  # type: ignore[union-attr]
        source.write_bytes(made.astype(dtype.numpy()).tobytes())
        expression = external_source(source, f"{name}.numbers", dtype, made.shape, 0)
        value = onnx_ir.Value(
            name=f"{name}.numbers",
            type=onnx_ir.TensorType(dtype),
            shape=onnx_ir.Shape(made.shape),
            const_value=LazyWeight(expression, f"{name}.numbers"),
        )
        graph.register_initializer(value)
        plain = set() if kept is None else {use.node.op_type for use in kept.uses()}
        for use in list(weight.uses()):  # a table that is the head, too, may be quantised in one of its places only
            if use.node.op_type not in plain:
                use.node.replace_input_with(use.idx, value)
        if not weight.uses():
            del graph.initializers[name]
    return original
