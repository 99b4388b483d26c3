"""Compiled ranks in processes of their own against the unsplit model, compiled or joined in onnxruntime."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from passopt.cli import main
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import decoder_of
from passopt.targets.folders.digests import root_digest
from passopt.targets.onnxruntime.joined_ranks import join_ranks, load_any, rank_models
from passopt.targets.onnxruntime.session import Session

pytest.importorskip("tvm")
from passopt.targets.tvm.compiled_folder import Library, read_library
from passopt.targets.tvm.engine import available_memory
from passopt.targets.tvm.engine.engine import Engine
from passopt.targets.tvm.engine.rank_engine import RankEngine

PROMPTS = [[5, 301, 17, 44, 9, 12], [7, 8, 300]]
TP2, TP3 = "tp", "tp{degree=3,pad=true}"
DYNAMIC = "int8{activations=dynamic}"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """`compiled(model, passes)`: (the folder of models, the compiled folder), each made once."""
    made: dict[tuple[Path, str], tuple[Path, Path]] = {}

    def make(model: Path, passes: str) -> tuple[Path, Path]:
        if (model, passes) not in made:
            folder = tmp_path_factory.mktemp("compiled")
            assert main(["run", str(model), "--passes", f"baichuan2,{passes}", "-o", str(folder / "models")]) == 0
            assert main(["compile", str(folder / "models"), "-o", str(folder / "library")]) == 0
            made[model, passes] = folder / "models", folder / "library"
        return made[model, passes]

    return make


def generated(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[list[int]]:
    prompts = [part for ids in PROMPTS for part in ("--prompt", " ".join(map(str, ids)))]
    capsys.readouterr()
    options = ["--ids", "--greedy", "--max-new-tokens", "24", "--json"]
    assert main(["generate", str(folder), *prompts, *options]) == 0
    return [row["ids"] for row in json.loads(capsys.readouterr().out)["rows"]]


@pytest.mark.parametrize("passes", [TP2, TP3])
def test_ranks_generate_what_the_unsplit_model_does(family: Path, compiled, capsys, passes: str):
    expected = generated(compiled(family, "fold-norm-head")[1], capsys)
    assert all(len(ids) == 24 for ids in expected)
    assert generated(compiled(family, passes)[1], capsys) == expected


@pytest.mark.parametrize("passes", [TP2, TP3])
def test_logits_are_those_of_the_unsplit_model(family: Path, compiled, passes: str):
    """Prefill with left padding, a chunk, a step; after a reset and in other room again."""
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(3, 500, (2, 14)), np.ones((2, 14), np.int64)
    mask[1, :5] = 0
    with RankEngine.load(compiled(family, passes)[1], batch=2, capacity=20, threads=2) as ranks:
        one = Engine.load(compiled(family, "fold-norm-head")[1], batch=2, capacity=20, threads=1)
        assert (ranks.vocab, ranks.max_positions, ranks.capacity) == (one.vocab, one.max_positions, one.capacity)
        assert ranks.cache_bytes >= one.cache_bytes
        for _ in range(2):
            for start, stop in ((0, 9), (9, 13), (13, 14)):
                pair = [each.forward(ids[:, start:stop], mask[:, :stop]) for each in (one, ranks)]
                assert np.abs(pair[0] - pair[1]).max() < 1e-5 * np.abs(pair[0]).max()
            assert ranks.past == one.past == 14
            ranks.reset()
            one.reset()
        ranks.allocate(1, 30)
        one.allocate(1, 30)
        pair = [each.forward(ids[:1], mask[:1]) for each in (one, ranks)]
        assert np.abs(pair[0] - pair[1]).max() < 1e-5 * np.abs(pair[0]).max()


@pytest.mark.parametrize("passes", [f"{TP2},{DYNAMIC}", f"{DYNAMIC},{TP3}"])
def test_int8_ranks_equal_the_joined_graph(family: Path, compiled, passes: str):
    """Every rank quantises its own part of a row, in onnxruntime as well; a code may fall on either side of a half."""
    models, library = compiled(family, passes)
    whole = load_any(models)
    reference = decoder_of(load_any(family))
    joined = join_ranks(rank_models(whole), heads=reference.kv_heads)
    ids = np.random.default_rng(4).integers(3, 500, (2, 12))
    mask = np.ones_like(ids)
    cache = np.zeros((2, reference.kv_heads, 0, reference.head_dim), np.float32)
    names = [str(value.name) for value in joined.graph.inputs]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.cumsum(mask, axis=1) - 1}
    feeds |= {name: cache for name in names if name.startswith("past.")}
    expected = Session(joined).run(feeds)["logits"]
    with RankEngine.load(library, batch=2, capacity=12, copy_weights=True) as engine:
        maps = "".join(Path(f"/proc/{child.pid}/maps").read_text() for child in multiprocessing.active_children())
        assert "lib.so" in maps
        assert "weights.safetensors" not in maps
        found = engine.forward(ids, mask)
        again = [engine.forward(ids, mask) for _ in range(3) if engine.reset() is None]
    assert np.abs(found - expected).max() < 3e-2 * np.abs(expected).max()
    assert np.median(np.abs(found - expected)) < 1e-4 * np.abs(expected).max()
    for other in again:
        np.testing.assert_array_equal(other, found)


def test_copies_must_fit_together_and_capacity_be_right_before_a_rank_starts(rotary: Path, compiled, monkeypatch):
    library = compiled(rotary, TP2)[1]
    sizes = [read_library(library / name).weights.nbytes for name in read_library(library).ranks]
    monkeypatch.setattr(available_memory, "available_memory", lambda: sum(sizes) - 1)
    with pytest.raises(UsageError, match=f"no memory for a copy of {sum(sizes):,} bytes"):
        RankEngine.load(library, capacity=16, copy_weights=True)
    with pytest.raises(UsageError, match="both must be at least 1"):
        RankEngine.load(library, capacity=0)
    assert not multiprocessing.active_children()


def test_what_all_ranks_refuse_leaves_them_as_they_are(rotary: Path, compiled):
    with RankEngine.load(compiled(rotary, TP2)[1], capacity=16) as engine:
        first = engine.forward([[3, 4, 5]], [[1, 1, 1]])
        with pytest.raises(UsageError, match="token id 9999 is outside of the vocabulary"):
            engine.forward([[9999]], [[1, 1, 1, 1]])
        with pytest.raises(UsageError, match="the caches hold 16"):
            engine.forward(np.ones((1, 14), int), np.ones((1, 17), int))
        assert engine.past == 3
        engine.reset()
        np.testing.assert_array_equal(engine.forward([[3, 4, 5]], [[1, 1, 1]]), first)


def rank_process(engine: RankEngine, rank: int) -> int:
    """The process id of a rank."""
    return int(engine._group._processes[rank].pid)


def test_a_killed_rank_is_an_error_at_once(rotary: Path, compiled):
    folder = compiled(rotary, TP2)[1]
    with RankEngine.load(folder, capacity=16) as engine:
        engine.forward([[3]], [[1]])
        others = [rank_process(engine, rank) for rank in (0, 1)]
        os.kill(others[1], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(
            ModelError, match=r"rank 1 of 2 was killed by signal 9 during forward; the other ranks were"
        ):
            engine.forward([[4]], [[1, 1]])
        assert time.monotonic() - start < 10
        for _ in range(2):
            with pytest.raises(ModelError, match="signal 9 .*; load the model again") as found:
                engine.forward([[4]], [[1, 1]])
            assert str(found.value).count(str(folder)) == 1
        assert not any(Path(f"/proc/{process}").exists() for process in others)


@pytest.mark.parametrize(("stopped", "length"), [((1,), 1), ((0, 1), 1), ((1,), 9000)])
def test_a_hung_rank_costs_the_timeout(rotary: Path, compiled, stopped, length):
    """A message of 9000 ids is larger than a pipe, which a stopped rank does not read."""
    with RankEngine.load(compiled(rotary, TP2)[1], capacity=16, timeout=2.0) as engine:
        processes = [rank_process(engine, rank) for rank in (0, 1)]
        for rank in stopped:
            os.kill(processes[rank], signal.SIGSTOP)
        ids = np.full((1, length), 4)
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"rank (0, )?1 (did not come to collective .* within 2 s|gave no sign)"):
            engine.forward(ids, np.ones_like(ids))
        assert 2 <= time.monotonic() - start < 3
        assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_ranks_of_two_runs_are_refused(rotary: Path, alibi: Path, compiled, tmp_path: Path):
    library = compiled(rotary, TP2)[1]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "library.json").write_text((library / "library.json").read_text())
    (mixed / "rank0").symlink_to(library / "rank0")
    (mixed / "rank1").symlink_to(compiled(alibi, TP2)[1] / "rank1")
    with pytest.raises(ModelError, match="rank1: has other .* than rank0; they are of two runs"):
        RankEngine.load(mixed)
    (mixed / "rank1").unlink()
    (mixed / "rank1").symlink_to(library / "rank0")
    with pytest.raises(ModelError, match=r"rank1: is rank 0 of 2, expected 1 of 2"):
        RankEngine.load(mixed)


def test_a_rank_with_weights_of_another_run_is_refused(rotary: Path, compiled, tmp_path: Path):
    """Of another checkpoint of the same shape: code and passes are equal."""
    mixed = tmp_path / "mixed"
    shutil.copytree(compiled(rotary, TP2)[1], mixed)
    library = read_library(mixed / "rank1")
    assert isinstance(library, Library)
    tensors = {**library.weights.tensors, library.parameters[0]: "0" * 64}
    weights = dataclasses.replace(library.weights, tensors=tensors, root=root_digest(tensors))
    dataclasses.replace(library, weights=weights).write(mixed / "rank1")
    with pytest.raises(ModelError, match="rank1: has other weights than were compiled with the other ranks"):
        RankEngine.load(mixed)


def test_caches_of_all_ranks_together_must_fit(rotary: Path, compiled, monkeypatch):
    with RankEngine.load(compiled(rotary, TP2)[1], capacity=16) as engine:
        needed = 2 * engine.library.cache.nbytes(3, 32)
        engine.forward([[1]], [[1]])
        held = 2 * engine.library.cache.nbytes(1, 1)  # of what was allocated, as much as was written
        monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - held - 1)
        with pytest.raises(UsageError, match=f"no memory for caches of {needed:,} bytes"):
            engine.allocate(3, 32)
        engine.forward([[1]], [[1, 1]])  # as it was
        monkeypatch.setattr("passopt.targets.tvm.engine.available_memory.available_memory", lambda: needed - held)
        engine.allocate(3, 32)
        assert engine.cache_bytes == needed


def test_all_ranks_tell_what_they_read(rotary: Path, compiled):
    folder, read = compiled(rotary, TP2)[1], []
    with RankEngine.load(folder, capacity=16, verify_weights=True, progress=read.append) as engine:
        total = sum(path.stat().st_size for path in folder.glob("rank*/weights.safetensors"))
        assert 0.9 * total < sum(read) < total  # but for headers and alignment
        assert min(read) > 0
        engine.forward([[1]], [[1]])


def test_a_rank_that_cannot_load_says_why(rotary: Path, compiled, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(compiled(rotary, TP2)[1], broken)
    (broken / "rank1" / "lib.so").write_bytes(b"no library")
    with pytest.raises(ModelError, match=r"rank1/lib.so: is not the library that was compiled"):
        RankEngine.load(broken)


def test_a_rank_alone_is_no_model(rotary: Path, compiled):
    with pytest.raises(ModelError, match="is rank 0 of 2; alone it is no whole model"):
        Engine.load(compiled(rotary, TP2)[1] / "rank0")
    with pytest.raises(ModelError, match="holds one library, no ranks"):
        RankEngine.load(compiled(rotary, TP2)[1] / "rank0")
