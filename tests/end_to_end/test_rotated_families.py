"""`rotate` on families of stock code: grouped heads, biases and tied embeddings, whole and on two ranks."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from passopt.frontends.checkpoint import open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions
from passopt.ir.weights.expressions import DataType
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.testing.families import make_family_checkpoint
from passopt.verification.verify import VerifyOptions, verify


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_rotated_family_computes_the_same(tmp_path: Path, family: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = open_checkpoint(make_family_checkpoint(tmp_path / "checkpoint", family))
    (tmp_path / "scratch").mkdir()
    original = export_graph(checkpoint, ExportOptions(dtype=DataType.FLOAT), tmp_path / "scratch")
    model = original.clone()
    run_passes(model, resolve("fuse,rotate").passes)
    assert verify(original, model, options=VerifyOptions(tolerance=1e-5)).ok
    run_passes(model, resolve("tp{pad=true}").passes)
    assert verify(original, join_ranks(rank_models(model)), options=VerifyOptions(tolerance=1e-5)).ok
