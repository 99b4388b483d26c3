"""Every operation against numpy, read whole, in many tiny chunks, and box by box."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc
from pathlib import Path

import blake3
import ml_dtypes
import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.concat import concat
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.streaming import row_kernels
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.row_kernels import RowKernels
from passopt.ir.weights.streaming.write_weights import write_weight_files

#: One fp32 row of the test weights is wider than this, so every row is a chunk.
TINY = 16
KINDS = [np.float32, np.float16, ml_dtypes.bfloat16]


def weight(rows=6, columns=10, kind=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(kind)


def evaluated(expression, rank=0, chunk_bytes=None):
    """The array, after asserting that whole, chunked and boxed reads agree bit by bit."""
    sizes = [chunk_bytes] if chunk_bytes else [TINY, 100, 1 << 20]
    found = []
    for size in sizes:
        with Evaluator(rank, size) as evaluator:
            whole = evaluator.array(expression)
            chunks = list(evaluator.chunks(expression))
            boxes = [
                evaluator.read(expression, tuple((i, i + 1) for i in at))
                for at in itertools.product(*(range(n) for n in expression.shape))
            ]
        assert whole.shape == expression.shape
        assert whole.dtype == expression.dtype.numpy()
        assert all(chunk.flags.c_contiguous and chunk.dtype == whole.dtype for chunk in chunks)
        joined = np.concatenate(chunks) if expression.shape else chunks[0]
        assert joined.tobytes() == whole.tobytes()
        assert b"".join(box.tobytes() for box in boxes) == whole.tobytes()
        found.append(whole.tobytes())
    assert len(set(found)) == 1
    assert streamed(expression, rank) == {whole.tobytes()}
    return whole


def streamed(expression, rank):
    """The bytes that the streaming engine writes, in the least memory and in plenty, by numpy and compiled."""
    found = set()
    for arena_bytes, kernels in itertools.product((0, 1 << 20), (RowKernels(), row_kernels.compiled_kernels())):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr("passopt.ir.weights.streaming.write_weights.kernels_for", lambda _, kernels=kernels: kernels)
            patch.setattr("passopt.ir.weights.streaming.direct_io.DIRECT_FROM", 0 if arena_bytes else 1 << 60)
            file = WeightFile(Path(folder) / "w", {"a": Literal.of(np.arange(5.0)), "w": expression}, rank)
            report = write_weight_files([file], StreamOptions(arena_bytes=arena_bytes))
            data = file.path.read_bytes()[file.layout.offsets["w"] :][: expression.nbytes]
        assert report.digests[0]["w"] == blake3.blake3(data).hexdigest()
        found.add(data)
    return found


@pytest.mark.parametrize("kind", [*KINDS, np.int64, np.int8, np.bool_])
def test_source_gives_the_bytes_of_the_file(stored, kind):
    array = (10 * weight()).astype(kind)
    assert np.array_equal(evaluated(stored(array)), array)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (2, 3, 4, 5)])
def test_source_of_any_rank(stored, shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert np.array_equal(evaluated(stored(array)), array)


def test_tiny_chunks_are_single_rows(stored):
    with Evaluator(chunk_bytes=TINY) as evaluator:
        assert [chunk.shape for chunk in evaluator.chunks(stored(weight()))] == [(1, 10)] * 6
    with Evaluator(chunk_bytes=4 * 10 * 4) as evaluator:
        assert [chunk.shape for chunk in evaluator.chunks(stored(weight()))] == [(4, 10), (2, 10)]


def test_literal(stored):
    array = weight(3, 5, np.float16)
    assert np.array_equal(evaluated(Literal.of(array)), array)


def test_fill_is_one_number_everywhere():
    filled = Fill(DataType.BFLOAT16, (6, 4), -1.5)
    assert evaluated(filled).astype(float).tolist() == [[-1.5] * 4] * 6
    assert evaluated(filled.slice(0, 1, 3).pad(1, 6)).astype(float).tolist() == [[-1.5] * 4 + [0] * 2] * 2


def test_slice_split_and_concat(stored):
    array = weight()
    source = stored(array)
    assert np.array_equal(evaluated(source.slice(0, 1, 4)), array[1:4])
    assert np.array_equal(evaluated(source.slice(1, 3, 8).slice(0, 2, 5)), array[2:5, 3:8])
    for axis, widths in ((0, [1, 3, 2]), (1, [5, 1, 4])):
        parts = source.split(widths, axis)
        expected = np.split(array, np.cumsum(widths)[:-1], axis)
        assert all(np.array_equal(evaluated(part), wanted) for part, wanted in zip(parts, expected, strict=True))
        swapped = concat([parts[2], parts[0]], axis)
        assert np.array_equal(evaluated(swapped), np.concatenate([expected[2], expected[0]], axis))


@pytest.mark.parametrize("permutation", [(0, 2, 1), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_transpose(stored, permutation):
    array = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    assert np.array_equal(evaluated(stored(array).transpose(permutation)), array.transpose(permutation))


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", [DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16])
def test_cast_rounds_as_numpy_does(stored, source, target):
    array = weight(kind=source)
    found = evaluated(stored(array).cast(target))
    assert np.array_equal(found, array.astype(target.numpy()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_overflows_in_fp16_is_counted(stored, kind):
    array = weight(kind=kind)
    array[1, 2], array[4, 0], array[5, 9] = 1e4, -2e4, np.inf
    if kind != np.float16:
        array[1, 2], array[4, 0] = 1e5, -2e6
    with Evaluator(chunk_bytes=TINY) as evaluator:
        for _ in evaluator.chunks(stored(array, "model.w").cast(DataType.FLOAT16)):
            pass
    assert evaluator.report.overflows == ({} if kind == np.float16 else {"model.w": 2})


def test_pad_fills_each_segment_at_its_end(stored):
    array = weight(6, 10)
    a, b = array[:3], array[3:]
    filled = np.full((1, 10), 7, np.float32)
    assert np.array_equal(evaluated(stored(array).pad(0, 8, 2, 7.0)), np.concatenate([a, filled, b, filled]))
    columns = evaluated(stored(array).pad(1, 15, 5))
    for segment in range(5):
        assert np.array_equal(columns[:, 3 * segment : 3 * segment + 2], array[:, 2 * segment : 2 * segment + 2])
        assert not columns[:, 3 * segment + 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_normalized_rows_have_length_one(stored, kind):
    array = weight(kind=kind)
    array[3] = 0
    wide = array.astype(np.float64)
    lengths = np.maximum(np.sqrt((wide**2).sum(axis=1)), 1e-12)[:, None]
    found = evaluated(stored(array).normalize_rows(1e-12))
    step = float(ml_dtypes.finfo(kind).eps)
    assert np.abs(found.astype(np.float64) - wide / lengths).max() <= step
    assert not found[3].any()


def test_epsilon_bounds_the_length_from_below(stored):
    array = np.full((2, 4), 1e-3, np.float32)
    assert np.allclose(evaluated(stored(array).normalize_rows(0.5)), 2e-3, rtol=1e-6)


def reference_codes(array, axis):
    """absmax/127 per index of `axis`, rounded to the weight's dtype, and codes by the scale as stored."""
    wide = array.astype(np.float64)
    absmax = np.abs(wide).max(axis=1 - axis, keepdims=True)
    scales = (absmax / 127).astype(np.float32).astype(array.dtype)
    codes = np.clip(np.rint(array.astype(np.float32) / scales.astype(np.float32)), -127, 127)
    return codes.astype(np.int8), scales.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_quantisation_is_absmax_by_127(stored, kind, axis):
    array = weight(kind=kind)
    codes, scales = (evaluated(part) for part in stored(array).quantize(axis))
    expected_codes, expected_scales = reference_codes(array, axis)
    assert scales.dtype == kind
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected_codes)
    assert np.abs(codes).max(axis=1 - axis).tolist() == [127] * array.shape[axis]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_zeros_and_subnormals_have_a_scale(stored, kind, axis):
    tiny = float(ml_dtypes.finfo(kind).smallest_subnormal)
    rows = weight(6, 4)
    rows[1] = 0
    rows[2] = np.array([1, -1, 0, 0]) * tiny
    rows[3] = np.array([60, -64, 3, 1]) * tiny
    rows[4] = np.array([190, -191, 90, 10]) * tiny
    array = (rows if axis == 0 else rows.T).astype(kind)
    codes, scales = (evaluated(part) for part in stored(array).quantize(axis))
    assert (scales > 0).all()
    assert codes.min() >= -127
    assert scales[1] == 1
    assert not np.take(codes, 1, axis).any()
    wide = scales.astype(np.float64).reshape((-1, 1) if axis == 0 else (1, -1))
    error = np.abs(codes.astype(np.float64) * wide - array.astype(np.float64))
    assert (error <= wide * 0.5000001).all()


def test_a_scale_that_rounds_down_too_far_is_the_next_number():
    """absmax 191 subnormals: 191/127 rounds to one step, with which 191 would need code 191."""
    tiny = float(ml_dtypes.finfo(np.float16).smallest_subnormal)
    row = np.array([[190 * tiny, 0]], np.float16)
    codes, scales = (evaluated(part) for part in Literal.of(row).quantize(0))
    assert scales.astype(np.float64) / tiny == [2]
    assert codes.tolist() == [[95, 0]]


def test_a_code_of_minus_128_is_clamped():
    """255 subnormals by a scale of two: halfway between 127 and 128, which rounds to the even one."""
    tiny = float(ml_dtypes.finfo(np.float16).smallest_subnormal)
    codes, scales = (evaluated(part) for part in Literal.of(np.array([[-255 * tiny, 0]], np.float16)).quantize(0))
    assert scales.astype(np.float64) / tiny == [2]
    assert codes.tolist() == [[-127, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_are_named_with_their_row(stored, bad, kind):
    array = weight(kind=kind)
    array[4, 3] = bad
    source = stored(array, "model.layers.7.w")
    codes, scales = source.quantize(0)
    by_column, column_scales = source.quantize(1)
    for expression in (codes, scales, by_column, column_scales, source.normalize_rows(1e-12)):
        for size in (TINY, 1 << 20):
            with (
                Evaluator(chunk_bytes=size) as evaluator,
                pytest.raises(ModelError, match=r"model\.layers\.7\.w.*row 4"),
            ):
                evaluator.array(expression)


def test_overflow_in_fp16_is_found_by_quantisation(stored):
    array = weight()
    array[2, 1] = 1e6
    codes, _ = stored(array).cast(DataType.FLOAT16).quantize(0)
    with Evaluator() as evaluator, pytest.raises(ModelError, match="row 2.*`dtype=fp32`"):
        evaluator.array(codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("along", "segments", "degree"), [(0, 1, 3), (0, 2, 3), (1, 1, 2), (1, 5, 2), (0, 1, 12)])
@pytest.mark.parametrize("axis", [0, 1])
def test_shard_of_a_quantised_weight_is_a_shard_of_its_codes(stored, kind, along, segments, degree, axis):
    array = weight(12, 10, kind)
    source = stored(array)
    whole_codes, whole_scales = reference_codes(array, axis)
    codes, scales = source.shard(along, degree, segments).quantize(axis)
    for rank in range(degree):
        pieces = [np.split(part, degree, along)[rank] for part in np.split(whole_codes, segments, along)]
        assert np.array_equal(evaluated(codes, rank), np.concatenate(pieces, along))
        expected = whole_scales
        if along == axis:
            expected = np.concatenate([np.split(part, degree)[rank] for part in np.split(whole_scales, segments)])
        assert np.array_equal(evaluated(scales, rank), expected)


def test_padded_rows_of_a_quantised_weight_are_zeros_of_scale_one(stored):
    array = weight(6, 10)
    whole_codes, whole_scales = reference_codes(array, 0)
    codes, scales = stored(array).pad(0, 8, 2).shard(0, 2, 2).quantize(0)
    expected = [[0, 1, 3, 4], [2, None, 5, None]]
    for rank, rows in enumerate(expected):
        found_codes, found_scales = evaluated(codes, rank), evaluated(scales, rank)
        for position, row in enumerate(rows):
            assert np.array_equal(found_codes[position], whole_codes[row] if row is not None else np.zeros(10))
            assert found_scales[position] == (whole_scales[row] if row is not None else 1)


def test_operations_nest(stored):
    array = weight(12, 10)
    source = stored(array)
    nested = concat([source.slice(0, 0, 6).transpose(), source.slice(0, 6, 12).transpose()], 0).pad(1, 8).shard(0, 4)
    expected = np.pad(np.concatenate([array[:6].T, array[6:].T]), ((0, 0), (0, 2)))
    for rank in range(4):
        assert np.array_equal(evaluated(nested, rank), expected[5 * rank : 5 * rank + 5])
    transposed_codes = evaluated(source.quantize(0)[0].transpose())
    assert np.array_equal(transposed_codes, reference_codes(array, 0)[0].T)
    normalized = evaluated(source.normalize_rows(1e-12))
    codes = evaluated(source.normalize_rows(1e-12).quantize(0)[0])
    assert np.array_equal(codes, reference_codes(normalized, 0)[0])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_tensors(shape):
    empty = Literal.of(np.zeros(shape, np.float32))
    codes, scales = empty.quantize(0)
    for expression in (empty, concat([empty, empty], 0), empty.transpose(), codes, scales, empty.pad(0, 5)):
        with Evaluator() as evaluator:
            assert evaluator.array(expression).shape == expression.shape


def test_a_row_is_read_without_its_neighbours(stored, monkeypatch):
    """A row of a baked mask [heads, n, n] costs n numbers, not n × n."""
    source = stored(np.arange(3 * 50 * 50, dtype=np.float32).reshape(3, 50, 50))
    lengths = []
    original = Evaluator._pread
    monkeypatch.setattr(Evaluator, "_pread", lambda self, s, o, n: lengths.append(n) or original(self, s, o, n))
    with Evaluator() as evaluator:
        row = evaluator.read(source, ((2, 3), (7, 8), (10, 50)))
    assert row.reshape(-1).tolist() == list(range(2 * 2500 + 360, 2 * 2500 + 400))
    assert lengths == [160]


def test_a_file_that_changed_is_an_error(stored):
    source = stored(weight())
    with open(source.file.path, "ab") as file:
        file.write(b"more")
    with Evaluator() as evaluator, pytest.raises(ModelError, match="size changed"):
        evaluator.array(source)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(stored):
    source = stored(weight())
    with Evaluator() as evaluator:
        evaluator.read(source, ((0, 1), (0, 10)))
        with open(source.file.path, "r+b") as file:
            file.truncate(source.offset + 70)
        with pytest.raises(ModelError, match="ends at byte .* inside tensor 'w'"):
            evaluator.array(source)


def test_an_unknown_operation_is_named():
    with Evaluator() as evaluator, pytest.raises(ModelError, match="no evaluation for Expression"):
        evaluator.array(ex.Expression(DataType.FLOAT, (2,)))


@pytest.mark.parametrize("blocks", [(2, 1), (4, 1), (4, 4), (3, 5), (8, 16)])
def test_pack_is_blocks_of_the_padded_matrix(stored, blocks):
    array, (rows, columns) = weight(), blocks
    found = evaluated(stored(array).pack(rows, columns))
    for i, j, r, c in itertools.product(*(range(n) for n in found.shape)):
        at = (i * rows + r, j * columns + c)
        assert found[i, j, r, c] == (array[at] if at[0] < 6 and at[1] < 10 else 0)


def test_pack_of_codes_of_a_shard(stored):
    codes, _ = stored(weight()).quantize()
    found = evaluated(codes.shard(0, 2).pack(2, 4), rank=1)
    whole = evaluated(codes)
    assert np.array_equal(found[:, :, :, :].transpose(0, 2, 1, 3).reshape(4, 12)[:3, :10], whole[3:])


def test_row_sums_of_codes(stored):
    codes, _ = stored(weight()).quantize()
    assert np.array_equal(evaluated(codes.row_sums()), evaluated(codes).sum(axis=1, dtype=np.int32))


def test_packs_of_placed_codes(stored):
    """What a compiled folder of ranks holds: shards, padding and segments below the blocks."""
    array = weight(24, 20)
    codes = reference_codes(array, 0)[0]
    found = stored(array).quantize(0)[0]
    for rank in range(2):
        rows = evaluated(found.shard(0, 2, 2).pack(5, 4), rank)
        expected = np.concatenate([part[rank * 6 : rank * 6 + 6] for part in (codes[:12], codes[12:])])
        assert np.array_equal(rows, Evaluator().array(Literal.of(expected).pack(5, 4)))
        columns = evaluated(found.shard(1, 2).pad(1, 12).pack(8, 4), rank)
        expected = np.pad(codes[:, rank * 10 : rank * 10 + 10], ((0, 0), (0, 2)))
        assert np.array_equal(columns, Evaluator().array(Literal.of(expected).pack(8, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_turned_weights(stored, kind):
    array = weight(35, 33, kind)  # Both lengths are a whole tile of the transposition and a part of one.
    turned = stored(array).cast(DataType.FLOAT16).transpose()
    expected = array.astype(np.float16).T
    assert np.array_equal(evaluated(turned), expected)
    codes, scales = (evaluated(part, 1) for part in turned.shard(0, 3).quantize(0))
    assert np.array_equal(codes, reference_codes(expected, 0)[0][11:22])
    assert np.array_equal(scales, reference_codes(expected, 0)[1][11:22])
    assert np.array_equal(
        evaluated(turned.quantize(0)[0].pack(8, 4)).reshape(-1)[:4], reference_codes(expected, 0)[0][0, :4]
    )


def test_scales_of_columns_of_another_dtype(stored):
    array = weight()
    scales = stored(array).quantize(1)[1]
    expected = reference_codes(array, 1)[1]
    assert np.array_equal(evaluated(scales.cast(DataType.FLOAT16)), expected.astype(np.float16))
    assert np.array_equal(evaluated(scales.slice(0, 2, 7).cast(DataType.FLOAT16)), expected[2:7].astype(np.float16))


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (2, 0, 4), (0,)])
def test_what_is_empty_is_written(shape):
    empty = Literal.of(np.zeros(shape, np.float32))
    assert streamed(empty, 0) == {b""}
    assert streamed(empty.cast(DataType.FLOAT16), 0) == {b""}


def test_columns_of_a_wide_weight_are_read_in_little_memory(stored):
    source = stored(np.arange(4000 * 500, dtype=np.float32).reshape(4000, 500))
    tracemalloc.start()
    with Evaluator(chunk_bytes=1 << 16) as evaluator:
        part = evaluator.read(source, ((0, 4000), (7, 9)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.shape == (4000, 2)
    assert peak < 1 << 20
