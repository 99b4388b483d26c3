"""int8-cache on both exported families: in onnxruntime, compiled, in ranks, and what it takes of memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passopt.cli import main
from passopt.targets.tvm.compiled_folder import CacheLayout, Library, read_library

READY = "baichuan2,fold-norm-head"


def verified(reference: Path, output: Path, root: Path, capsys) -> list[dict[str, object]]:
    capsys.readouterr()
    text = str(root / "text.txt")
    assert main(["verify", str(reference), str(output), "--json", "--text", text, "--max-tokens", "2000"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "ok: lossy as declared (int8 cache)"
    rows: list[dict[str, object]] = report["rows"]
    return rows


@pytest.mark.parametrize("keys", ["channel", "token"])
def test_predictions_hardly_move(family: Path, root: Path, tmp_path: Path, capsys, keys: str):
    passes = f"{READY},int8-cache{{keys={keys}}}"
    assert main(["run", str(family), "--passes", passes, "-o", str(tmp_path / "out")]) == 0
    rows = verified(family, tmp_path / "out", root, capsys)
    (divergence,) = [row["error"] for row in rows if row["output"] == "KL mean"]
    assert divergence < 5e-4


def test_compiled_reads_the_codes_of_the_graph(family: Path, root: Path, tmp_path: Path, capsys):
    pytest.importorskip("tvm")
    from passopt.targets.tvm.engine.engine import Engine

    graph, output = tmp_path / "graph", tmp_path / "out"
    assert main(["run", str(family), "--passes", f"{READY},int8-cache", "-o", str(graph)]) == 0
    assert main(["compile", str(graph), "-o", str(output)]) == 0
    rows = verified(graph, output, root, capsys)
    (divergence,) = [row["error"] for row in rows if row["output"] == "KL mean"]
    assert divergence < 1e-6
    library = read_library(output)
    assert isinstance(library, Library)
    layout = library.cache
    assert (layout.dtype, layout.codes_of, layout.kind) == ("int8", "fp32", "in-place")
    engine = Engine.load(output, batch=2, capacity=40, threads=1)
    tensors = engine._past.tensors
    assert [str(tensor.dtype) for tensor in tensors[:4]] == ["int8", "int8", "float32", "float32"]
    held = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors)
    assert held == engine.cache_bytes == layout.nbytes(2, 40)
    # Prefill with padding, a chunk and single steps give what one prefill gives.
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(3, 500, (2, 14)), np.ones((2, 14), np.int64)
    mask[1, :5] = 0
    whole = engine.forward(ids, mask)
    engine.reset()
    steps = [engine.forward(ids[:, a:b], mask[:, :b]) for a, b in ((0, 9), (9, 12), (12, 13), (13, 14))]
    found = np.concatenate(steps, axis=1)
    assert np.abs(found - whole)[mask > 0].max() < 1e-4 * np.abs(whole).max()


def test_ranks_share_the_heads(family: Path, root: Path, tmp_path: Path, capsys):
    pytest.importorskip("tvm")
    output = tmp_path / "out"
    assert main(["compile", str(family), "--passes", f"{READY},int8-cache,tp", "-o", str(output)]) == 0
    verified(family, output, root, capsys)


def test_memory_of_a_13b_is_half_of_fp16():
    codes, halves = (CacheLayout(40, 40, 128, dtype) for dtype in ("int8", "fp16"))
    assert codes.nbytes(1, 4096) / halves.nbytes(1, 4096) == pytest.approx(0.5, abs=0.02)


def test_a_graph_without_a_fused_attention_is_refused(family: Path, tmp_path: Path, capsys):
    assert main(["run", str(family), "--passes", "int8-cache", "-o", str(tmp_path / "out")]) == 3
    assert "expected one fused attention that reads past.0.key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
