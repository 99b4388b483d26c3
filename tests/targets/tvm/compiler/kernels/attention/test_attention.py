"""Attention against float64 in numpy, and against onnxruntime's Attention and the body of passopt::AlibiAttention."""

from __future__ import annotations

import functools
import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.graph.functions import ALIBI_ATTENTION, DOMAIN, local_function
from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels.attention.attention import attention
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK, mask_extents
from passopt.targets.tvm.compiler.kernels.standalone import assembly, compile_kernel
from passopt.targets.tvm.machines import Cpu, level

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOWEST = float(np.finfo(np.float32).min)

#: (query heads, kv heads, head size)
SIZES = [(6, 2, 12), (5, 1, 16), (3, 3, 64), (6, 6, 80), (2, 1, 128)]
#: (sequences, new positions, positions in the cache before)
LENGTHS = [(1, 1, 0), (2, 1, 15), (3, 1, 16), (1, 1, 17), (2, 1, 200)]
LENGTHS += [(1, 3, 0), (2, 3, 1), (1, 17, 16), (3, 17, 200), (2, 130, 0), (1, 130, 15), (1, 130, 17)]


class Kernel:
    """A compiled attention with the extents of its mask."""

    def __init__(self, cpu, heads, kv_heads, head_dim, scale=0.2, dtype="float32", alibi=False, softcap=0.0):
        self.heads, self.kv_heads, self.head_dim, self.scale = heads, kv_heads, head_dim, scale
        self.dtype, self.softcap = STORED[dtype], softcap
        self.kernel = attention_kernel(cpu, heads, kv_heads, head_dim, scale, dtype, alibi, softcap)
        self.extents = extents_kernel(cpu)

    def inputs(self, batch, length, past, seed=0):
        """q, k and v as [b, s or t, h, d]; keys and values as a cache holds them."""
        rng = np.random.default_rng(seed)
        query = rng.standard_normal((batch, length, self.heads, self.head_dim), np.float32)
        shape = (batch, length + past, self.kv_heads, self.head_dim)
        return query, *(rng.standard_normal(shape, np.float32).astype(self.dtype) for _ in "kv")

    def __call__(self, query, key, value, mask, *alibi):
        batch, columns = key.shape[:2]
        blocks = -(-columns // BLOCK) + 1
        # What lies behind the last position is never looked at.
        cache = np.full((2, batch, self.kv_heads, blocks * BLOCK, self.head_dim), np.nan, self.dtype)
        cache[0, :, :, :columns], cache[1, :, :, :columns] = key.swapaxes(1, 2), value.swapaxes(1, 2)
        keys = cache[0].reshape(batch, self.kv_heads, blocks, BLOCK, self.head_dim).swapaxes(3, 4)
        extents = np.full((len(mask), -(-query.shape[1] // QUERY_BLOCK), 2), -1, np.int32)
        self.extents(mask[:, :1], extents)
        y = np.full_like(query, np.nan)
        self.kernel(query, np.ascontiguousarray(keys), cache[1], mask, extents, *alibi, y)
        return y

    def reference(self, query, key, value, bias):
        group = self.heads // self.kv_heads
        wide_key, wide_value = (np.repeat(part.astype(np.float64), group, axis=2) for part in (key, value))
        scores = np.einsum("bshd,bthd->bhst", query.astype(np.float64), wide_key) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        scores = scores + bias
        largest = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
        total = weights.sum(axis=-1, keepdims=True)
        return np.einsum("bhst,bthd->bshd", weights / np.where(total > 0, total, 1), wide_value)


@functools.cache
def attention_kernel(cpu, heads, kv_heads, head_dim, scale, dtype, alibi, softcap):
    function = attention(heads, kv_heads, head_dim, scale, dtype, cpu.isa, alibi, softcap)
    return compile_kernel(function, cpu)


@functools.cache
def extents_kernel(cpu):
    return compile_kernel(mask_extents(cpu.isa), cpu)


def causal(padding, length, past, hidden=LOWEST):
    """[b, 1, s, t]; sequence i has `padding[i]` columns of padding on the left, whose own rows see nothing."""
    column, row = np.arange(past + length), np.arange(length)[:, None] + past
    masked = np.stack([(column > row) | (column < pad) for pad in padding])
    return np.where(masked, np.float32(hidden), np.float32(0))[:, None]


def check(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [SIZES[0], *(pytest.param(it, marks=pytest.mark.slow) for it in SIZES[1:])], ids=str)
def test_equals_softmax(cpu, sizes):
    kernel = Kernel(cpu, *sizes)
    for batch, length, past in LENGTHS:
        inputs = kernel.inputs(batch, length, past)
        for mask in [causal([0], length, past), causal([0, past // 2, past][:batch], length, past)]:
            check(kernel(*inputs, mask), kernel.reference(*inputs, mask.astype(np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [(6, 2, 12), (2, 2, 80)], ids=str)
def test_narrow_caches_are_read_exactly(cpu, sizes, dtype):
    kernel = Kernel(cpu, *sizes, dtype=dtype)
    for batch, length, past in LENGTHS:
        inputs = kernel.inputs(batch, length, past)
        mask = causal([0], length, past)
        check(kernel(*inputs, mask), kernel.reference(*inputs, mask.astype(np.float64)))


@pytest.mark.parametrize("hidden", [LOWEST, -65504.0, -np.inf])
@pytest.mark.parametrize(("length", "past"), [(1, 20), (3, 20), (130, 0), (49, 100)])
def test_rows_that_see_nothing(kernel_6_2_16, hidden, length, past):
    kernel, total = kernel_6_2_16, length + past
    inputs = kernel.inputs(3, length, past)
    mask = causal([0, total // 2, total], length, past, hidden)
    y, expected = kernel(*inputs, mask), kernel.reference(*inputs, mask.astype(np.float64))
    blind = (mask[:, 0] <= hidden).all(axis=2)
    assert blind.any()
    check(y[~blind], expected[~blind])
    if hidden == -65504:  # where fp32's steps are 0.004 wide, and so are the scores'
        check(y[blind], expected[blind], 1e-2)
    else:
        check(y[blind], expected[blind])
    mean = 0 if hidden == -np.inf else inputs[2].astype(np.float64).mean(axis=1)[2].repeat(3, axis=0)
    if hidden != -65504:
        np.testing.assert_allclose(y[2], np.broadcast_to(mean, y[2].shape), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def kernel_6_2_16(cpu):
    return Kernel(cpu, 6, 2, 16)


def test_a_mask_of_any_numbers(kernel_6_2_16):
    for length, past in [(1, 40), (50, 3)]:
        inputs = kernel_6_2_16.inputs(2, length, past)
        mask = np.random.default_rng(1).uniform(-3, 3, (2, 1, length, length + past)).astype(np.float32)
        check(kernel_6_2_16(*inputs, mask), kernel_6_2_16.reference(*inputs, mask.astype(np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [LOWEST, -np.inf])
@pytest.mark.parametrize("sizes", [(5, 1, 64), (6, 2, 12), (4, 4, 16), (14, 1, 80)], ids=str)
def test_parts_of_a_long_past_are_joined(cpu, sizes, hidden):
    """Few kv heads: positions are cut into up to 8 parts, some of which see nothing, or the largest score by far."""
    kernel = Kernel(cpu, *sizes, dtype="float16")
    for batch, past, padding in [
        (1, 511, [0]),
        (1, 2300, [0]),
        (1, 2304, [2000]),
        (2, 1100, [1101, 600]),
        (9, 600, [0]),
    ]:
        query, key, value = kernel.inputs(batch, 1, past)
        key[:, past // 3] *= 20
        mask = causal(padding, 1, past, hidden)
        if past == 2300:
            mask[..., 256:1024] = hidden  # whole parts that see nothing, between others that do
        expected = kernel.reference(query, key, value, mask.astype(np.float64))
        check(kernel(query, key, value, mask), expected, 2e-5)


@pytest.mark.slow
def test_parts_with_alibi_are_joined(cpu):
    kernel = Kernel(cpu, 5, 1, 16, alibi=True)
    slopes = alibi_slopes(5)
    inputs = kernel.inputs(1, 1, 1500)
    positions = np.arange(1501, dtype=np.float32)[None]
    mask = causal([7], 1, 1500)
    bias = slopes.astype(np.float64)[:, None, None] * positions[:, None, None] + mask
    check(kernel(*inputs, mask, slopes, positions), kernel.reference(*inputs, np.maximum(bias, -1.7014117e38)), 2e-5)


def test_large_scores(kernel_6_2_16):
    """The largest score grows from tile to tile, by more than what fp32's exp can express."""
    for length, past in [(1, 300), (130, 170)]:
        query, key, value = kernel_6_2_16.inputs(1, length, past)
        key = key * np.linspace(0, 100, key.shape[1], dtype=np.float32)[None, :, None, None]
        mask = causal([0], length, past)
        expected = kernel_6_2_16.reference(query, key, value, mask.astype(np.float64))
        check(kernel_6_2_16(query, key, value, mask), expected, 2e-4)  # scores of 1000 are 6e-5 apart


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(6, 6, 16), (5, 1, 12)], ids=str)
def test_softcap(cpu, sizes):
    kernel = Kernel(cpu, *sizes, scale=2.0, softcap=7.0)
    for batch, length, past in [(2, 1, 17), (1, 130, 15)]:
        inputs = kernel.inputs(batch, length, past)
        mask = causal([0], length, past)
        check(kernel(*inputs, mask), kernel.reference(*inputs, mask.astype(np.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [LOWEST, -np.inf])
@pytest.mark.parametrize("sizes", [(6, 6, 12), (5, 1, 64)], ids=str)
def test_alibi(cpu, sizes, hidden):
    kernel = Kernel(cpu, *sizes, alibi=True)
    slopes = alibi_slopes(sizes[0])
    for batch, length, past, newest in [(1, 1, 0, 0), (2, 1, 200, 4095), (3, 17, 16, 32), (2, 130, 15, 4095)]:
        inputs, total = kernel.inputs(batch, length, past), length + past
        positions = np.arange(newest + 1 - total, newest + 1, dtype=np.float32)[None]
        if batch == 3:
            positions = positions - np.arange(3, dtype=np.float32)[:, None]
        mask = causal([0, total // 2, total][:batch], length, past, hidden)
        bias = slopes.astype(np.float64)[:, None, None] * positions[:, None, None] + mask
        expected = kernel.reference(*inputs, np.maximum(bias, -1.7014117e38))
        check(kernel(*inputs, mask, slopes, positions), expected)


def session(nodes, inputs, outputs, functions=()):
    """An onnxruntime session of fp32 values of any shape."""
    values = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
        for names in (inputs, outputs)
    ]
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph(nodes, "attention", *values)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def heads_first(*parts):
    return [np.ascontiguousarray(part.swapaxes(1, 2)) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_equals_onnxruntime(cpu, softcap):
    kernel = Kernel(cpu, 6, 2, 16, softcap=softcap)
    names = ["q", "k", "v", "mask"]
    node = onnx.helper.make_node("Attention", names, ["y"], scale=kernel.scale, softcap=softcap)
    run = session([node], names, ["y"])
    for batch, length, past in [(2, 1, 17), (1, 60, 5), (2, 3, 1)]:
        inputs, total = kernel.inputs(batch, length, past), length + past
        for hidden in [LOWEST, -np.inf, LOWEST / 2]:
            mask = causal([0, total][:batch], length, past, hidden)
            feeds: dict[str, Any] = dict(zip(names, [*heads_first(*inputs), mask], strict=True))
            (expected,) = run.run(None, feeds)
            y = kernel(*inputs, mask)
            if hidden == LOWEST:  # onnxruntime takes fp32's lowest number for -inf
                y[(mask[:, 0] == LOWEST).all(axis=2)] = 0
            check(y, expected.swapaxes(1, 2))


@pytest.mark.slow
def test_equals_the_body_of_alibi_attention(cpu):
    kernel = Kernel(cpu, 6, 2, 16, alibi=True)
    function = local_function(ALIBI_ATTENTION, 23)
    assert function is not None
    names = ["q", "k", "v", "slopes", "positions", "mask", "past_key", "past_value"]
    outputs = ["y", "present_key", "present_value"]
    node = onnx.helper.make_node(ALIBI_ATTENTION, names, outputs, domain=DOMAIN, scale=kernel.scale)
    run = session([node], names, outputs, [onnx_ir.serde.serialize_function(function)])
    slopes = alibi_slopes(6)
    for batch, length, past in [(2, 1, 17), (1, 60, 5), (2, 3, 0)]:
        (query, key, value), total = kernel.inputs(batch, length, past), length + past
        positions = np.arange(total, dtype=np.float32)[None]
        for hidden in [LOWEST, -np.inf, -65504.0]:
            mask = causal([0, total][:batch], length, past, hidden)
            q, k, v = heads_first(query, key, value)
            new, old = [k[:, :, past:], v[:, :, past:]], [k[:, :, :past], v[:, :, :past]]
            feeds = dict(zip(names, [q, *new, slopes[:, None, None], positions, mask, *old], strict=True))
            expected = run.run(None, feeds)[0].swapaxes(1, 2)
            check(kernel(query, key, value, mask, slopes, positions), expected, 1e-2 if hidden == -65504 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mcpu", "register"), [("avx512-vnni", "icelake-server", "zmm"), ("avx2", "x86-64-v3", "ymm")]
)
def test_instructions(name, mcpu, register):
    """Checked on any machine: sums in registers of full width, halves widened by the CPU's own instruction."""
    pytest.importorskip("tvm")
    text = assembly(attention(4, 2, 64, 0.125, "float16", level(name), False), Cpu(mcpu, level(name)))
    assert re.search(rf"vfmadd231ps\t.*%{register}", text)
    assert re.search(rf"vcvtph2ps\t.*%{register}", text)
    assert "prefetcht0" in text


def test_heads_that_do_not_divide():
    pytest.importorskip("tvm")
    with pytest.raises(ModelError, match="attention of 5 query heads over 2 kv heads"):
        attention(5, 2, 16, 1.0, "float32", level("plain"), False)
