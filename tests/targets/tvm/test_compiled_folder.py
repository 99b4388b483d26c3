"""library.json: written and read back, and refused if any part of it is not what it should be."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError
from passopt.targets.folders.digests import root_digest
from passopt.targets.tvm.compiled_folder import (
    CacheLayout,
    CodeFile,
    Library,
    Logits,
    RankFolders,
    WeightsFile,
    read_library,
)

CACHE = CacheLayout(layers=3, kv_heads=2, head_dim=5, dtype="fp16")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    (tmp_path / "lib.so").write_bytes(b"code")
    save_file({"embed": np.ones((3, 2), np.float32), "head": np.ones(7, np.int8)}, tmp_path / "weights.safetensors")
    digests = {"embed": "a" * 64, "head": "b" * 64}
    return Library(
        passopt="0.1.0",
        target="llvm",
        mcpu="znver3",
        isa="avx2",
        features=("avx2", "fma"),
        library=CodeFile.of(tmp_path / "lib.so"),
        weights=WeightsFile.of(tmp_path / "weights.safetensors", digests),
        function="main",
        inputs=("input_ids", "attention_mask", "position_ids"),
        parameters=("head", "embed"),
        cache=CACHE,
        logits=Logits("all", 520),
        max_positions=None,
        rank=0,
        degree=1,
        passes="baichuan2,int8",
    )


def test_what_was_written_is_read_back(library: Library, tmp_path: Path):
    library.write(tmp_path)
    assert read_library(tmp_path) == library
    assert library.weights.nbytes == (tmp_path / "weights.safetensors").stat().st_size


def test_folders_of_ranks_are_read_back(tmp_path: Path):
    folders = RankFolders(2, ("rank0", "rank1"), ("a" * 64, "b" * 64))
    folders.write(tmp_path)
    assert read_library(tmp_path) == folders
    body = json.loads(folders.text())
    (tmp_path / "library.json").write_text(json.dumps(body | {"roots": ["a" * 64]}))
    with pytest.raises(ModelError, match="1 digests of weights at degree 2"):
        read_library(tmp_path)


def test_bytes_of_the_cache_are_those_of_whole_blocks():
    assert CACHE.rounded(33) == 48
    assert CACHE.nbytes(4, 33) == 2 * 3 * 4 * 2 * 48 * 5 * 2
    functional = dataclasses.replace(CACHE, kind="functional", dtype="fp32")
    assert functional.nbytes(4, 33) == 2 * 3 * 4 * 2 * 33 * 5 * 4


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("version", 9, "version 9"),
        ("features", "avx2", "features is no list"),
        ("features", [1], "features is 1, expected str"),
        ("rank", True, "rank is True, expected int"),
        ("rank", 1, "rank 1 of 1"),
        ("max_positions", "many", "max_positions is 'many'"),
        ("max_positions", -3, "max_positions is -3"),
        ("inputs", ["attention_mask", "position_ids"], "inputs are"),
        ("inputs", ["input_ids", "input_ids"], "inputs are"),
        ("inputs", ["input_ids", "attention_mask", "pixels"], "inputs are"),
        ("parameters", ["embed", "tail"], "parameter 'tail'"),
        ("library.file", "../lib.so", "not beside"),
        ("library.blake3", None, "library.blake3 is None"),
        ("weights", [], "weights is no object"),
        ("weights.root", "0", "root digest"),
        ("weights.tensors", ["embed"], "weights.tensors is no object"),
        ("cache.dtype", "int4", "cache.dtype is 'int4', expected one of 'fp32', 'fp16', 'bf16'"),
        ("cache.layers", 0, "layers is 0"),
        ("cache.depth", 3, "unknown cache.depth"),
    ],
)
def test_damage_is_told(library: Library, tmp_path: Path, key: str, value: object, says: str):
    body = json.loads(library.text())
    *outer, last = key.split(".")
    entry = body
    for part in outer:
        entry = entry[part]
    entry[last] = value
    (tmp_path / "library.json").write_text(json.dumps(body))
    with pytest.raises(ModelError) as caught:
        read_library(tmp_path)
    assert says in str(caught.value)
    assert "ompile the model again" in str(caught.value)


def test_a_missing_field_is_named(library: Library, tmp_path: Path):
    body = json.loads(library.text())
    del body["logits"]["vocab"]
    (tmp_path / "library.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match=r"lacks logits\.vocab"):
        read_library(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 3, "ranks": ["rank0"], "degree": 2}'])
def test_other_json_is_damage(tmp_path: Path, text: str):
    (tmp_path / "library.json").write_text(text)
    with pytest.raises(ModelError, match="is damaged"):
        read_library(tmp_path)


def test_a_folder_without_library_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match="passopt compile"):
        read_library(tmp_path)


def test_a_library_that_could_not_be_read_is_not_written(library: Library, tmp_path: Path):
    wrong = dataclasses.replace(library, parameters=("nothing",))
    with pytest.raises(ValueError, match="nothing"):
        wrong.write(tmp_path)
    assert root_digest(library.weights.tensors) == library.weights.root


def test_another_description_of_the_same_code_is_refused(library: Library, tmp_path: Path):
    library.write(tmp_path)
    path = tmp_path / "library.json"
    path.write_text(path.read_text().replace('"mcpu": "', '"mcpu": "x'))
    with pytest.raises(ModelError, match="its digest is not that of its content"):
        read_library(tmp_path)
