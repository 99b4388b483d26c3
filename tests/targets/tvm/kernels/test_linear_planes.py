"""Linears of int8 weights and fp32 activations by bytes: where rows are hard to hold in integers, against float64."""

from typing import Any

import numpy as np
import pytest

from passopt.ir.evaluate import Evaluator
from passopt.ir.expressions import DataType, Expression, Fill, Literal
from passopt.targets.tvm.features import Cpu, level, missing_features
from passopt.targets.tvm.kernels.linear import plan_int8
from passopt.targets.tvm.kernels.linear_planes import LIMIT, MAX_INPUTS
from passopt.targets.tvm.kernels.standalone import compile_kernel

pytest.importorskip("tvm")

ISA = level("avx512-vnni")
OUTPUTS, INPUTS = 70, 1027
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def codes() -> Array:
    return np.random.default_rng(5).integers(-127, 128, (OUTPUTS, INPUTS)).astype(np.int8)


@pytest.fixture(scope="module")
def linear(codes: Array):
    """Callable x [M, INPUTS] → y [M, OUTPUTS], with scales of 1."""
    missing = missing_features(ISA.features)
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    plan = plan_int8(Literal.of(codes), Literal.of(np.ones(OUTPUTS, np.float32)), ISA)
    kernel = compile_kernel(plan.function(), Cpu("icelake-server", ISA))
    with Evaluator() as evaluator:
        weights = [read(evaluator, expression) for _, expression in plan.weights]

    def call(x: Array) -> Array:
        y = np.full((len(x), OUTPUTS), np.nan, np.float32)
        kernel(x, *weights, y)
        return y

    return call


def read(evaluator: Evaluator, expression: Expression) -> Array:
    return np.ascontiguousarray(evaluator.read(expression, tuple((0, length) for length in expression.shape)))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 65, 191])
def test_integers_of_three_bytes_are_exact(linear, codes: Array, rows: int):
    """Both limits and all bytes between: nothing is rounded but the sums, which fp32 holds to 2^-24."""
    x = np.random.default_rng(rows).integers(-LIMIT, LIMIT + 1, (rows, INPUTS))
    x[:, 0], x[:, 1] = LIMIT, -LIMIT
    expected = x @ codes.astype(np.int64).T
    bound = 2.0**-23 * (np.abs(expected) + 65_536 * np.abs(codes.astype(np.int64)).sum(axis=1))
    assert (np.abs(linear(x.astype(np.float32)) - expected) < bound).all()
    single = np.zeros((rows, INPUTS), np.float32)
    single[:, 0] = LIMIT
    for row in range(rows):
        single[row, 1 + row] = (1, -1, 255, -256, 65_535, -65_536, 65_793)[row % 7]
    expected = single.astype(np.float64) @ codes.astype(np.float64).T
    np.testing.assert_allclose(linear(single), expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("rows", [1, 8, 130])
def test_a_large_number_costs_others_no_more_than_a_sum_in_fp32_does(linear, codes: Array, rows: int):
    """A massive activation, 3000 times the others, as models have them."""
    x = np.random.default_rng(rows).standard_normal((rows, INPUTS), np.float32)
    x[:, 17] = 3000
    expected = x.astype(np.float64) @ codes.astype(np.float64).T
    step = np.float64(3000 / LIMIT)
    spread = step / 12**0.5 * np.sqrt((codes.astype(np.float64) ** 2).sum(axis=1))
    assert (np.abs(linear(x) - expected) < 6 * spread + 2.0**-21 * np.abs(expected)).all()
    assert np.abs(linear(x) - expected).max() < 2e-3 * np.abs(x[:, :17].astype(np.float64) @ codes[:, :17].T).max()


def test_rows_are_scaled_alone(linear, codes: Array):
    x = np.random.default_rng(1).standard_normal((9, INPUTS), np.float32)
    scales = 10.0 ** np.arange(-20, 16, 4, dtype=np.float32)[:, None]
    found, expected = linear(x * scales) / scales, linear(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [4, 70])
def test_rows_of_zeros_and_of_no_numbers(linear, rows: int):
    x = np.random.default_rng(2).standard_normal((rows, INPUTS), np.float32)
    expected = linear(x)
    x[0], x[1, 5], x[2, 7] = 0, np.nan, np.inf
    found = linear(x)
    assert (found[0] == 0).all()
    assert not np.isfinite(found[1:3]).any()
    np.testing.assert_array_equal(found[3:], expected[3:])


def test_inputs_whose_sums_could_overflow_are_computed_in_fp32():
    def weights(inputs: int) -> list[str]:
        codes, scales = Fill(DataType.INT8, (64, inputs), 1), Fill(DataType.FLOAT, (64,), 1)
        return [name for name, _ in plan_int8(codes, scales, ISA).weights]

    assert weights(MAX_INPUTS) == ["packed", "scales", "sums"]
    assert weights(MAX_INPUTS + 1) == ["packed", "scales"]


def test_the_largest_sums_do_not_overflow(codes: Array):
    missing = missing_features(ISA.features)
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}")
    shape = (64, MAX_INPUTS)
    plan = plan_int8(Fill(DataType.INT8, shape, 127), Fill(DataType.FLOAT, (64,), 1), ISA)
    kernel = compile_kernel(plan.function(), Cpu("icelake-server", ISA))
    with Evaluator() as evaluator:
        weights = [read(evaluator, expression) for _, expression in plan.weights]
    y = np.zeros((1, 64), np.float32)
    kernel(np.full((1, MAX_INPUTS), 3.0, np.float32), *weights, y)
    np.testing.assert_allclose(y, 3.0 * 127 * MAX_INPUTS, rtol=1e-6)
