"""Random weights behave like files: every slice of one is a slice of the same numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from passopt.ir.weights.expressions import DataType, Source
from passopt.ir.weights.source_file import SourceFile
from passopt.verification.rewrites.sample_weights import SampledEvaluator

FILE = SourceFile("/nowhere", 1, 1, "")


def source(name, *shape, dtype=DataType.FLOAT16):
    return Source(dtype, shape, name, FILE, 64)


def array(expression):
    with SampledEvaluator() as evaluator:
        return evaluator.array(expression)


def test_no_file_is_opened_and_dtype_and_shape_are_those_of_the_weight():
    for weight in (source("w", 5, 7), source("v", 3), source("scalar"), source("q", 4, 3, dtype=DataType.INT8)):
        found = array(weight)
        assert (found.dtype, found.shape) == (weight.dtype.numpy(), weight.shape)


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 2, 3), (0, 1, 4), (1, 2, 6), (1, 6, 7)])
def test_slices_are_of_the_same_numbers(axis, start, stop):
    weight = source("w", 5, 7)
    expected = np.take(array(weight), range(start, stop), axis)
    assert np.array_equal(array(weight.slice(axis, start, stop)), expected)


def test_row_chunks_are_of_the_same_numbers():
    weight = source("w", 50, 7)
    with SampledEvaluator(chunk_bytes=4 * 7 * 8) as evaluator:
        chunks = list(evaluator.chunks(weight))
    assert len(chunks) > 3
    assert np.array_equal(np.concatenate(chunks), array(weight))


def test_weights_differ_by_name_and_rows_are_not_alike():
    weight = source("w", 2000, 1024)
    values = array(weight)
    assert not np.array_equal(values[:50], array(dataclasses.replace(weight, name="other"))[:50])
    assert len(np.unique(values, axis=0)) == 2000


def test_a_product_with_a_random_matrix_keeps_the_scale():
    assert 0.9 < float(np.linalg.norm(array(source("w", 64, 4096)).astype(np.float32), axis=1).mean()) < 1.1
    assert abs(float(array(source("norm", 4096)).astype(np.float32).mean()) - 1) < 0.05
