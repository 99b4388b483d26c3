"""The fusions find everything in graphs of the torchscript exporter, whose lengths are all computed in the graph."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path

import pytest

from passopt.frontends.checkpoint import open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions
from passopt.ir.weights.expressions import DataType
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checkpoints import ROTARY, make_checkpoint
from passopt.testing.families import make_family_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pipeline", "attentions", "rotary"),
    [("gpt2", "fuse", 2, 0), ("opt", "fuse", 2, 0), ("bloom", "fuse", 2, 0), ("baichuan", "baichuan2", 3, 6)],
)
def test_everything_is_fused(family: str, pipeline: str, attentions: int, rotary: int, tmp_path: Path) -> None:
    """`make drift` looks at all families; these are spelled with lengths that only the graph computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "baichuan":
            make_checkpoint(tmp_path / family, ROTARY, trained=False)
        else:
            make_family_checkpoint(tmp_path / family, family)
    (tmp_path / "scratch").mkdir()
    options = ExportOptions(dtype=DataType.FLOAT, exporter="torchscript", opset=18, trust_remote_code=True)
    model = export_graph(open_checkpoint(tmp_path / family), options, tmp_path / "scratch")
    passes = resolve(f"fold-constants,dead-code,{pipeline}")
    run_passes(model, passes.passes)
    kinds = collections.Counter(node.op_type for node in model.graph)
    assert kinds["Attention"] + kinds["AlibiAttention"] == attentions
    assert kinds["RotaryEmbedding"] == rotary
