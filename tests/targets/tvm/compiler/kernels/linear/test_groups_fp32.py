"""Linears with weights of 4 bits in groups: against float64 over odd shapes, at every level that has a kernel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Literal
from passopt.targets.tvm.compiler.kernels.linear.groups_fp32 import LIMIT, groups_kernel
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel
from passopt.targets.tvm.machines import GPU_ISA, Cpu, level

pytest.importorskip("tvm")

Array = np.ndarray[Any, Any]


class Weight:
    """Codes of 4 bits with scales, and zero points if they are not symmetric."""

    def __init__(self, n: int, k: int, group: int, *, symmetric: bool, scales: Any = np.float32) -> None:
        random = np.random.default_rng(n + k + group)
        least = -7 if symmetric else 0
        self.codes = random.integers(least, 8 if symmetric else 16, (n, k)).astype(np.int8)
        self.scales = random.uniform(0.5, 1.5, (n, k // group)).astype(scales)
        self.zeros = None if symmetric else random.integers(0, 16, (n, k // group)).astype(np.int8)
        self.group = group

    @property
    def kind(self) -> DataType:
        return DataType.INT4 if self.zeros is None else DataType.UINT4

    def numbers(self) -> Array:
        zeros = 0 if self.zeros is None else np.repeat(self.zeros, self.group, 1).astype(np.float64)
        return (self.codes - zeros) * np.repeat(self.scales.astype(np.float64), self.group, 1)

    def kernel(self, isa: Any) -> Any:
        zeros = None if self.zeros is None else Literal.of(self.zeros).cast(self.kind)
        return groups_kernel(Literal.of(self.codes).cast(self.kind), Literal.of(self.scales), zeros, isa)


def build(weight: Weight, cpu: Cpu, residual: bool = False) -> Callable[..., Array]:
    if cpu.isa.name == "plain":
        pytest.skip("there is no kernel for this level")
    kernel = weight.kernel(cpu.isa)
    run = compile_kernel(kernel.function(residual=residual), cpu)
    with Evaluator() as evaluator:
        weights = [np.array(evaluator.array(expression)) for _, expression in kernel.weights]

    def call(x: Array, *residual: Array) -> Array:
        y = np.full((len(x), len(weight.codes)), np.nan, np.float32)
        run(x, *weights, *residual, y)
        return y

    return call


@pytest.mark.parametrize(
    ("n", "k", "group", "symmetric", "scales"),
    [
        (70, 192, 64, True, np.float32),
        (33, 1280, 128, False, np.float16),
    ],
)
def test_products_are_those_of_the_dequantised_weight(cpu, n, k, group, symmetric, scales):
    weight = Weight(n, k, group, symmetric=symmetric, scales=scales)
    linear = build(weight, cpu)
    numbers = weight.numbers()
    for rows in (1, 2, 9, 23, 37):
        x = np.random.default_rng(rows).standard_normal((rows, k), np.float32)
        expected = x.astype(np.float64) @ numbers.T
        np.testing.assert_allclose(linear(x), expected, rtol=0, atol=3e-6 * np.abs(expected).max(), err_msg=str(rows))


def test_integers_of_three_digits_are_exact(cpu):
    """Both limits and all digits between: nothing is rounded but the sums, which fp32 holds to 2^-24."""
    weight = Weight(20, 128, 32, symmetric=False)
    weight.scales[:] = 1
    linear = build(weight, cpu)
    x = np.random.default_rng(2).integers(-LIMIT, LIMIT + 1, (3, 128))
    x[:, 0], x[:, 1] = LIMIT, -LIMIT
    numbers = weight.numbers()
    bound = 2.0**-22 * (np.abs(x @ numbers.T) + 65_536 * np.abs(numbers).sum(axis=1))
    assert (np.abs(linear(x.astype(np.float32)) - x @ numbers.T) < bound).all()
    single = np.zeros((4, 128), np.float32)
    single[:, 0] = LIMIT
    single[range(4), range(1, 5)] = (1, -128, 32_768, -65_793)
    np.testing.assert_allclose(linear(single), single.astype(np.float64) @ numbers.T, rtol=2.0**-22, atol=0)


def test_the_largest_sums_overflow_nowhere(cpu):
    """Codes of 15 and digits of -128, of which AVX2 adds as many as int16 holds."""
    weight = Weight(16, 128, 128, symmetric=False)
    weight.codes[:], weight.zeros[:], weight.scales[:] = 15, 0, 1
    x = np.full((2, 128), -128 * 257, np.float32)
    x[:, 0] = LIMIT
    np.testing.assert_allclose(build(weight, cpu)(x), 15 * x.astype(np.float64).sum(1, keepdims=True) + np.zeros(16))


def test_a_residual_is_added(cpu):
    weight, random = Weight(21, 64, 32, symmetric=True), np.random.default_rng(4)
    with_residual = build(weight, cpu, residual=True)
    for rows in (1, 25):
        x, residual = random.standard_normal((rows, 64), np.float32), random.standard_normal((rows, 21), np.float32)
        expected = x.astype(np.float64) @ weight.numbers().T + residual
        np.testing.assert_allclose(with_residual(x, residual), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_rows_without_numbers_and_rows_of_zeros(cpu):
    linear = build(Weight(8, 64, 64, symmetric=True), cpu)
    x = np.zeros((3, 64), np.float32)
    x[1, 7] = np.nan
    found = linear(x)
    assert not found[[0, 2]].any()
    assert np.isnan(found[1]).all()


def test_what_has_no_kernel_is_refused_by_name():
    weight = Weight(8, 64, 32, symmetric=True)
    for isa in (level("plain"), GPU_ISA):
        with pytest.raises(ModelError, match=f"avx512-vnni and avx2, not for {isa.name}: quantise to int8 there"):
            weight.kernel(isa)
    with pytest.raises(ModelError, match="groups of a multiple of 32 inputs, not 16"):
        Weight(8, 64, 16, symmetric=True).kernel(level("avx2"))
