"""Compiled kernels against numpy, bit for bit; numpy against plain arithmetic is in test_evaluate."""

from __future__ import annotations

import builtins
import sys

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.row_math import scales_of
from passopt.ir.weights.streaming import row_kernels
from passopt.ir.weights.streaming.row_kernels import CompiledRowKernels, RowKernels, compiled_kernels, kernels_for

KINDS = [np.float32, np.float16, ml_dtypes.bfloat16]
FLOATS = [DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16]
REFERENCE = RowKernels()


@pytest.fixture(scope="module")
def compiled():
    found = compiled_kernels()
    assert isinstance(found, CompiledRowKernels)
    return found


def numbers(columns, kind, rows=7):
    """Of all magnitudes that fp16 holds, subnormals and zeros among them."""
    rng = np.random.default_rng(columns)
    wide = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-30, 12, (rows, columns)))
    wide[rng.random(wide.shape) < 0.05] = 0
    return wide.astype(np.float32).astype(kind)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 200])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [None, *FLOATS])
@pytest.mark.parametrize("along", [0, 1])
def test_absmax_and_codes(compiled, columns, kind, through, along):
    values = numbers(columns, kind)
    peaks = REFERENCE.absmax(values, along, through)
    assert peaks.shape == (values.shape[along],)
    assert compiled.absmax(values, along, through).tobytes() == peaks.tobytes()
    scales = scales_of(peaks, through or DataType.from_numpy(values.dtype))
    found, expected = np.empty(values.shape, np.int8), np.empty(values.shape, np.int8)
    compiled.codes(values, along, through, scales, found)
    REFERENCE.codes(values, along, through, scales, expected)
    assert np.array_equal(found, expected)
    assert np.abs(found).max() == 127


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 200])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [None, DataType.FLOAT16, DataType.BFLOAT16])
@pytest.mark.parametrize("result", KINDS)
def test_normalized_rows(compiled, columns, kind, through, result):
    values = numbers(columns, kind)
    values[3] = 0
    found, expected = np.empty(values.shape, result), np.empty(values.shape, result)
    compiled.normalize(values, through, 1e-12, found)
    REFERENCE.normalize(values, through, 1e-12, expected)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", FLOATS)
def test_cast_of_every_16_bit_number(compiled, kind, target):
    values = np.arange(1 << 16, dtype=np.uint16).view(kind).reshape(64, 1024)
    for part in (values, values[np.isfinite(values.astype(np.float32)).all(axis=1)]):  # with and without NaN
        found, expected = np.empty(part.shape, target.numpy()), np.empty(part.shape, target.numpy())
        with np.errstate(invalid="ignore"):
            assert compiled.cast(part, target, found) == REFERENCE.cast(part, target, expected)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("target", [DataType.FLOAT16, DataType.BFLOAT16])
def test_cast_of_fp32(compiled, target):
    bits = np.random.default_rng(0).integers(0, 1 << 32, (64, 4096), dtype=np.uint32)
    values = np.nan_to_num(bits.view(np.float32), nan=1.0, posinf=np.inf, neginf=-np.inf)
    values[0, :6] = [65519, 65520, -65520, np.inf, -0.0, 2**-24]
    found, expected = np.empty(values.shape, target.numpy()), np.empty(values.shape, target.numpy())
    lost = compiled.cast(values, target, found)
    assert lost == REFERENCE.cast(values, target, expected) > 0
    assert found.tobytes() == expected.tobytes()


def test_fp64_and_odd_addresses_go_the_numpy_way(compiled):
    values = numbers(33, np.float32).astype(np.float64)
    assert np.array_equal(compiled.absmax(values, 0, None), REFERENCE.absmax(values, 0, None))
    raw = np.zeros(4 * 33 * 2 + 1, np.uint8)
    odd = raw[1:].view(np.float16).reshape(4, 33)
    odd[...] = numbers(33, np.float16, 4)
    assert not odd.flags.aligned
    assert np.array_equal(compiled.absmax(odd, 0, None), REFERENCE.absmax(odd, 0, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 70), (64, 32), (33, 1)])
def test_transpose(compiled, kind, shape):
    values = numbers(shape[1], kind, shape[0])
    found = np.empty(shape[::-1], kind)
    compiled.transpose(values, found)
    assert found.tobytes() == np.ascontiguousarray(values.T).tobytes()


@pytest.mark.parametrize("error", [ImportError("numpy 9 is not supported"), RuntimeError("no locator available")])
def test_without_a_working_numba_numpy_does_it(monkeypatch, error):
    def fail(name, *arguments, real=builtins.__import__, **options):
        if name == "numba":
            raise error
        return real(name, *arguments, **options)

    compiled_kernels.cache_clear()
    monkeypatch.delitem(sys.modules, "passopt.ir.weights.streaming.numba_rows", raising=False)
    monkeypatch.setattr(builtins, "__import__", fail)
    monkeypatch.delattr("passopt.ir.weights.streaming.numba_rows", raising=False)
    assert kernels_for(1 << 40).name == "numpy"
    compiled_kernels.cache_clear()
    monkeypatch.undo()
    assert kernels_for(1 << 40).name == "numba"
    assert kernels_for(row_kernels.COMPILED_FROM - 1).name == "numpy"
