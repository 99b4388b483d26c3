import ml_dtypes
import numpy as np
import pytest

from passopt.targets.tvm.compiler.kernels.computed_rows import rows_kernel
from passopt.targets.tvm.compiler.kernels.rms_norm import RmsNorm
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel

WEIGHTS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("k", [1, 6, 72, 180, 517, 4096])
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_equals_the_formula(cpu, k, dtype):
    kernel = compile_kernel(rows_kernel(RmsNorm(k, dtype, 1e-5, cpu.isa)), cpu)
    rng = np.random.default_rng(k)
    weight = rng.uniform(0.5, 2, k).astype(WEIGHTS[dtype])
    for rows in (1, 3, 17, 130):
        x = rng.standard_normal((rows, k), np.float32) * rng.uniform(1e-3, 1e3, (rows, 1)).astype(np.float32)
        x[-1] = 0
        y = np.full_like(x, np.nan)
        kernel(x, weight, y)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight.astype(np.float64)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)
