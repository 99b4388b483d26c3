"""A cache of codes: what is appended is the formula, and attention reads it as codes times scales."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.alibi import alibi_slopes
from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels.attention.attention import attention
from passopt.targets.tvm.compiler.kernels.attention.cache import append_codes
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK, mask_extents
from passopt.targets.tvm.compiler.kernels.attention.turn_rows import turn_rows
from passopt.targets.tvm.compiler.kernels.standalone import assembly, compile_kernel
from passopt.targets.tvm.machines import Cpu, level

LOWEST = float(np.finfo(np.float32).min)
#: (sequences, new positions, positions in the cache before)
LENGTHS = [(1, 1, 0), (2, 1, 15), (1, 1, 700), (2, 1, 200), (2, 3, 1), (3, 17, 200), (1, 130, 0), (1, 130, 17)]


def quantised(rows):
    """Codes and scales of rows [.., d] by the formula, in fp32 as the kernel computes."""
    scales = np.abs(rows).max(axis=-1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.rint(rows / scales[..., None]).astype(np.int8), scales


def as_keys(rows):
    """Keys [b, h, 16·B, d] as they lie: [b, h, B, d, 16]."""
    batch, heads, columns, width = rows.shape
    return np.ascontiguousarray(rows.reshape(batch, heads, columns // BLOCK, BLOCK, width).swapaxes(3, 4))


@pytest.mark.parametrize(("heads", "head_dim"), [(5, 12), (3, 80), (2, 128)])
def test_new_rows_are_stored_by_the_formula_and_nothing_else_changes(cpu, heads, head_dim):
    kernel = compile_kernel(append_codes(heads, head_dim, cpu.isa), cpu)
    rng = np.random.default_rng(heads)
    for batch, past, length in [(1, 0, 1), (2, 15, 1), (3, 16, 3), (2, 1, 17), (1, 15, 130)]:
        columns = (-(-(past + length) // BLOCK) + 1) * BLOCK
        k, v = (rng.standard_normal((batch, length, heads, head_dim), np.float32) for _ in "kv")
        k[:, -1, 0] = 0  # a row of zeros has scale 1
        v[:, -1] *= 1e4
        k[0, 0, 0, :3] = 127, 2.5, -3.5  # scale 1: halves go to the even neighbour
        k[0, 0, 0, 3:] = 0
        codes = rng.integers(-127, 128, (2, batch, heads, columns, head_dim), np.int8)
        scales = rng.uniform(1, 2, (2, batch, heads, columns)).astype(np.float32)
        expected, wanted = codes.copy(), scales.copy()
        for index, rows in enumerate((k, v)):
            new, found = quantised(rows.swapaxes(1, 2))
            expected[index, :, :, past : past + length] = new
            wanted[index, :, :, past : past + length] = found
        keys = as_keys(codes[0])
        kernel(k, v, keys, codes[1], scales[0], scales[1], past)
        np.testing.assert_array_equal(keys, as_keys(expected[0]))
        np.testing.assert_array_equal(codes[1], expected[1])
        np.testing.assert_array_equal(scales, wanted)


@pytest.mark.parametrize(
    ("sizes", "alibi", "softcap"),
    [
        ((6, 2, 12), False, 0.0),
        pytest.param((5, 1, 64), True, 0.0, marks=pytest.mark.slow),
        pytest.param((3, 3, 80), False, 7.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention_reads_codes_times_scales(cpu, sizes, alibi, softcap):
    heads, kv_heads, head_dim = sizes
    kernel = compile_kernel(attention(*sizes, 0.2, "int8", cpu.isa, alibi, softcap), cpu)
    extents_kernel = compile_kernel(mask_extents(cpu.isa), cpu)
    rng = np.random.default_rng(3)
    slopes = alibi_slopes(heads)
    for batch, length, past in LENGTHS:
        total = past + length
        columns = (-(-total // BLOCK) + 1) * BLOCK
        codes = rng.integers(-127, 128, (2, batch, kv_heads, columns, head_dim), np.int8)
        scales = rng.uniform(1e-3, 2e-2, (2, batch, kv_heads, columns)).astype(np.float32)
        scales[..., total:] = np.nan  # what lies behind the last position is never looked at
        query = rng.standard_normal((batch, length, heads, head_dim), np.float32)
        column, row = np.arange(total), np.arange(length)[:, None] + past
        hidden = np.stack([(column > row) | (column < pad) for pad in (0, past // 2, past)[:batch]])
        mask = np.where(hidden, np.float32(LOWEST), np.float32(0))[:, None]
        extents = np.full((batch, -(-length // QUERY_BLOCK), 2), -1, np.int32)
        extents_kernel(mask, extents)
        places = np.arange(total, dtype=np.float32)[None]
        y = np.full_like(query, np.nan)
        bias = (slopes, places) if alibi else ()
        kernel(query, as_keys(codes[0]), codes[1], scales[0], scales[1], mask, extents, *bias, y)
        key, value = (codes * scales.astype(np.float64)[..., None])[:, :, :, :total].repeat(heads // kv_heads, axis=2)
        scores = np.einsum("bshd,bhtd->bhst", query.astype(np.float64), key) * 0.2
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        added = mask + slopes.astype(np.float64)[:, None, None] * places if alibi else mask
        scores = scores + np.maximum(added, -1.7014117e38)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected = np.einsum("bhst,bhtd->bshd", weights / weights.sum(axis=-1, keepdims=True), value)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("heads", "head_dim"), [(5, 12), (3, 80), (2, 128)])
def test_rows_are_turned(cpu, heads, head_dim):
    kernel = compile_kernel(turn_rows(heads, head_dim, cpu.isa), cpu)
    rng = np.random.default_rng(heads)
    matrix = rng.standard_normal((head_dim, head_dim), np.float32)
    for batch, length in [(1, 1), (3, 17)]:
        x = rng.standard_normal((batch, length, heads, head_dim), np.float32)
        y = np.full_like(x, np.nan)
        kernel(x, matrix, y)
        expected = x.astype(np.float64) @ matrix
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mcpu", "register"), [("avx512-vnni", "icelake-server", "zmm"), ("avx2", "x86-64-v3", "ymm")]
)
def test_bytes_are_widened_in_registers(name, mcpu, register):
    """Checked on any machine: no copy of the cache as numbers, but one instruction per vector of bytes."""
    pytest.importorskip("tvm")
    text = assembly(attention(4, 2, 64, 0.125, "int8", level(name), False), Cpu(mcpu, level(name)))
    assert f"%{register}" in text
    assert "vpmovsxbd" in text
