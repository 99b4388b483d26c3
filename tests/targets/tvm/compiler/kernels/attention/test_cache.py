import ml_dtypes
import numpy as np
import pytest

from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels.attention.cache import append_cache
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("heads", "head_dim"), [(5, 12), (3, 80), (2, 128)])
def test_writes_the_new_positions_and_no_other(cpu, heads, head_dim, dtype):
    kernel = compile_kernel(append_cache(heads, head_dim, dtype, cpu.isa), cpu)
    rng = np.random.default_rng(heads)
    for batch, past, length in [(1, 0, 1), (2, 15, 1), (3, 16, 3), (2, 1, 17), (1, 15, 130), (1, 0, 48), (2, 200, 33)]:
        blocks = -(-(past + length) // BLOCK) + 1
        k, v = (rng.standard_normal((batch, length, heads, head_dim), np.float32) for _ in "kv")
        keys = rng.standard_normal((batch, heads, blocks, head_dim, BLOCK)).astype(STORED[dtype])
        values = rng.standard_normal((batch, heads, blocks * BLOCK, head_dim)).astype(STORED[dtype])
        expected_keys = keys.transpose(0, 1, 2, 4, 3).reshape(values.shape).copy()
        expected_values = values.copy()
        expected_keys[:, :, past : past + length] = k.astype(STORED[dtype]).transpose(0, 2, 1, 3)
        expected_values[:, :, past : past + length] = v.astype(STORED[dtype]).transpose(0, 2, 1, 3)
        kernel(k, v, keys, values, past)
        np.testing.assert_array_equal(keys.transpose(0, 1, 2, 4, 3).reshape(values.shape), expected_keys)
        np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_to_nearest_even(cpu, dtype):
    kernel = compile_kernel(append_cache(1, 16, dtype, cpu.isa), cpu)
    step = float(ml_dtypes.finfo(STORED[dtype]).eps)
    halves = (1 + step * np.arange(0.0, 8.0, 0.5)).astype(np.float32)
    keys, values = (np.zeros(shape, STORED[dtype]) for shape in [(1, 1, 1, 16, BLOCK), (1, 1, BLOCK, 16)])
    kernel(halves[None, None, None], halves[None, None, None], keys, values, 0)
    np.testing.assert_array_equal(keys[0, 0, 0, :, 0], halves.astype(STORED[dtype]))
    np.testing.assert_array_equal(values[0, 0, 0], halves.astype(STORED[dtype]))
