"""Linears of int8 weights and fp32 activations by bytes: where rows are hard to hold in integers, against float64.

A CPU without dot products of bytes runs the same tiles with the product written out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.literals import Fill, Literal
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import byte_kernel, dot_of_operations
from passopt.targets.tvm.compiler.kernels.linear.choose import int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.int8_fp32 import LIMIT, MAX_INPUTS, linear_planes
from passopt.targets.tvm.compiler.kernels.quantize_rows import codes_layout
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel
from passopt.targets.tvm.machines import Cpu, level, missing_features

pytest.importorskip("tvm")

ISA = level("avx512-vnni")
#: Columns that fill no block; inputs of two panels that fill no group.
OUTPUTS, INPUTS = 70, 2101
Array = np.ndarray[Any, Any]


def build(codes: Expression, residual: bool = False) -> Callable[..., Array]:
    """Callable (x [M, K], [residual]) → y [M, N] for codes [N, K] with scales of 1."""
    n, k = codes.shape
    kernel = int8_kernel(codes, Fill(DataType.FLOAT, (n,), 1), ISA)
    function, cpu = kernel.function(residual=residual), Cpu("icelake-server", ISA)
    if missing_features(ISA.features):
        inner = byte_kernel(ISA)
        dot = functools.partial(dot_of_operations, lanes=inner.lanes, group=inner.group)
        kernel = dataclasses.replace(inner, dot=dot)
        function, cpu = linear_planes(n, k, codes_layout(k, ISA), kernel, residual), Cpu("x86-64", ISA)
    run = compile_kernel(function, cpu)
    with Evaluator() as evaluator:
        weights = [np.array(evaluator.array(expression)) for _, expression in kernel.weights]

    def call(x: Array, *residual: Array) -> Array:
        y = np.full((len(x), n), np.nan, np.float32)
        run(x, *weights, *residual, y)
        return y

    return call


@pytest.fixture(scope="module")
def codes() -> Array:
    found = np.random.default_rng(5).integers(-127, 128, (OUTPUTS, INPUTS)).astype(np.int8)
    found[3, 17] = 0
    return found


@pytest.fixture(scope="module")
def linear(codes: Array) -> Callable[..., Array]:
    return build(Literal.of(codes))


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
def test_numbers_are_rounded_to_a_part_of_the_largest_of_their_row(linear, codes: Array, rows: int):
    """A massive activation, 3000 times the others, as models have them; one output does not depend on it."""
    x = np.random.default_rng(rows).standard_normal((rows, INPUTS), np.float32)
    x[:, 17] = 3000
    expected = x.astype(np.float64) @ codes.astype(np.float64).T
    step = np.float64(3000 / LIMIT)
    rounding = step / 12**0.5 * np.sqrt((codes.astype(np.float64) ** 2).sum(axis=1))
    errors = np.abs(linear(x) - expected)
    assert (errors < 6 * rounding + 2.0**-21 * np.abs(expected)).all()
    assert errors[:, 3].max() > rounding[3] / 100, "an output without the massive one shows the rounding"


def test_a_residual_is_added(linear, codes: Array):
    random, with_residual = np.random.default_rng(4), build(Literal.of(codes), residual=True)
    for rows in (1, 2, 9):
        x, residual = random.standard_normal((rows, INPUTS), np.float32), random.standard_normal((rows, OUTPUTS))
        found = with_residual(x, residual.astype(np.float32))
        np.testing.assert_allclose(found, linear(x) + residual, rtol=1e-6, atol=1e-5)


def test_rows_are_scaled_alone(linear, codes: Array):
    x = np.random.default_rng(1).standard_normal((9, INPUTS), np.float32)
    scales = 10.0 ** np.arange(-28, 26, 6, dtype=np.float32)[:, None]
    found, expected = linear(x * scales) / scales, linear(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_rows_below_all_scales_lose_bits_and_no_more(linear, codes: Array):
    """Scales are at least 2^-126, of which every number is a multiple."""
    for magnitude in (1e-31, 1e-33, 3e-38):
        x = (np.random.default_rng(1).standard_normal((3, INPUTS)) * magnitude).astype(np.float32)
        expected = x.astype(np.float64) @ codes.astype(np.float64).T
        step = np.maximum(np.abs(x.astype(np.float64)).max(axis=1, keepdims=True) / LIMIT, 2.0**-126)
        rounding = step / 12**0.5 * np.sqrt((codes.astype(np.float64) ** 2).sum(axis=1))
        assert (np.abs(linear(x) - expected) < 6 * rounding + 2.0**-21 * np.abs(expected)).all()


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
        return [name for name, _ in int8_kernel(codes, scales, ISA).weights]

    assert weights(MAX_INPUTS) == ["packed", "scales", "sums"]
    assert weights(MAX_INPUTS + 1) == ["packed", "scales"]


def test_the_largest_sums_do_not_overflow():
    call = build(Fill(DataType.INT8, (64, MAX_INPUTS), -128))
    for number in (3.0, -3.0):
        found = call(np.full((1, MAX_INPUTS), number, np.float32))
        np.testing.assert_allclose(found, -128 * number * MAX_INPUTS, rtol=1e-6)
