"""W8A8 linears: the same exact integers on every level, odd shapes and extremes included."""

import dataclasses
import functools

import numpy as np
import pytest

from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.literals import Literal
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import byte_kernel, dot_of_operations
from passopt.targets.tvm.compiler.kernels.linear.int8_int8 import int8_int8_kernel, linear_w8a8
from passopt.targets.tvm.compiler.kernels.quantize_rows import codes_layout
from passopt.targets.tvm.compiler.kernels.standalone import assembly, compile_kernel, member_of
from passopt.targets.tvm.machines import LEVELS, Cpu, Isa, level, missing_features

#: The byte dot product written out in plain operations: layout, zero point and tiles of avx512-vnni on any machine.
WRITTEN_OUT = "avx512-vnni, written out"
SHAPES = ((16, 4), (180, 72), (72, 516), (130, 1030))
ROWS = (1, 2, 3, 5, 7, 17, 130, 193, 400)


BEST, *OTHERS = (*(isa.name for isa in LEVELS), WRITTEN_OUT)


@pytest.fixture(params=[BEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)], scope="module")
def build(request):
    """(weights int8[n, k], scales) → callable (codes, row_scales, [residual]) → y."""
    written_out = request.param == WRITTEN_OUT
    isa = level("avx512-vnni" if written_out else request.param)
    if not written_out and (missing := missing_features(isa.features)):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    cpu = Cpu("x86-64", isa) if written_out else member_of(isa.name)

    @functools.cache
    def compiled(n: int, k: int, residual: bool):
        kernel = int8_int8_kernel(Literal.of(np.zeros((n, k), np.int8)), Literal.of(np.ones(n, np.float32)), isa)
        function = kernel.function(residual=residual)
        if written_out:
            inner = byte_kernel(isa)
            dot = functools.partial(dot_of_operations, lanes=inner.lanes, group=inner.group)
            function = linear_w8a8(n, k, codes_layout(k, isa), dataclasses.replace(inner, dot=dot), residual)
        return compile_kernel(function, cpu)

    def with_weights(weights, scales):
        kernel = int8_int8_kernel(Literal.of(weights), Literal.of(scales), isa)
        with Evaluator() as evaluator:
            packed = [np.array(evaluator.array(expression)) for _, expression in kernel.weights]

        def call(codes, row_scales, *residual):
            y = np.full((len(codes), len(weights)), np.nan, np.float32)
            stored = codes_layout(codes.shape[1], isa).store(codes)
            compiled(*weights.shape, bool(residual))(stored, row_scales, *packed, *residual, y)
            return y

        return call

    return with_weights


def expected(codes, weights, row_scales, scales):
    sums = codes.astype(np.int32) @ weights.astype(np.int32).T
    return sums.astype(np.float32) * row_scales[:, None] * scales


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_numpys_integers(build, n, k):
    rng = np.random.default_rng(n)
    weights = rng.integers(-127, 128, (n, k), np.int8)
    scales = rng.uniform(0.5, 2, n).astype(np.float32)
    linear = build(weights, scales)
    for rows in ROWS:
        codes = rng.integers(-127, 128, (rows, k), np.int8)
        row_scales = rng.uniform(0.5, 2, rows).astype(np.float32)
        np.testing.assert_array_equal(linear(codes, row_scales), expected(codes, weights, row_scales, scales))


@pytest.mark.slow
def test_a_residual_is_added(build):
    rng = np.random.default_rng(8)
    # Outputs that fill no vector, and more inputs than one panel has.
    weights, scales = rng.integers(-127, 128, (130, 2500), np.int8), rng.uniform(0.5, 2, 130).astype(np.float32)
    linear = build(weights, scales)
    for rows in (1, 3, 7, 200):
        codes, row_scales = rng.integers(-127, 128, (rows, 2500), np.int8), np.ones(rows, np.float32)
        residual = rng.standard_normal((rows, 130), np.float32) * np.float32(1e6)
        wanted = residual + expected(codes, weights, row_scales, scales)
        np.testing.assert_allclose(linear(codes, row_scales, residual), wanted, rtol=1e-6, atol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_saturate(build, sign):
    weights = np.full((5, 13696), 127, np.int8)
    weights[1::2] = -127
    linear = build(weights, np.ones(5, np.float32))
    for rows in (1, 9):
        codes = np.full((rows, 13696), sign * 127, np.int8)
        sums = linear(codes, np.ones(rows, np.float32))
        assert abs(sums[0, 0]) == 13696 * 127 * 127
        np.testing.assert_array_equal(sums, expected(codes, weights, np.ones(rows, np.float32), np.float32(1)))


@pytest.mark.slow
def test_fp16_scales_are_used_as_stored(build):
    weights = np.arange(-60, 60, dtype=np.int8).reshape(10, 12)
    scales = np.linspace(0.001, 0.01, 10).astype(np.float16)
    codes, one = np.full((2, 12), 3, np.int8), np.ones(2, np.float32)
    wanted = expected(codes, weights, one, scales.astype(np.float32))
    np.testing.assert_array_equal(build(weights, scales)(codes, one), wanted)


def products(text: str, name: str) -> list[list[str]]:
    """From the first to the last instruction `name` of every run of instructions without a label that has several."""
    runs, run = [], []
    for line in [line.strip() for line in text.splitlines()] + [":"]:
        if line.endswith(":"):
            runs.append(run)
            run = []
        else:
            run.append(line)
    places = [(run, [at for at, line in enumerate(run) if line.startswith(name)]) for run in runs]
    return [run[at[0] : at[-1] + 1] for run, at in places if len(at) > 3]


def spills(lines: list[str]) -> list[str]:
    """Vectors that are stored, or taken from the stack."""
    return [line for line in lines if "mm" in line and ("(%rsp" in line or line.endswith(")"))]


@pytest.mark.parametrize("mcpu", ["icelake-server", "znver5"])
def test_avx512_multiplies_bytes_in_registers(mcpu):
    isa: Isa = level("avx512-vnni")
    kernel = int8_int8_kernel(Literal.of(np.zeros((256, 1024), np.int8)), Literal.of(np.ones(256, np.float32)), isa)
    runs = products(assembly(kernel.function(), Cpu(mcpu, isa)), "vpdpbusd")
    # One to six rows, and tiles of many rows in three sizes.
    assert len(runs) >= 7
    for run in runs:
        assert not spills(run)
        assert all("%zmm" in line for line in run if line.startswith("vpdpbusd"))


def test_avx2_keeps_its_sums_in_registers():
    isa = level("avx2")
    kernel = int8_int8_kernel(Literal.of(np.zeros((256, 1024), np.int8)), Literal.of(np.ones(256, np.float32)), isa)
    runs = products(assembly(kernel.function(), Cpu("znver3", isa)), "vpmaddwd")
    # Runs that multiply codes broadcast from memory; others widen panels, and store them.
    runs = [run for run in runs if "vpbroadcast" in " ".join(run)]
    assert len(runs) >= 5
    for run in runs:
        assert not spills(run)


def test_plain_multiplies_pairs_as_sse2_has_them():
    isa = level("plain")
    kernel = int8_int8_kernel(Literal.of(np.zeros((256, 1024), np.int8)), Literal.of(np.ones(256, np.float32)), isa)
    assert "pmaddwd" in assembly(kernel.function(), Cpu("x86-64", isa))
