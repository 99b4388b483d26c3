"""int8 and int4 keep the codes of weights that were quantised elsewhere, and method=stored leaves all others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest

from passopt.ir.weights.dequantized import Dequantized, dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.precision.quantize_groups import QuantizeGroups
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import check, read_model

RNG = np.random.default_rng(18)
CODES = RNG.integers(-128, 128, (10, 64)).astype(np.int8)
SCALES = RNG.uniform(1e-3, 1e-2, 10).astype(np.float32)
NIBBLES = RNG.integers(-8, 8, (10, 64)).astype(np.int8)
COUNTED = RNG.uniform(1e-2, 1e-1, (10, 2)).astype(np.float32)

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,64] x) => (float[batch,10] y, float[batch,3] z) <float[10,64] w = random, float[64,3] v = random> {
    t = Transpose<perm=[1,0]>(w)
    y = MatMul(x, t)
    z = MatMul(x, v)
}"""


def model(weight: Dequantized) -> onnx_ir.Model:
    """A linear whose weight was quantised elsewhere, beside one of floats."""
    found = read_model(TEXT)
    found.graph.initializers["w"].const_value = LazyWeight(weight, "w")
    return found


def values(found: onnx_ir.Model, name: str) -> Any:
    expression = expression_of(found.graph.initializers[name])
    assert expression is not None
    with Evaluator() as evaluator:
        return evaluator.array(expression)


def test_int8_keeps_the_codes() -> None:
    weight = dequantized(Literal.of(CODES), Literal.of(SCALES))
    found, _ = check(QuantizeWeights(), model(weight), tolerance=0.1)
    np.testing.assert_array_equal(values(found, "w.codes"), CODES)
    np.testing.assert_array_equal(values(found, "w.scales"), SCALES)
    assert "v.codes" in found.graph.initializers


def test_stored_is_exact_and_leaves_others_alone() -> None:
    weight = dequantized(Literal.of(CODES), Literal.of(SCALES))
    found, result = check(QuantizeWeights(method="stored"), model(weight), tolerance=1e-6)
    np.testing.assert_array_equal(values(found, "w.codes"), CODES)
    assert "v.codes" not in found.graph.initializers
    assert "the weight was not quantised before it was exported, or not by output channels" in result.declines


def test_groups_are_kept_exactly() -> None:
    weight = dequantized(Literal.of(NIBBLES), Literal.of(COUNTED))
    found, result = check(QuantizeGroups(method="stored", group=32), model(weight), tolerance=1e-6)
    assert found.graph.initializers["w.codes"].dtype == DataType.INT4
    np.testing.assert_array_equal(values(found, "w.codes").astype(np.int8), NIBBLES)
    np.testing.assert_array_equal(values(found, "w.scales"), COUNTED)
    assert "v.codes" not in found.graph.initializers
    assert "the weight was not quantised in groups of 32 before it was exported" in result.declines


@pytest.mark.parametrize(
    ("rule", "codes", "scales"),
    [
        (QuantizeWeights(method="stored"), NIBBLES, COUNTED),
        (QuantizeGroups(method="stored", group=64), NIBBLES, COUNTED),
        (QuantizeGroups(method="stored", group=64), CODES, SCALES),
    ],
)
def test_codes_of_another_kind_are_not_taken(rule: Any, codes: Any, scales: Any) -> None:
    _, result = check(rule, model(dequantized(Literal.of(codes), Literal.of(scales))))
    assert not result.modified


def test_codes_in_another_number_of_groups_are_rounded_anew() -> None:
    weight = dequantized(Literal.of(NIBBLES), Literal.of(COUNTED))
    found, _ = check(QuantizeWeights(), model(weight), tolerance=0.1)
    assert np.abs(values(found, "w.codes")).max() == 127
