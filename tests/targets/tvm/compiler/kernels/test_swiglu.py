import numpy as np
import pytest

from passopt.targets.tvm.compiler.kernels.computed_rows import rows_kernel
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel
from passopt.targets.tvm.compiler.kernels.swiglu import Swiglu


def reference(gate, up):
    wide = gate.astype(np.float64)
    return wide / (1 + np.exp(-wide)) * up.astype(np.float64)


@pytest.mark.parametrize("n", [1, 6, 72, 180, 3424])
def test_equals_the_formula(cpu, n):
    kernel = compile_kernel(rows_kernel(Swiglu(n, cpu.isa)), cpu)
    rng = np.random.default_rng(n)
    for rows in (1, 3, 17, 130):
        gate = rng.uniform(-20, 20, (rows, n)).astype(np.float32)
        up = rng.standard_normal((rows, n), np.float32)
        y = np.full_like(gate, np.nan)
        kernel(gate, up, y)
        np.testing.assert_allclose(y, reference(gate, up), rtol=1e-6, atol=0)


def test_far_gates(cpu):
    gate = np.concatenate([np.linspace(-87, 100, 2001), [0.0, -0.0, 1e30, 3e38]]).astype(np.float32)[None]
    up = np.full_like(gate, 0.75)
    y = np.full_like(gate, np.nan)
    kernel = compile_kernel(rows_kernel(Swiglu(gate.shape[1], cpu.isa)), cpu)
    kernel(gate, up, y)
    np.testing.assert_allclose(y, reference(gate, up), rtol=1e-6, atol=0)

    below = np.linspace(-1e3, -87, gate.shape[1]).astype(np.float32)[None]
    kernel(below, up, y)
    assert np.abs(y).max() < 1e-35
