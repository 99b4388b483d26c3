"""Kept predictions of a reference: used if they are the right ones, gone on with after a stop, never stale."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import passopt
from passopt.evaluation import evaluate as loop
from passopt.evaluation import reference_store
from passopt.evaluation.graph_engine import GraphEngine
from passopt.evaluation.reference_store import open_store
from passopt.ir.errors import ModelError, UsageError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each call of an engine, but for the two tokens by which a model is looked at."""
    calls: list[int] = []
    forward = GraphEngine.forward

    def counted(self, ids, mask):
        calls.append(np.asarray(ids).shape[1])
        return forward(self, ids, mask)

    monkeypatch.setattr(GraphEngine, "forward", counted)
    return calls


def evaluated(lab, cache: Path, **options):
    given = {"text": lab.text, "window": 40, "max_tokens": 200, **options}
    return passopt.evaluate([lab.one, lab.int8], cache=cache, **given)


def store_of(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_the_reference_runs_once(lab, tmp_path: Path, runs: list[int]):
    first = evaluated(lab, tmp_path / "kept")
    assert runs == [2, *[39] * 5] * 2
    runs.clear()
    assert evaluated(lab, tmp_path / "kept").to_json() == first.to_json()
    assert runs == [2, *[39] * 5]  # the candidate alone
    assert evaluated(lab, tmp_path / "other").to_json() == first.to_json()


@pytest.mark.parametrize(
    "options", [{"window": 30}, {"stride": 20}, {"max_tokens": 160}, {"cache_dtype": "fp32"}, {"bos": True}]
)
def test_other_windows_tokens_or_dtypes_are_kept_apart(lab, tmp_path: Path, options):
    evaluated(lab, tmp_path / "kept")
    evaluated(lab, tmp_path / "kept", **options)
    same = options == {"bos": True}  # this tokenizer puts nothing before a text
    assert len(list((tmp_path / "kept").iterdir())) == (1 if same else 2)


def test_what_a_model_computes_decides_and_not_where_it_lies(lab, tmp_path: Path, runs: list[int]):
    for name in ("moved", "changed"):
        shutil.copytree(lab.one, tmp_path / name)
    weights = tmp_path / "changed" / "weights.safetensors"
    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1  # one bit, with size and times as before
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    given = {"text": lab.text, "window": 40, "max_tokens": 200, "cache": tmp_path / "kept"}
    whole = passopt.evaluate([lab.one, lab.int8], **given)
    runs.clear()
    moved = passopt.evaluate([tmp_path / "moved", lab.int8], **given)
    assert moved.models[1] == whole.models[1]
    assert len(runs) == 6
    runs.clear()
    passopt.evaluate([tmp_path / "changed", lab.int8], **given)
    assert len(runs) == 12
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UsageError])
def test_an_interrupted_run_goes_on(lab, tmp_path: Path, runs: list[int], monkeypatch, kind):
    whole = evaluated(lab, tmp_path / "whole")
    forward = GraphEngine.forward

    def stopping(self, ids, mask):
        if len(runs) == 4:
            raise kind("stop")
        return forward(self, ids, mask)

    runs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(GraphEngine, "forward", stopping)
        with pytest.raises(kind) as raised:
            evaluated(lab, tmp_path / "kept")
    if kind is KeyboardInterrupt:
        assert f"3 of 5 windows of the reference are kept in {store_of(tmp_path / 'kept')}" in str(raised.value)
    runs.clear()
    assert evaluated(lab, tmp_path / "kept").to_json() == whole.to_json()
    assert runs == [2, *[39] * 2, 2, *[39] * 5]
    same = [(store_of(tmp_path / name) / "log_probabilities.bin").read_bytes() for name in ("whole", "kept")]
    assert same[0] == same[1]


def test_a_window_without_its_line_and_half_a_line_are_written_again(lab, tmp_path: Path, runs: list[int]):
    whole = evaluated(lab, tmp_path / "kept")
    journal = store_of(tmp_path / "kept") / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], lines[3][:30]]))
    runs.clear()
    assert evaluated(lab, tmp_path / "kept").to_json() == whole.to_json()
    assert runs == [2, *[39] * 2, 2, *[39] * 5]
    assert journal.read_text().splitlines() == lines


def test_what_is_cut_off_is_written_again(lab, tmp_path: Path, runs: list[int]):
    whole = evaluated(lab, tmp_path / "kept")
    logs = store_of(tmp_path / "kept") / "log_probabilities.bin"
    os.truncate(logs, logs.stat().st_size - 1)
    runs.clear()
    assert evaluated(lab, tmp_path / "kept").to_json() == whole.to_json()
    assert runs == [2, 39, 2, *[39] * 5]


@pytest.mark.parametrize("name", ["log_probabilities.bin", "tokens.bin"])
def test_declines_what_was_changed(lab, tmp_path: Path, name: str):
    evaluated(lab, tmp_path / "kept")
    path = store_of(tmp_path / "kept") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ModelError, match="what is kept of window 2 is not what was written; remove the folder"):
        evaluated(lab, tmp_path / "kept")


def test_declines_an_edited_key(lab, tmp_path: Path):
    evaluated(lab, tmp_path / "kept")
    path = store_of(tmp_path / "kept") / "reference.json"
    path.write_text(path.read_text().replace('"window": 40', '"window": 41'))
    with pytest.raises(ModelError, match="is of another reference, or was edited"):
        evaluated(lab, tmp_path / "kept")
    path.write_text("{")
    with pytest.raises(ModelError, match="is of another reference, or was edited"):
        evaluated(lab, tmp_path / "kept")


def test_declines_a_store_that_is_in_use_or_that_cannot_be(lab, tmp_path: Path):
    with open_store(tmp_path, {"a": 1}, [2], 3, "fp16") as store:
        assert not store.is_complete
        with (
            pytest.raises(UsageError, match="another passopt uses these"),
            open_store(tmp_path, {"a": 1}, [2], 3, "fp16"),
        ):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used as `cache`"):
        evaluated(lab, tmp_path / "file")
    with pytest.raises(ModelError, match="in memory has no files"):
        passopt.evaluate(
            [passopt.load(lab.one).ir], tokenizer=lab.one, text=lab.text, window=40, cache=tmp_path / "new"
        )


def test_declines_a_full_disk_before_anything_runs(lab, tmp_path: Path, monkeypatch, runs: list[int]):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(reference_store.shutil, "disk_usage", lambda path: usage._replace(free=1 << 26))
    with pytest.raises(UsageError, match=r"take 15,600 bytes more, the disk has 67,108,864 free.*`max_tokens`"):
        evaluated(lab, tmp_path / "kept")
    assert not runs


def test_without_a_cache_nothing_stays(lab, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(loop.tempfile, "tempdir", str(tmp_path))
    passopt.evaluate([lab.one, lab.int8], text=lab.text, window=40)
    assert not list(tmp_path.iterdir())


def test_the_key_says_what_it_is_of(lab, tmp_path: Path):
    evaluated(lab, tmp_path / "kept")
    key = json.loads((store_of(tmp_path / "kept") / "reference.json").read_text())
    assert {"model", "tokens", "window", "stride", "dtype", "vocab", "runs_in", "passopt"} <= key.keys()
