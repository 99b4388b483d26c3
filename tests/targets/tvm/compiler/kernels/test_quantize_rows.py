"""Rows quantised by the kernels: equal to numpy in every bit, for each level that this machine can run."""

import re

import numpy as np
import pytest

from passopt.targets.tvm.compiler.kernels.computed_rows import rows_kernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import codes_layout, quantize_computed, quantize_rows
from passopt.targets.tvm.compiler.kernels.rms_norm import RmsNorm
from passopt.targets.tvm.compiler.kernels.standalone import assembly, compile_kernel, member_of
from passopt.targets.tvm.compiler.kernels.swiglu import Swiglu
from passopt.targets.tvm.machines import LEVELS, Cpu, Isa, level, missing_features


@pytest.fixture(params=[isa.name for isa in LEVELS])
def isa(request):
    found = level(request.param)
    if missing := missing_features(found.features):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    return found


def reference(x):
    with np.errstate(all="ignore"):
        scales = np.abs(x).max(axis=1) / np.float32(127)
        scales[scales == 0] = 1
        return np.clip(np.rint(x / scales[:, None]), -127, 127).astype(np.int8), scales


def quantized(isa, x):
    rows, k = x.shape
    layout = codes_layout(k, isa)
    codes, scales = np.full((rows, layout.width), 7, layout.dtype), np.empty(rows, np.float32)
    compile_kernel(quantize_rows(k, isa), member_of(isa.name))(x, codes, scales)
    return codes, scales


@pytest.mark.parametrize("k", [1, 7, 72, 516, 3424])
def test_codes_and_scales_are_numpys_in_every_bit(isa, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((17, k)) * np.exp(rng.uniform(-30, 30, (17, 1)))).astype(np.float32)
    x[3] = 0
    x[4] = 1e-45  # the scale underflows
    x[5] = np.float32(3e38) * np.sign(x[5])
    codes, scales = quantized(isa, x)
    expected, expected_scales = reference(x)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, codes_layout(k, isa).store(expected))


def test_ties_round_to_even(isa):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.5, 64.5]], np.float32)
    codes, scales = quantized(isa, x)
    assert scales.tolist() == [1]
    whole = np.array([[127, 0, 2, 2, 0, -2, -2, 126, -126, 4, 64]], np.int8)
    np.testing.assert_array_equal(codes, codes_layout(x.shape[1], isa).store(whole))


@pytest.mark.parametrize("column", [0, 2, 35, 36])
def test_a_row_with_nan_or_infinity_says_so_by_its_scale(isa, column):
    x = np.ones((3, 37), np.float32)
    x[0, column], x[2, column] = np.nan, -np.inf
    _, scales = quantized(isa, x)
    assert np.isnan(scales[0])
    assert np.isfinite(scales[1])
    assert np.isinf(scales[2])


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 72, 517])
@pytest.mark.parametrize("kind", ["norm", "swiglu"])
def test_rows_that_never_go_to_memory_have_the_codes_of_those_that_do(isa, kind, k):
    computed = RmsNorm(k, "float32", 1e-5, isa) if kind == "norm" else Swiglu(k, isa)
    cpu, layout, rng = member_of(isa.name), codes_layout(k, isa), np.random.default_rng(k)
    directly = compile_kernel(quantize_computed(computed, isa), cpu)
    for rows in (1, 5, 200):
        x = rng.standard_normal((rows, k), np.float32)
        arguments = [x, rng.standard_normal(k if kind == "norm" else (rows, k), np.float32)]
        y = np.full((rows, k), np.nan, np.float32)
        compile_kernel(rows_kernel(computed), cpu)(*arguments, y)
        codes, scales = np.full((rows, layout.width), 7, layout.dtype), np.empty(rows, np.float32)
        directly(*arguments, codes, scales)
        expected, expected_scales = quantized(isa, y)
        np.testing.assert_array_equal(scales, expected_scales)
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: isa.name)
def test_rows_do_not_lie_a_multiple_of_a_kilobyte_apart(isa: Isa):
    for k in (4096, 4095, 512, 13696, 5120):
        layout = codes_layout(k, isa)
        stride = layout.width * np.dtype(layout.dtype).itemsize
        assert layout.width >= k
        assert stride % 64 == 0
        assert stride % 1024


def test_the_loop_for_avx512_is_vectorised():
    isa = level("avx512-vnni")
    text = assembly(quantize_rows(4096, isa), Cpu("icelake-server", isa))
    assert "vdivps\t" in text
    assert "%zmm" in text
    called = re.findall(r"\bcall\w*\s+(\S+)", text)
    assert not [name for name in called if re.search("round|rint|floor", name)], called
