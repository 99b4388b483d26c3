"""Building expressions: dtype, shape and digest are known at once, and arguments are checked at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.weights.concat import Concat, concat
from passopt.ir.weights.expressions import (
    SCALE_OF_ZEROS,
    Cast,
    DataType,
    Expression,
    NormalizeRows,
    Pad,
    QuantizeCodes,
    QuantizeScales,
    Shard,
    Slice,
    Source,
    Transpose,
)
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.source_file import SourceFile

FILE = SourceFile("/data/a.safetensors", 1000, 17, "00")


def source(*shape, dtype=DataType.FLOAT16, name="model.w", file=FILE, offset=64):
    return Source(dtype, shape, name, file, offset)


W = source(6, 10)


def facts(expression):
    return type(expression), expression.dtype, expression.shape


@pytest.mark.parametrize(
    ("expression", "kind", "dtype", "shape"),
    [
        (W.slice(0, 1, 4), Slice, DataType.FLOAT16, (3, 10)),
        (W.slice(-1, 1, 4), Slice, DataType.FLOAT16, (6, 3)),
        (W.transpose(), Transpose, DataType.FLOAT16, (10, 6)),
        (source(2, 3, 5).transpose([2, 0, 1]), Transpose, DataType.FLOAT16, (5, 2, 3)),
        (W.cast(DataType.FLOAT), Cast, DataType.FLOAT, (6, 10)),
        (W.pad(0, 8), Pad, DataType.FLOAT16, (8, 10)),
        (W.pad(1, 15, 5), Pad, DataType.FLOAT16, (6, 15)),
        (W.normalize_rows(1e-12), NormalizeRows, DataType.FLOAT16, (6, 10)),
        (W.quantize(0)[0], QuantizeCodes, DataType.INT8, (6, 10)),
        (W.quantize(0)[1], QuantizeScales, DataType.FLOAT16, (6,)),
        (W.quantize(-1)[1], QuantizeScales, DataType.FLOAT16, (10,)),
        (W.shard(0, 3), Shard, DataType.FLOAT16, (2, 10)),
        (W.shard(1, 2, 5), Shard, DataType.FLOAT16, (6, 5)),
        (concat([W, source(4, 10)], 0), Concat, DataType.FLOAT16, (10, 10)),
        (Literal.of(np.zeros((3, 2), np.int64)), Literal, DataType.INT64, (3, 2)),
        (Fill(DataType.FLOAT16, (9,), 0.0).shard(0, 3), Shard, DataType.FLOAT16, (3,)),
    ],
)
def test_dtype_and_shape_are_known_without_reading(expression, kind, dtype, shape):
    assert facts(expression) == (kind, dtype, shape)
    assert expression.nbytes == int(np.prod(shape)) * dtype.itemsize


def test_operations_without_effect_are_not_built():
    assert W.slice(0, 0, 6) is W
    assert W.transpose([0, 1]) is W
    assert W.transpose().transpose() is W
    assert W.cast(DataType.FLOAT16) is W
    assert W.pad(0, 6, 3) is W
    assert concat([W], 1) is W


def test_split_gives_consecutive_slices():
    first, second, third = W.split([1, 2, 3], 0)
    assert [part.shape for part in (first, second, third)] == [(1, 10), (2, 10), (3, 10)]
    assert (first.start, second.start, third.start) == (0, 1, 3)
    with pytest.raises(ModelError, match=r"widths \[1, 2\] do not fill axis 0 of shape \[6, 10\]"):
        W.split([1, 2], 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: W.slice(0, 2, 7), r"slice 2:7 of axis 0 is outside of shape \[6, 10\]"),
        (lambda: W.slice(1, 3, 2), "slice 3:2"),
        (lambda: W.slice(2, 0, 1), "axis 2 is outside"),
        (lambda: W.slice(-3, 0, 1), "axis -3 is outside"),
        (lambda: W.pad(0, 5), "cannot pad axis 0"),
        (lambda: W.pad(0, 7, 2), "cannot pad .* to 7 in 2 segments"),
        (lambda: W.pad(0, 8, 4), "in 4 segments"),
        (lambda: W.shard(0, 4), "does not divide by 1 segments × 4"),
        (lambda: W.shard(0, 2, 2), "does not divide by 2 segments × 2"),
        (lambda: source(6).quantize(0), r"quantize takes a floating matrix, not FLOAT16\[6\]"),
        (lambda: source(6, 2, dtype=DataType.INT8).quantize(0), "quantize takes a floating matrix, not INT8"),
        (lambda: source(2, 3, 4).normalize_rows(0.0), "normalize_rows takes a floating matrix"),
        (lambda: source(2, 3, 4).pack(2), "cannot pack"),
        (lambda: source(2, 3).pack(0), "blocks of 0 × 1"),
        (lambda: source(2, 3).row_sums(), "row sums are of an int8 matrix"),
        (lambda: concat([], 0), "at least one part"),
        (lambda: concat([W, source(6, 11)], 0), "concat of"),
        (lambda: concat([W, W.cast(DataType.FLOAT)], 0), "concat of"),
    ],
)
def test_wrong_arguments_are_refused_at_once(build, message):
    with pytest.raises(ModelError, match=message):
        build()


def test_quantisation_goes_through_a_shard():
    codes, scales = W.shard(0, 3).quantize(0)
    whole_codes, whole_scales = W.quantize(0)
    assert codes == whole_codes.shard(0, 3)
    assert scales == whole_scales.shard(0, 3)
    codes, scales = W.shard(1, 2, 5).quantize(0)
    assert codes == whole_codes.shard(1, 2, 5)
    assert scales == whole_scales


def test_quantisation_goes_through_zero_padding():
    codes, scales = W.pad(0, 8, 2).quantize(0)
    whole_codes, whole_scales = W.quantize(0)
    assert codes == whole_codes.pad(0, 8, 2)
    assert scales == whole_scales.pad(0, 8, 2, SCALE_OF_ZEROS)
    codes, scales = W.pad(1, 12).quantize(0)
    assert codes == whole_codes.pad(1, 12)
    assert scales == whole_scales
    both = W.pad(0, 8, 2).shard(0, 2, 2).quantize(0)
    assert both == (
        whole_codes.pad(0, 8, 2).shard(0, 2, 2),
        whole_scales.pad(0, 8, 2, SCALE_OF_ZEROS).shard(0, 2, 2),
    )


@pytest.mark.parametrize(
    "inner", [W.slice(1, 0, 5), W.pad(1, 12, 1, 3.0), W.cast(DataType.FLOAT), W.transpose(), W.normalize_rows(1e-12)]
)
def test_quantisation_stops_at_anything_that_changes_the_rows(inner):
    codes, scales = inner.quantize(0)
    assert (codes.operand, scales.operand) == (inner, inner)


def test_digest_depends_on_names_and_operations_only():
    moved = source(6, 10, file=dataclasses.replace(FILE, path="/elsewhere/b.bin", mtime_ns=99), offset=640)
    assert moved.digest() == W.digest()
    assert moved.quantize(0)[0].digest() == W.quantize(0)[0].digest()


def test_different_values_have_different_digests():
    values = [
        W,
        source(6, 10, name="model.v"),
        source(6, 10, dtype=DataType.FLOAT),
        source(10, 6),
        W.slice(0, 0, 3),
        W.slice(0, 3, 6),
        W.slice(1, 0, 3),
        W.transpose(),
        W.cast(DataType.FLOAT),
        W.pad(0, 8),
        W.pad(0, 8, 2),
        W.pad(0, 8, 1, 1.0),
        W.normalize_rows(1e-12),
        W.normalize_rows(1e-6),
        *W.quantize(0),
        *W.quantize(1),
        W.shard(0, 2),
        W.shard(0, 3),
        W.shard(1, 5),
        W.shard(1, 5, 2),
        concat([W, W], 0),
        concat([W, W], 1),
        Literal.of(np.zeros(3)),
        Literal.of(np.ones(3)),
        Literal.of(np.zeros(3, np.float32)),
        Literal.of(np.zeros((3, 1))),
        Fill(DataType.DOUBLE, (3,), 0.0),
        Fill(DataType.DOUBLE, (3,), 1.0),
        Fill(DataType.DOUBLE, (4,), 1.0),
    ]
    assert len({value.digest() for value in values}) == len(values)


def test_walk_finds_every_source():
    other = source(4, 10, name="model.v")
    joined = concat([W.slice(0, 0, 2), other], 0).shard(0, 3)
    assert [part.name for part in joined.sources()] == ["model.w", "model.v"]
    assert joined.depends_on_rank
    assert joined.cast(DataType.FLOAT).depends_on_rank
    assert not joined.operand.depends_on_rank


def test_an_operation_moves_to_another_operand():
    other = source(6, 10, name="model.v")
    assert W.slice(0, 1, 4).with_operand(other) == other.slice(0, 1, 4)


def test_a_bare_expression_has_no_text():
    with pytest.raises(NotImplementedError):
        Expression(DataType.FLOAT, (1,)).digest()


def test_shards_and_padding_stay_outermost():
    padded = W.pad(1, 12, 2).shard(1, 3, 2)
    assert padded.transpose() == W.transpose().pad(0, 12, 2).shard(0, 3, 2)
    cube = source(2, 3, 5)
    turned = cube.shard(0, 2).transpose([2, 0, 1])
    assert (turned.shape, turned.along) == ((5, 1, 3), 1)
    assert cube.transpose([2, 0, 1]).transpose([1, 2, 0]) is cube
