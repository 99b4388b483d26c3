"""Codes of 4 bits with scales per group: numbers against numpy, bytes as ONNX packs them, shards and padding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError
from passopt.ir.weights import groups
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.groups import nibbles, packed_bytes, quantize_groups, unsigned, view
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.plan_file import read_plan, write_plan
from passopt.ir.weights.raw_bytes import stored
from passopt.ir.weights.sources import external_source, safetensors_sources
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import write_weight_files

RANDOM = np.random.default_rng(4)


def evaluated(expression, rank=0):
    with Evaluator(rank, chunk_bytes=512) as evaluator:
        return evaluator.array(expression)


def weight(tmp_path, rows, columns, dtype=np.float32):
    values = RANDOM.standard_normal((rows, columns)).astype(dtype)
    values[1] = 0
    save_file({"w": values}, tmp_path / "w.safetensors")
    return values, safetensors_sources(tmp_path / "w.safetensors")["w"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 96, 32), (3, 128, 64)])
def test_symmetric_codes_are_those_of_numpy(tmp_path, rows, columns, group, dtype):
    values, source = weight(tmp_path, rows, columns, dtype)
    codes, scales = (evaluated(part) for part in quantize_groups(source, group))
    parts = values.astype(np.float32).reshape(rows, -1, group)
    expected = (np.abs(parts).max(2) / np.float32(7)).astype(dtype)
    expected[1] = 1  # rows of zeros
    assert np.array_equal(scales, expected)
    steps = np.clip(np.rint(parts / expected.astype(np.float32)[..., None]), -7, 7)
    assert np.array_equal(codes, steps.reshape(rows, columns))
    assert np.abs(codes).max() == 7


def test_ranges_reach_all_numbers_and_zero(tmp_path):
    values, source = weight(tmp_path, 6, 64)
    values += 3
    source = Literal.of(values)
    codes, scales, zeros = (evaluated(part) for part in quantize_groups(source, 32, symmetric=False))
    back = (codes.reshape(6, 2, 32).astype(np.float32) - zeros[..., None]) * scales[..., None]
    assert np.abs(back - values.reshape(6, 2, 32)).max() <= 0.51 * scales.max()
    assert (zeros == 0).all()
    assert codes.max() == 15


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 64), DataType.INT4), ((5, 7), DataType.UINT4), ((3,), DataType.INT4)]
)
def test_bytes_are_those_of_onnx(shape, dtype):
    low = -8 if dtype == DataType.INT4 else 0
    values = RANDOM.integers(low, low + 16, shape).astype(np.int8)
    codes = Literal.of(values).cast(dtype)
    proto = onnx.helper.make_tensor("w", dtype.value, shape, values.reshape(-1).tolist())
    expected = onnx.numpy_helper.from_array(values.astype(dtype.numpy())).raw_data
    assert onnx.numpy_helper.to_array(proto).astype(np.int8).tolist() == values.tolist()
    assert evaluated(packed_bytes(codes)).tobytes() == expected
    kept = Literal(dtype, shape, expected)
    assert np.array_equal(evaluated(kept).astype(np.int8), values)


def test_a_file_of_four_bits_is_read_by_rows(tmp_path):
    values = RANDOM.integers(-8, 8, (9, 10)).astype(np.int8)
    path = tmp_path / "codes.bin"
    path.write_bytes(evaluated(packed_bytes(Literal.of(values).cast(DataType.INT4))).tobytes())
    source = external_source(path, "w", DataType.INT4, (9, 10), 0)
    assert np.array_equal(evaluated(source).astype(np.int8), values)
    assert evaluated(source).dtype == ml_dtypes.int4
    part = source.slice(0, 3, 7).slice(1, 1, 4)
    assert np.array_equal(evaluated(part).astype(np.int8), values[3:7, 1:4])
    assert np.array_equal(evaluated(unsigned(source)), values + 8)


def test_nibbles_lie_a_distance_apart():
    values = RANDOM.integers(0, 16, (4, 16)).astype(np.uint8)
    found = evaluated(nibbles(Literal.of(values), 4))
    assert np.array_equal(found[:, :4], values[:, :4] | values[:, 4:8] << 4)
    assert np.array_equal(found[:, 4:], values[:, 8:12] | values[:, 12:] << 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_shards_have_the_codes_of_the_whole(tmp_path, symmetric, degree, axis):
    _, source = weight(tmp_path, 8, 256)
    whole = [evaluated(part) for part in quantize_groups(source, 32, symmetric=symmetric)]
    shards = [
        [evaluated(part, rank) for part in quantize_groups(source.shard(axis, degree), 32, symmetric=symmetric)]
        for rank in range(degree)
    ]
    for index, expected in enumerate(whole):
        assert np.array_equal(np.concatenate([parts[index] for parts in shards], axis), expected)


def test_padding_is_zero(tmp_path):
    _, source = weight(tmp_path, 4, 64)
    codes, scales, zeros = quantize_groups(source.pad(1, 128, 2), 32, symmetric=False)
    found = evaluated(codes).reshape(4, 2, 64)
    assert not found[:, :, 32:].any()
    assert np.array_equal(evaluated(scales).reshape(4, 2, 2)[..., 1], np.ones((4, 2)))
    assert not evaluated(zeros).reshape(4, 2, 2)[..., 1].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w: quantize_groups(w, 48), "groups of 48 do not fill the 64 inputs"),
        (lambda w: quantize_groups(w.shard(1, 4), 32), "groups of 32 do not divide the 16 inputs of a rank"),
        (lambda w: quantize_groups(w.pad(1, 80), 32), "groups of 32 do not divide 80 padded inputs"),
        (lambda w: nibbles(quantize_groups(w, 32)[0].slice(1, 0, 3)), "bytes of two codes"),
        (lambda w: view(w, (3, 64)), "no view"),
    ],
)
def test_what_would_cut_a_group_is_refused(tmp_path, build, message):
    _, source = weight(tmp_path, 4, 64)
    with pytest.raises(ModelError, match=message):
        build(source)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_hold_what_the_evaluator_gives(tmp_path, symmetric, axis):
    _, source = weight(tmp_path, 6, 192, np.float16)
    for degree in (1, 2):
        sharded = source if degree == 1 else source.shard(axis, degree)
        codes, scales, *zeros = quantize_groups(sharded.cast(DataType.FLOAT), 32, symmetric=symmetric)
        kind = DataType.INT4 if symmetric else DataType.UINT4
        parts = {"codes": codes.cast(kind), "scales": scales, "kernel": nibbles(unsigned(codes), 4).pack(4, 4)}
        parts |= {"zeros": zeros[0].cast(kind)} if zeros else {}
        parts["view"] = view(nibbles(unsigned(codes)), (6, codes.shape[1] // 32, 16)) if degree == 1 else scales
        files = [WeightFile(tmp_path / f"{degree}.{rank}.safetensors", parts, rank) for rank in range(degree)]
        write_weight_files(files)
        for file in files:
            data = file.path.read_bytes()
            for name, part in parts.items():
                expected = evaluated(stored(part, name), file.rank).tobytes()
                offset = file.layout.offsets[name]
                assert data[offset : offset + len(expected)] == expected, name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [DataType.INT4, DataType.UINT4])
def test_codes_of_a_file_are_cut_and_packed_anew(tmp_path, kind, axis):
    values = RANDOM.integers(0, 8, (6, 64)).astype(np.int8) - (4 if kind == DataType.INT4 else 0)
    (tmp_path / "codes.bin").write_bytes(evaluated(packed_bytes(Literal.of(values).cast(kind))).tobytes())
    source = external_source(tmp_path / "codes.bin", "w", kind, (6, 64), 0)
    shard = source.shard(axis, 2)
    parts = {
        "shard": shard,
        "kernel": nibbles(unsigned(shard), 4).pack(4, 4),
        "turned": source.transpose(),
        "whole": source,
    }
    files = [WeightFile(tmp_path / f"{rank}.safetensors", parts, rank) for rank in range(2)]
    write_weight_files(files)
    for file in files:
        data = file.path.read_bytes()
        for name, part in parts.items():
            expected = evaluated(stored(part, name), file.rank).tobytes()
            offset = file.layout.offsets[name]
            assert data[offset : offset + len(expected)] == expected, name
        cut = np.split(values, 2, axis)[file.rank]
        assert np.array_equal(evaluated(shard, file.rank).astype(np.int8), cut)


def test_a_plan_holds_them(tmp_path):
    _, source = weight(tmp_path, 4, 64)
    codes, scales, zeros = quantize_groups(source, 32, symmetric=False)
    parts = {
        "codes": codes.cast(DataType.UINT4),
        "scales": scales,
        "zeros": packed_bytes(zeros.slice(1, 0, 1).cast(DataType.UINT4)),
        "signed": nibbles(unsigned(quantize_groups(source, 64)[0]), 4),
        "view": view(nibbles(codes), (4, 2, 16)),
    }
    write_plan(tmp_path / "plan.json", parts)
    assert read_plan(tmp_path / "plan.json") == parts
    damaged = (tmp_path / "plan.json").read_text().replace("GroupZeros", "GroupScales")
    (tmp_path / "plan.json").write_text(damaged)
    with pytest.raises(ModelError):
        read_plan(tmp_path / "plan.json")


def test_texts_name_what_the_values_depend_on():
    source = Literal.of(RANDOM.standard_normal((2, 64)).astype(np.float32))
    made = [*quantize_groups(source, 32), *quantize_groups(source, 64), *quantize_groups(source, 32, symmetric=False)]
    texts = {part.text() for part in made} | {nibbles(made[0], distance).text() for distance in (1, 4)}
    assert len(texts) == len(made) + 2
    assert groups.unsigned(made[0]).text() == f"unsigned({made[0].text()})"
