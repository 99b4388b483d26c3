"""Rotations and scalings of weights: their laws, their text, and the same bytes however they are read or written."""

from __future__ import annotations

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.evaluator import Evaluator, weight_digest
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.plan_file import read_plan, write_plan
from passopt.ir.weights.rotation import Rotate, obstacle, rotate, rotate_columns, rotate_rows, rotation_of
from passopt.ir.weights.scaling import ScaleAlong, beneath_shards, scale_along
from passopt.ir.weights.streaming import row_kernels, write_weights
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.output_groups import WeightFile, schedule
from passopt.ir.weights.streaming.row_kernels import compiled_kernels
from passopt.ir.weights.streaming.write_weights import write_weight_files

FLOAT = DataType.FLOAT
LENGTHS = [1, 2, 3, 8, 10, 64, 72, 96, 130, 576]


def values(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def evaluated(expression, rank=0, chunk_bytes=1 << 20):
    with Evaluator(rank, chunk_bytes) as evaluator:
        return evaluator.array(expression)


def matrix_of(length, seed=0):
    """R itself: the rotated rows of the unit matrix."""
    return evaluated(rotate(Literal.of(np.eye(length, dtype=np.float32)), 1, seed)).astype(np.float64)


@pytest.mark.parametrize("length", LENGTHS)
def test_r_is_orthogonal_and_spreads_evenly(length):
    matrix = matrix_of(length)
    assert np.abs(matrix @ matrix.T - np.eye(length)).max() < 5e-7
    assert np.abs(matrix).max() * length**0.5 < 1.4143


def test_r_is_hartley_times_hadamard_times_signs():
    hadamard = np.array([[1.0]])
    for _ in range(3):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    angles = 2 * np.pi * np.outer(np.arange(5), np.arange(5)) / 5
    hartley = (np.cos(angles) + np.sin(angles)) / 5**0.5
    expected = rotation_of(40, 7).signs[:, None] * np.kron(hartley, hadamard / 8**0.5)
    assert np.abs(matrix_of(40, 7) - expected).max() < 1e-7


def test_bits_are_the_same_on_every_machine():
    """A digest of two rotations, which may change with the number of `_ARITHMETIC` only."""
    numbers = (np.arange(3 * 80, dtype=np.float32).reshape(3, 80) - 117) / 7
    found = [rotate_rows(numbers, rotation_of(80, seed)).tobytes() for seed in (0, 1)]
    assert hashlib.blake2b(b"".join(found), digest_size=8).hexdigest() == "2b14102d57280f0b"


def test_seeds_give_other_rotations():
    assert np.abs(matrix_of(64, 0) - matrix_of(64, 1)).max() > 0.2
    assert 16 < (rotation_of(64, 0).signs > 0).sum() < 48


@pytest.mark.parametrize("columns", LENGTHS)
@pytest.mark.parametrize("rows", [1, 31, 33])
def test_compiled_kernels_give_the_same_bits(rows, columns):
    kernels, numbers, turn = compiled_kernels(), values(rows, columns), rotation_of(columns, 2)
    assert kernels.name == "numba"
    found, expected = np.empty_like(numbers), rotate_rows(numbers, turn)
    kernels.rotate(numbers, turn, found)
    assert found.tobytes() == expected.tobytes()
    for turned in (kernels.rotate_columns, rotate_columns):
        other = numbers.T.copy()
        turned(other, turn)
        assert np.ascontiguousarray(other.T).tobytes() == expected.tobytes()


def test_rows_of_a_product_of_rotated_operands_are_those_of_the_plain_ones():
    x, w = Literal.of(values(5, 24)), Literal.of(values(7, 24, 1))
    plain = evaluated(x) @ evaluated(w).T
    turned = evaluated(rotate(x, 1, 3)) @ evaluated(rotate(w, 1, 3)).T
    assert np.abs(turned - plain).max() < 1e-5 * np.abs(plain).max()


def test_columns_vectors_and_transposes_turn_alike(stored):
    w = stored(values(24, 10))
    expected = evaluated(rotate(w.transpose(), 1, 3)).T
    assert np.array_equal(evaluated(rotate(w, 0, 3)), expected)
    assert np.array_equal(evaluated(rotate(w, 0, 3).slice(0, 5, 9).slice(1, 2, 7)), expected[5:9, 2:7])
    row = stored(values(24, 10)[:, 4], "b")
    assert np.array_equal(evaluated(rotate(row, 0, 3)), expected[:, 4])
    scales = Literal.of(values(1, 24, 2)[0])
    assert np.array_equal(evaluated(scale_along(w, 0, scales)), evaluated(scale_along(w.transpose(), 1, scales)).T)


def test_slices_and_shards_of_the_other_axis_commute(stored):
    w = stored(values(12, 10))
    for axis, turned in ((1, rotate(w, 1, 0)), (0, rotate(w.transpose(), 0, 0))):
        other = w if axis else w.transpose()
        assert np.array_equal(
            evaluated(rotate(other.slice(1 - axis, 3, 8), axis, 0)), evaluated(turned.slice(1 - axis, 3, 8))
        )
        placed = beneath_shards(other.pad(1 - axis, 15).shard(1 - axis, 3), axis, lambda part: rotate(part, -1, 0))
        if axis:
            assert placed.text() == turned.pad(0, 15).shard(0, 3).text()


def test_what_is_wrong_is_said():
    w = Literal.of(values(6, 10))
    with pytest.raises(ModelError, match=r"takes a vector or matrix of fp32, not FLOAT16\[6, 10\]"):
        rotate(w.cast(DataType.FLOAT16), 1, 0)
    with pytest.raises(ModelError, match=r"has the odd factor 2,053, expected one between 1 and 1,024"):
        rotate(Fill(FLOAT, (3, 4106), 0.0), 1, 0)
    assert not obstacle(5120)
    with pytest.raises(ModelError, match=r"does not scale axis 1 of \[6, 10\]: expected \[10\]"):
        scale_along(w, 1, Literal.of(np.ones(6, np.float32)))
    with pytest.raises(ModelError, match="takes a vector or matrix of fp32 and a vector of fp32"):
        scale_along(w, 1, Literal.of(np.ones(10, np.float16)))
    with pytest.raises(ModelError, match="along which it is sharded or padded"):
        beneath_shards(w.shard(1, 2), 1, lambda part: rotate(part, 1, 0))


def test_text_and_plan_say_all_of_it(tmp_path, stored):
    w, vector = stored(values(6, 10)), stored(values(1, 10)[0], "g")
    turned = rotate(scale_along(w, 1, vector), 1, 5).cast(DataType.FLOAT16).shard(0, 2)
    assert turned.text() == (
        "shard(cast(rotate(scale(w:FLOAT[6, 10], axis=1, g:FLOAT[10]), axis=1, seed=5), FLOAT16), "
        "axis=0, degree=2, segments=1)"
    )
    write_plan(tmp_path / "plan.json", {"w": turned, "c": rotate(w, 0, 1)})
    assert read_plan(tmp_path / "plan.json") == {"w": turned, "c": rotate(w, 0, 1)}


@pytest.mark.parametrize(("old", "new"), [('1, 5], "FLOAT16"', ""), ("5", '"x"'), ("1", "7")])
def test_a_damaged_plan_is_refused(tmp_path, stored, old, new):
    path = tmp_path / "plan.json"
    write_plan(path, {"w": rotate(stored(values(6, 10)), 1, 5)})
    plan = json.loads(path.read_text())
    kind, dtype, shape, operand, along, seed = plan["weights"]["w"]
    damaged = {"5": (along, new.strip('"')), "1": (int(new) if new.isdigit() else along, seed)}.get(old, (along, -1))
    plan["weights"]["w"] = [kind, dtype, shape, operand, *damaged]
    path.write_text(json.dumps(plan))
    with pytest.raises(ModelError, match=r"Rotate has seed|axis|not a weight plan"):
        read_plan(path)


def layers(stored):
    """Weights as `rotate` and `smooth` make them, of 16 bits: readers, writers, codes, shards, and what is odd."""

    def wide(rows, columns, name):
        return stored(values(rows, columns).astype(ml_dtypes.bfloat16), name).cast(FLOAT)

    norm = stored(values(1, 40)[0], "norm")
    reader = rotate(scale_along(wide(70, 40, "reader"), 1, norm), 1, 0).cast(DataType.FLOAT16)
    writer = rotate(wide(40, 70, "writer"), 0, 0).cast(DataType.FLOAT16)
    turned = rotate(wide(40, 70, "turned").transpose(), 1, 0)
    up = scale_along(wide(70, 40, "up"), 0, Literal.of(values(1, 70)[0]))
    found = {"reader": reader, "writer": writer, "turned": turned, "up": up, "bias": rotate(norm, 0, 0)}
    for name, weight in (("reader", reader), ("writer", writer), ("up", up)):
        codes, scales = weight.pad(0, 72).shard(0, 2).quantize()
        found |= {f"{name}.codes": codes, f"{name}.scales": scales}
    codes, scales = writer.shard(1, 2).quantize()
    found |= {"writer.rows.codes": codes, "writer.rows.scales": scales, "writer.turned": writer.transpose()}
    found |= {"reader.turned": reader.transpose(), "up.turned": up.transpose(), "part": reader.slice(0, 9, 23)}
    return found | {"packed": writer.pack(16, 4), "by.columns": reader.quantize(1)[0]}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arena_bytes", [0, 1 << 16, 1 << 22])
def test_every_way_of_writing_gives_what_the_evaluator_gives(tmp_path, stored, monkeypatch, compiled, arena_bytes):
    monkeypatch.setattr(row_kernels, "COMPILED_FROM", 0 if compiled else 1 << 60)
    monkeypatch.setattr(write_weights, "_THREADS_FROM", 0)
    weights = layers(stored)
    files = [WeightFile(tmp_path / str(rank), weights, rank) for rank in range(2)]
    report = write_weight_files(files, StreamOptions(workers=2, arena_bytes=arena_bytes))
    assert report.kernels == ("numba" if compiled else "numpy")
    for file in files:
        data = file.path.read_bytes()
        for name, offset in file.layout.offsets.items():
            expected = evaluated(weights[name], file.rank)
            assert data[offset : offset + expected.nbytes] == expected.tobytes(), name


def test_bases_of_rotated_weights_are_read_once(tmp_path, stored):
    weights = layers(stored)
    groups = schedule([WeightFile(tmp_path / str(rank), weights, rank) for rank in range(2)])
    bases = {next(source.name for source in group.base.sources()): group for group in groups}
    assert not bases["reader"].is_boxed
    assert not bases["up"].is_boxed
    held = next(group for group in groups if isinstance(group.base, Rotate) and group.base.by_columns)
    assert not held.is_boxed
    assert {output.name for output in held.outputs} >= {"writer", "writer.codes", "writer.rows.codes", "packed"}


def test_too_little_memory_for_a_held_matrix_is_said(tmp_path, stored):
    weight = rotate(stored(values(1 << 10, 1 << 14)), 0, 0)
    with pytest.raises(UsageError, match=r"is too little: writing these weights takes \d+ MiB at least"):
        write_weight_files([WeightFile(tmp_path / "w", {"w": weight})], StreamOptions(memory=200 << 20))


def test_chunks_of_a_held_matrix_do_not_compute_it_anew(stored, monkeypatch):
    weight = rotate(stored(values(64, 48)), 0, 0)
    expected = evaluated(weight)
    with Evaluator(chunk_bytes=2048) as evaluator:
        chunks = list(evaluator.chunks(weight))
        assert evaluator.read_bytes == weight.nbytes
    assert len(chunks) > 4
    assert np.array_equal(np.concatenate(chunks), expected)
    assert weight_digest(weight)


def test_a_scaling_of_rows_keeps_its_place_behind_a_slice(tmp_path, stored):
    """Row i of the slice is scaled by number i of the vector, not by that of the row it was cut from."""
    part = scale_along(stored(values(12, 10)).slice(0, 4, 9), 0, Literal.of(np.arange(1, 6, dtype=np.float32)))
    assert isinstance(part, ScaleAlong)
    file = WeightFile(tmp_path / "w", {"w": part})
    write_weight_files([file])
    expected = values(12, 10)[4:9] * np.arange(1, 6, dtype=np.float32)[:, None]
    offset = file.layout.offsets["w"]
    assert file.path.read_bytes()[offset : offset + expected.nbytes] == expected.tobytes()
