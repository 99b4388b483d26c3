"""Linears against float64 products in numpy, at every level of instructions that this machine has."""

import functools
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.literals import Fill, Literal
from passopt.targets.tvm.compiler.kernels.linear.choose import float_kernel, int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.linear.panel_layout import Panels
from passopt.targets.tvm.compiler.kernels.standalone import assembly, compile_kernel, member_of
from passopt.targets.tvm.machines import LEVELS, Cpu, level

pytest.importorskip("tvm")

ROWS = (1, 2, 3, 6, 7, 17, 128)
STORED = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def values(expression: Expression) -> np.ndarray[Any, Any]:
    with Evaluator() as evaluator:
        return np.ascontiguousarray(evaluator.read(expression, tuple((0, length) for length in expression.shape)))


def run(kernel: LinearKernel, cpu: Cpu, outputs: int) -> Callable[..., np.ndarray[Any, Any]]:
    """Callable (x, [residual]) → y."""
    kernels = {added: compile_kernel(kernel.function(residual=added), cpu) for added in (False, True)}
    weights = [values(expression) for _, expression in kernel.weights]

    def call(x: np.ndarray[Any, Any], *residual: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        y = np.full((len(x), outputs), np.nan, np.float32)
        kernels[bool(residual)](x, *weights, *residual, y)
        return y

    return call


def check(kernel: LinearKernel, cpu: Cpu, weight: np.ndarray[Any, Any]) -> None:
    call, random = run(kernel, cpu, len(weight)), np.random.default_rng(7)
    for rows in ROWS:
        x = random.standard_normal((rows, weight.shape[1]), np.float32)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(call(x), expected, rtol=0, atol=bound)
        residual = random.standard_normal(expected.shape, np.float32)
        np.testing.assert_allclose(call(x, residual), expected + residual, rtol=1e-6, atol=bound)


SHAPES = [(192, 128), (180, 72), (3424, 192), (5, 1), (1, 5)]
#: The last ones exercise several chunks of inputs, the last of which is shorter: of 256 for AVX2, of 1024 for AVX512.
CASES = [(shape, "float32") for shape in SHAPES] + [((72, 517), dtype) for dtype in STORED] + [((40, 800), "float16")]
CASES += [((72, 2500), dtype) for dtype in STORED]
#: Groups of several panels, some of more than others, and several chunks.
CASES += [((600, 1100), dtype) for dtype in ("float32", "float16")]
FAST = {((180, 72), "float32"), ((72, 517), "float16")}
PARAMS = [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]


@pytest.mark.parametrize(("shape", "dtype"), PARAMS, ids=str)
def test_float_weights(shape, dtype, cpu):
    weight = np.random.default_rng(1).standard_normal(shape).astype(STORED[dtype])
    check(float_kernel(Literal.of(weight), cpu.isa), cpu, weight)


@pytest.mark.parametrize(("shape", "dtype"), PARAMS, ids=str)
def test_int8_weights(shape, dtype, cpu):
    random = np.random.default_rng(2)
    codes = random.integers(-127, 128, shape).astype(np.int8)
    scales = random.uniform(0.001, 0.02, shape[0]).astype(STORED[dtype])
    kernel = int8_kernel(Literal.of(codes), Literal.of(scales), cpu.isa)
    check(kernel, cpu, codes * scales.astype(np.float64)[:, None])


@pytest.mark.slow
def test_every_finite_half_is_read_exactly(cpu):
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = bits[np.isfinite(bits)]
    call = run(float_kernel(Literal.of(finite[:, None]), cpu.isa), cpu, len(finite))
    for rows in (1, 7):
        np.testing.assert_array_equal(
            call(np.ones((rows, 1), np.float32)), np.tile(finite.astype(np.float32), (rows, 1))
        )


def test_more_rows_than_one_span_has(cpu):
    kernel = float_kernel(Literal.of(np.eye(70, 40, dtype=np.float32)), cpu.isa)
    x = np.random.default_rng(3).standard_normal((1601, 40), np.float32)
    np.testing.assert_allclose(run(kernel, cpu, 70)(x), np.pad(x, ((0, 0), (0, 30))), rtol=1e-6)


@pytest.mark.parametrize("name", [isa.name for isa in LEVELS])
@pytest.mark.parametrize("threads", [1, 2, 4, 8])
@pytest.mark.parametrize("outputs", [1280, 2752, 3424, 4096, 11_008, 13_696])
def test_no_thread_gets_a_panel_more_than_its_share(outputs, threads, name):
    panels = Panels.of(outputs, 512, "float32", level(name))
    groups = panels.groups
    bounds = [panels.first_of(index, groups) for index in range(groups + 1)]
    per_thread = -(-groups // threads)  # as the thread pool deals them out
    shares = [bounds[min(at + per_thread, groups)] - bounds[at] for at in range(0, groups, per_thread)]
    assert sum(shares) == panels.count
    assert max(shares) == -(-panels.count // threads)


@functools.cache
def listing(kind: str, name: str) -> str:
    shape = (512, 512)
    codes, scales = Fill(DataType.INT8, shape, 1), Fill(DataType.FLOAT, shape[:1], 1)
    isa = level(name)
    kernel = int8_kernel(codes, scales, isa) if kind == "int8" else float_kernel(Fill(DataType[kind], shape, 1), isa)
    return assembly(kernel.function(), member_of(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "instruction"),
    [
        ("FLOAT", "avx512-vnni", r"vfmadd231ps\t.*zmm"),
        ("FLOAT16", "avx512-vnni", r"vcvtph2ps\t.*zmm"),
        ("BFLOAT16", "avx512-vnni", r"vpmovzxwd\t.*zmm"),
        ("int8", "avx512-vnni", r"vpdpbusd\t.*zmm"),
        ("FLOAT", "avx2", r"vfmadd231ps\t.*ymm"),
        ("FLOAT16", "avx2", r"vcvtph2ps\t.*ymm"),
        ("BFLOAT16", "avx2", r"vpmovzxwd\t.*ymm"),
        ("int8", "avx2", r"vpmovsxbd\t.*ymm"),
        ("FLOAT", "plain", r"mulps\t.*xmm"),
    ],
)
def test_instructions(kind, name, instruction):
    assert re.search(instruction, listing(kind, name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "int8"])
def test_plain_code_calls_no_conversion_of_a_compiler_library(kind):
    assert not re.search(r"call\w*\s+__(extend|gnu)", listing(kind, "plain"))


def test_equal_names_mean_equal_functions():
    import tvm

    isa = level("avx2")
    weights = [np.random.default_rng(seed).standard_normal((24, 40), np.float32) for seed in (1, 2)]
    plans = [float_kernel(Literal.of(weight), isa) for weight in weights]
    assert plans[0].name == plans[1].name == "linear_float32_24_40"
    tvm.ir.assert_structural_equal(plans[0].function(), plans[1].function())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Fill(DataType.DOUBLE, (8, 8), 1), "weight of a linear in DOUBLE"),
        (Fill(DataType.FLOAT, (8,), 1), r"takes a matrix \[outputs, inputs\], not FLOAT\[8\]"),
        (Fill(DataType.FLOAT, (8, 0), 1), r"not FLOAT\[8, 0\]"),
    ],
)
def test_refused_float_weights(weight, message):
    with pytest.raises(ModelError, match=message):
        float_kernel(weight, level("plain"))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (Fill(DataType.UINT8, (8, 4), 1), Fill(DataType.FLOAT, (8,), 1), "codes of a linear are int8, not UINT8"),
        (Fill(DataType.INT8, (8, 4), 1), Fill(DataType.FLOAT, (4,), 1), r"take scales \[8\], one per row, not \[4\]"),
        (Fill(DataType.INT8, (8, 4), 1), Fill(DataType.INT8, (8,), 1), "scales of a linear in INT8"),
    ],
)
def test_refused_codes(codes, scales, message):
    with pytest.raises(ModelError, match=message):
        int8_kernel(codes, scales, level("plain"))
