"""Kernels for a GPU: their numbers, with the grid run thread by thread on the CPU, and the CUDA source of TVM."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.literals import Literal
from passopt.targets.tvm.compiler.gpu_grid import THREADS, bind_threads
from passopt.targets.tvm.compiler.kernels.attention.attention import attention
from passopt.targets.tvm.compiler.kernels.attention.cache import append_cache, append_codes
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import mask_extents
from passopt.targets.tvm.compiler.kernels.attention.turn_rows import turn_rows
from passopt.targets.tvm.compiler.kernels.computed_rows import rows_kernel
from passopt.targets.tvm.compiler.kernels.linear.choose import float_kernel, int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.int8_int8 import int8_int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import codes_layout, quantize_rows
from passopt.targets.tvm.compiler.kernels.rms_norm import RmsNorm
from passopt.targets.tvm.compiler.kernels.rotary import rotary
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel
from passopt.targets.tvm.compiler.kernels.swiglu import Swiglu
from passopt.targets.tvm.machines import GPU_ISA, Cpu, Isa, find_gpu, level

pytest.importorskip("tvm")

HOST = Cpu("x86-64", level("plain"))
STORED = {DataType.FLOAT: np.float32, DataType.FLOAT16: np.float16, DataType.BFLOAT16: ml_dtypes.bfloat16}
Arrays = list[Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at a level, arguments of some calls, and how many kernels of CUDA it is."""

    make: Callable[[Isa], Any]
    calls: tuple[Callable[[Isa], Arrays], ...]
    launches: int = 1


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def codes(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(-127, 128, shape).astype(np.int8)


def literal(array: np.ndarray[Any, Any], dtype: DataType) -> Expression:
    return Literal(dtype, array.shape, array.tobytes())


def values(kernel: LinearKernel) -> Arrays:
    with Evaluator() as evaluator:
        return [
            np.ascontiguousarray(evaluator.read(item, tuple((0, length) for length in item.shape)))
            for _, item in kernel.weights
        ]


def linear_case(kernel: Callable[[Isa], LinearKernel], *, residual: bool = False) -> Case:
    """Of a linear with 37 outputs and 301 inputs: a kernel per number of rows up to a tile, two for more."""

    def arguments(rows: int) -> Callable[[Isa], Arrays]:
        before = [numbers(rows, 37, seed=5)] if residual else []
        return lambda isa: [numbers(rows, 301), *values(kernel(isa)), *before, np.zeros((rows, 37), np.float32)]

    return Case(lambda isa: kernel(isa).function(residual=residual), tuple(arguments(rows) for rows in (1, 3, 17)), 6)


def float_plan(dtype: DataType) -> Callable[[Isa], LinearKernel]:
    return lambda isa: float_kernel(literal(numbers(37, 301, seed=2, dtype=STORED[dtype]), dtype), isa)


def int8_codes() -> Expression:
    return literal(codes(37, 301), DataType.INT8)


def scales() -> Expression:
    return literal(np.abs(numbers(37, seed=3)), DataType.FLOAT)


def w8a8_arguments(rows: int) -> Callable[[Isa], Arrays]:
    def make(isa: Isa) -> Arrays:
        stored = codes_layout(301, isa).store(codes(rows, 301))
        kernel = int8_int8_kernel(int8_codes(), scales(), isa)
        return [stored, np.abs(numbers(rows, seed=4)), *values(kernel), np.zeros((rows, 37), np.float32)]

    return make


def rotary_arguments(_: Isa) -> Arrays:
    return [
        numbers(2, 5, 3, 10),
        numbers(1, 5, 4, seed=1),
        numbers(1, 5, 4, seed=2),
        np.zeros((2, 5, 3, 10), "float32"),
    ]


def append_arguments(dtype: Any) -> Callable[[Isa], Arrays]:
    def make(_: Isa) -> Arrays:
        caches = [np.zeros((2, 3, 2, 10, 16), dtype), np.zeros((2, 3, 32, 10), dtype)]
        return [numbers(2, 5, 3, 10), numbers(2, 5, 3, 10, seed=1), *caches, 13]

    return make


def append_codes_arguments(_: Isa) -> Arrays:
    caches = [np.zeros((2, 3, 2, 10, 16), np.int8), np.zeros((2, 3, 32, 10), np.int8)]
    scales = [np.zeros((2, 3, 32), np.float32) for _ in caches]
    return [numbers(2, 5, 3, 10), numbers(2, 5, 3, 10, seed=1), *caches, *scales, 13]


def turn_arguments(_: Isa) -> Arrays:
    return [numbers(2, 5, 3, 10), numbers(10, 10, seed=1), np.zeros((2, 5, 3, 10), np.float32)]


def causal(rows: int, columns: int) -> np.ndarray[Any, Any]:
    seen = np.arange(columns) <= np.arange(columns - rows, columns)[:, None]
    return np.where(seen, 0, -np.inf).astype(np.float32)[None, None]


def extents_arguments(_: Isa) -> Arrays:
    return [causal(50, 70), np.zeros((1, 2, 2), np.int32)]


def attention_arguments(rows: int) -> Callable[[Isa], Arrays]:
    def make(_: Isa) -> Arrays:
        columns = rows + 7
        caches = [
            numbers(2, 2, 2, 12, 16, seed=1, dtype=np.float16),
            numbers(2, 2, 32, 12, seed=2, dtype=np.float16),
        ]
        bias = [numbers(4, seed=3), np.arange(columns, dtype=np.float32)[None]]
        extents = np.array([[[0, columns]]], np.int32)
        y = np.zeros((2, rows, 4, 12), np.float32)
        return [numbers(2, rows, 4, 12), *caches, causal(rows, columns), extents, *bias, y]

    return make


def codes_attention_arguments(rows: int) -> Callable[[Isa], Arrays]:
    def make(_: Isa) -> Arrays:
        columns = rows + 7
        caches = [codes(2, 2, 2, 12, 16), codes(2, 2, 32, 12)]
        scales = [np.abs(numbers(2, 2, 32, seed=seed)) / 50 for seed in (1, 2)]
        extents = np.array([[[0, columns]]], np.int32)
        y = np.zeros((2, rows, 4, 12), np.float32)
        return [numbers(2, rows, 4, 12), *caches, *scales, causal(rows, columns), extents, y]

    return make


def rms_norm_arguments(_: Isa) -> Arrays:
    return [numbers(70, 11), numbers(11, dtype=np.float16), np.zeros((70, 11), np.float32)]


def swiglu_arguments(_: Isa) -> Arrays:
    return [numbers(3, 11), numbers(3, 11, seed=1), np.zeros((3, 11), np.float32)]


def quantize_arguments(isa: Isa) -> Arrays:
    layout = codes_layout(12, isa)
    return [numbers(9, 12), np.zeros((9, layout.width), layout.dtype), np.zeros(9, np.float32)]


def fp16_attention(isa: Isa) -> Any:
    return attention(4, 2, 12, 0.3, "float16", isa, True, 3.0)


def codes_attention(isa: Isa) -> Any:
    return attention(4, 2, 12, 0.3, "int8", isa, False)


def w8a8_linear(isa: Isa) -> Any:
    return int8_int8_kernel(int8_codes(), scales(), isa).function()


CASES = {
    "rms_norm": Case(lambda isa: rows_kernel(RmsNorm(11, "float16", 1e-5, isa)), (rms_norm_arguments,)),
    "swiglu": Case(lambda isa: rows_kernel(Swiglu(11, isa)), (swiglu_arguments,)),
    "rotary": Case(lambda isa: rotary(3, 10, 8, False, isa), (rotary_arguments,)),
    "rotary_interleaved": Case(lambda isa: rotary(3, 10, 8, True, isa), (rotary_arguments,)),
    "append_cache_fp32": Case(lambda isa: append_cache(3, 10, "float32", isa), (append_arguments(np.float32),)),
    "append_cache_fp16": Case(lambda isa: append_cache(3, 10, "float16", isa), (append_arguments(np.float16),)),
    "append_cache_int8": Case(lambda isa: append_codes(3, 10, isa), (append_codes_arguments,)),
    "turn_rows": Case(lambda isa: turn_rows(3, 10, isa), (turn_arguments,)),
    "mask_extents": Case(mask_extents, (extents_arguments,)),
    "quantize_rows": Case(lambda isa: quantize_rows(12, isa), (quantize_arguments,)),
    # A kernel for a step of one position, one for more.
    "attention": Case(fp16_attention, (attention_arguments(1), attention_arguments(5)), 2),
    "attention_int8": Case(codes_attention, (codes_attention_arguments(1), codes_attention_arguments(5)), 2),
    "linear_fp32": linear_case(float_plan(DataType.FLOAT)),
    "linear_fp32_residual": linear_case(float_plan(DataType.FLOAT), residual=True),
    "linear_fp16": linear_case(float_plan(DataType.FLOAT16)),
    "linear_bf16": linear_case(float_plan(DataType.BFLOAT16)),
    "linear_int8": linear_case(lambda isa: int8_kernel(int8_codes(), scales(), isa)),
    "linear_w8a8": Case(w8a8_linear, (w8a8_arguments(2), w8a8_arguments(9)), 3),
}
#: They differ from `linear_fp16` in how a weight is read, which the source shows; each takes seconds to build.
SOURCE_ONLY = {"linear_fp32", "linear_bf16"}
SLOW = {name for name in CASES if name.startswith(("linear", "attention"))}
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


def thread_by_thread(function: Any) -> Any:
    """The same grid as loops, which a CPU runs."""
    import tvm_ffi
    from tvm import tirx

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.THREAD_BINDING:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, serial), order="post"))


@pytest.mark.parametrize("name", [name for name in PARAMS if name.values[0] not in SOURCE_ONLY])
def test_a_grid_computes_what_the_cpu_does(name):
    case = CASES[name]
    grid = compile_kernel(thread_by_thread(bind_threads(case.make(GPU_ISA), name)), HOST)
    kernel = compile_kernel(case.make(HOST.isa), HOST)
    for arguments in case.calls:
        found, expected, before = arguments(GPU_ISA), arguments(HOST.isa), arguments(HOST.isa)
        grid(*found)
        kernel(*expected)
        written = [index for index, item in enumerate(expected) if not np.array_equal(item, before[index])]
        assert written, "the kernel wrote nothing"
        for index in written:
            one, other = (np.asarray(items[index], np.float64) for items in (found, expected))
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


@pytest.fixture(scope="module")
def source_of() -> Callable[[str], str]:
    """The CUDA source of a case's kernel, for sm_80."""
    import tvm

    def make(name: str) -> str:
        function = bind_threads(CASES[name].make(GPU_ISA), name).with_attr("global_symbol", name)
        built = tvm.compile(tvm.IRModule({name: function}), target=find_gpu("sm_80", HOST).target())
        return str(built.mod.imports[0].inspect_source())

    return make


@pytest.mark.parametrize("name", PARAMS)
def test_cuda_source(source_of, name):
    source = source_of(name)
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", source))
    assert len(kernels) == CASES[name].launches
    assert f"__launch_bounds__({THREADS})" in source
    assert "float4" not in source.split("__global__", 1)[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["rms_norm", "append_cache_fp16"])
def test_nvcc_takes_the_source(source_of, name, tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(source_of(name))
    command = ["nvcc", "-cubin", "-arch=sm_80", "-o", str(tmp_path / "kernel.cubin"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_work_outside_of_the_grid_is_refused():
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        y = T.match_buffer(T.arg("y", T.handle()), (4,), "float32")
        T.buffer_store(y, T.float32(1), [0])
    with pytest.raises(ModelError, match="kernel late: BufferStore outside of the loop over work items"):
        bind_threads(builder.get(), "late")


@pytest.mark.parametrize("arch", ["80", "sm_", "native", "sm_80;x"])
def test_architectures_are_spelled_as_cuda_does(arch):
    with pytest.raises(UsageError, match="sm_80"):
        find_gpu(arch, HOST)
