"""weights.plan.json: every expression comes back equal, and a plan moves with the files beside it."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError
from passopt.ir.weights.concat import concat
from passopt.ir.weights.dequantized import dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.packed_codes import pack_codes, unpack_codes
from passopt.ir.weights.plan_file import read_plan, write_plan
from passopt.ir.weights.sources import safetensors_sources

ARRAY = np.arange(60, dtype=np.float32).reshape(6, 10)


@pytest.fixture
def source(tmp_path):
    """A weight in a folder of its own, which can be moved."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": ARRAY}, folder / "w.safetensors")
    return safetensors_sources(folder / "w.safetensors")["w"]


def test_every_expression_comes_back_equal(tmp_path, source):
    codes, scales = source.pad(0, 8, 2).quantize(0)
    weights = {
        "source": source,
        "literal": Literal.of(np.array([[1.5, -2]], np.float16)),
        "fill": Fill(DataType.FLOAT16, (9,), -0.5),
        "scalar": Literal.of(np.array(3)),
        "slice": source.slice(1, 2, 5),
        "concat": concat([source, source.slice(0, 0, 1)], 0),
        "transpose": source.transpose(),
        "cast": source.cast(DataType.BFLOAT16),
        "pad": source.pad(1, 15, 5, float("-inf")),
        "normalized": source.normalize_rows(1e-12),
        "packed": source.quantize()[0].pack(4, 2),
        "sums": source.quantize()[0].row_sums(),
        "codes": codes.shard(0, 2, 2),
        "scales": scales,
        "columns": source.quantize(1)[1],
        "words": pack_codes(source.quantize()[0].slice(1, 0, 8), 4),
        "unpacked": unpack_codes(pack_codes(source.quantize()[0].slice(1, 0, 8), 8), 8),
        "dequantized": dequantized(*source.quantize(1), 1),
        'odd "name"/é': source,
    }
    path = tmp_path / "weights.plan.json"
    write_plan(path, weights)
    found = read_plan(path)
    assert list(found) == list(weights)
    assert found == weights


def test_a_file_is_listed_once(tmp_path, source):
    path = tmp_path / "weights.plan.json"
    write_plan(path, {"a": source, "b": source.transpose()})
    assert len(json.loads(path.read_text())["files"]) == 1


def test_files_beside_the_plan_move_with_it(tmp_path, source):
    folder = tmp_path / "model"
    write_plan(folder / "weights.plan.json", {"w": source.slice(0, 1, 3)})
    shutil.move(folder, tmp_path / "moved")
    weights = read_plan(tmp_path / "moved" / "weights.plan.json")
    with Evaluator() as evaluator:
        assert np.array_equal(evaluator.array(weights["w"]), ARRAY[1:3])


def test_files_elsewhere_stay_where_they_are(tmp_path, source):
    other = tmp_path / "other"
    other.mkdir()
    write_plan(other / "weights.plan.json", {"w": source})
    shutil.move(other, tmp_path / "moved")
    with Evaluator() as evaluator:
        assert np.array_equal(evaluator.array(read_plan(tmp_path / "moved" / "weights.plan.json")["w"]), ARRAY)


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def touch(path):
    os.utime(path, ns=(0, 5))


def rewrite_header(path):
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\1\2\3\4")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, "size changed"),
        (touch, "modification time changed"),
        (rewrite_header, "header changed"),
        (lambda path: path.unlink(), "weight file is missing"),
    ],
)
def test_a_weight_file_that_no_longer_matches_is_an_error(tmp_path, source, change, message):
    path = tmp_path / "model" / "weights.plan.json"
    write_plan(path, {"w": source})
    change(tmp_path / "model" / "w.safetensors")
    with Evaluator() as evaluator, pytest.raises(ModelError, match=message):
        evaluator.array(read_plan(path)["w"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a weight plan"),
        ("[]", "not a weight plan"),
        ('{"version": 2}', "plan version 2, this passopt reads 1"),
        ('{"version": 1, "files": [], "weights": []}', "not a weight plan"),
        ('{"version": 1, "files": [], "weights": {"w": ["Evil", "FLOAT"]}}', "not a weight plan"),
        ('{"version": 1, "files": [], "weights": {"w": ["Source", "FLOAT", [1], "w", 0, 0]}}', "not a weight plan"),
        ('{"version": 1, "files": [], "weights": {"w": ["Literal", "FLOAT"]}}', "not a weight plan"),
        ('{"version": 1, "files": [], "weights": {"w": ["Literal", "NONE", [1], ""]}}', "not a weight plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, message):
    path = tmp_path / "weights.plan.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message) as error:
        read_plan(path)
    assert str(path) in str(error.value)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_plan(tmp_path / "weights.plan.json")
