"""GPTQ's codes of both families: verified against themselves in onnxruntime and compiled; equal greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import passopt
from passopt.generation.loop import generate
from passopt.generation.open_engine import open_engine
from passopt.generation.sampling import Sampling
from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.serialization.model_files import load_model, model_path
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.cache_inputs import empty_cache

PROMPTS = ("The lexical structure of", "If the statement is not found, then the name")
NEW = 24


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What onnxruntime finds most likely, step by step."""
    model = load_model(model_path(folder))
    session = Session(model, threads=1)
    cache = dict(empty_cache(model))
    found: list[int] = []
    fed = list(prompt)
    while len(found) < count:
        total = len(prompt) + len(found)
        feeds = {
            "input_ids": np.array([fed]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(fed), total)[None],
        }
        outputs = session.run({**feeds, **cache})
        found.append(int(outputs.pop("logits")[0, -1].argmax()))
        cache = {name.replace("present.", "past.", 1): value for name, value in outputs.items()}
        fed = [found[-1]]
    return found


@pytest.fixture
def quantised(family: Path, root: Path, tmp_path: Path) -> Path:
    passopt.calibrate(family, tmp_path / "calib", data=str(root / "text.txt"), nsamples=24, seqlen=64)
    passopt.run(family, f"baichuan2,int8{{from={tmp_path / 'calib'}}}", tmp_path / "quantised")
    return tmp_path / "quantised"


def test_codes_by_gptq_are_verified_and_generate_the_same_compiled(
    family: Path, root: Path, quantised: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tvm")
    report = passopt.verify(family, quantised, text=root / "text.txt", max_tokens=1024)
    assert report.ok
    assert {"own codes" in row.comparison for row in report.rows} == {True, False}
    compiled = passopt.compile(quantised, tmp_path / "compiled").output
    assert passopt.verify(family, compiled, text=root / "text.txt", max_tokens=1024).ok
    assert passopt.verify(quantised, compiled).ok
    tokenizer = load_tokenizer(compiled)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found = generate(open_engine(compiled), prompts, Sampling(), max_new_tokens=NEW)
    for prompt, row in zip(prompts, found.rows, strict=True):
        assert list(row.ids) == greedy(quantised, prompt, len(row.ids))


def test_ranks_of_a_calibrated_model_are_verified(family: Path, root: Path, tmp_path: Path) -> None:
    passopt.calibrate(family, tmp_path / "calib", data=str(root / "text.txt"), nsamples=24, seqlen=64)
    pipeline = f"baichuan2,tp{{degree=2,pad=true}},int8{{from={tmp_path / 'calib'}}}"
    passopt.run(family, pipeline, tmp_path / "ranks")
    report = passopt.verify(family, tmp_path / "ranks", text=root / "text.txt", max_tokens=1024)
    assert report.ok
    assert any("own codes" in row.comparison for row in report.rows)
