"""The pipeline `baichuan2` on both trained families: fused, sharded, quantised, each against the exported graph."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

from passopt.cli import main
from passopt.ir.graph.decoder import find_decoder
from passopt.ir.serialization.model_files import load_model
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.joined_ranks import load_any, rank_models
from passopt.verification.verify import VerifyOptions, verify

FUSED = ["baichuan2", "baichuan2,tp", "baichuan2,tp{degree=4,pad=true}", "baichuan2,tp{degree=3,pad=true}"]


def run(model: Path, pipeline: str, output: Path, *options: str) -> Path:
    assert main(["run", str(model), "--passes", pipeline, "-o", str(output), *options]) == 0
    return output


@pytest.mark.parametrize("pipeline", FUSED)
def test_fused_models_and_their_ranks_equal_the_exported_one(family: Path, tmp_path: Path, pipeline: str):
    output = run(family, pipeline, tmp_path / "out")
    report = verify(load_any(family), load_any(output), options=VerifyOptions(tolerance=1e-5))
    assert report.ok, report.to_text()
    scenarios = {row.scenario for row in report.rows}
    assert {"decode with cache", "chunked prefill", "left padding, then decode"} <= scenarios


def test_every_norm_rotary_and_attention_is_one_operator(family: Path):
    model = load_model(family)
    run_passes(model, resolve("baichuan2").passes)
    decoder = find_decoder(model)
    assert decoder is not None
    kinds = collections.Counter(node.op_type for node in model.graph)
    assert kinds["RMSNormalization"] == 2 * decoder.layers + 1
    assert kinds["RotaryEmbedding"] == (2 * decoder.layers if decoder.has_position_ids else 0)
    assert kinds["Attention" if decoder.has_position_ids else "AlibiAttention"] == decoder.layers
    assert not kinds["Softmax"]
    assert not kinds["ReduceMean"]


def test_tables_and_masks_are_computed_once(rotary: Path):
    model = load_model(rotary)
    run_passes(model, resolve("baichuan2").passes)
    attention = [node for node in model.graph if node.op_type == "Attention"]
    embeddings = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len({node.inputs[3] for node in attention}) == 1
    assert len({(node.inputs[1], node.inputs[2]) for node in embeddings}) == 1


def test_a_fused_model_is_left_alone(family: Path):
    model = load_model(family)
    run_passes(model, resolve("baichuan2").passes)
    again = resolve("baichuan2")
    records = run_passes(model, again.passes)
    assert not [record.name for record in records if record.result.modified]


def test_fused_int8_ranks_keep_the_perplexity(root: Path, family: Path, tmp_path: Path, capsys):
    output = run(family, "baichuan2,tp,int8", tmp_path / "out")
    capsys.readouterr()
    text = str(root / "text.txt")
    code = main(["verify", str(family), str(output), "--text", text, "--max-tokens", "1500", "--json"])
    report = json.loads(capsys.readouterr().out)
    (row,) = [r for r in report["rows"] if r["output"] == "perplexity" and "original" in r["comparison"]]
    assert code == 0
    assert 0 < row["error"] <= 0.005


@pytest.mark.parametrize("pipeline", ["baichuan2,int8{activations=dynamic}", "baichuan2,tp,int8{activations=dynamic}"])
def test_dynamic_activations_keep_the_perplexity(root: Path, family: Path, tmp_path: Path, capsys, pipeline: str):
    """Within 1 % of fp32; the same codes multiplied as numbers give the same text, but for roundings at a half."""
    output = run(family, pipeline, tmp_path / "out", "--verify-each=numeric")
    capsys.readouterr()
    text = str(root / "text.txt")
    code = main(["verify", str(family), str(output), "--text", text, "--max-tokens", "1500", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    own, original = (row["error"] for row in rows if row["output"] == "perplexity")
    assert code == 0
    assert own < 5e-4
    assert 0 < original <= 0.01
    kinds = collections.Counter(node.op_type for node in load_any(output).graph)
    assert kinds["MatMulInteger"]
    assert not kinds["DequantizeLinear"]


def test_orders_of_tp_and_dynamic_int8_write_the_same_weights(rotary: Path, tmp_path: Path):
    dynamic = "int8{activations=dynamic,head=true}"
    one = run(rotary, f"baichuan2,tp{{degree=3,pad=true}},{dynamic}", tmp_path / "one")
    other = run(rotary, f"baichuan2,{dynamic},tp{{degree=3,pad=true}}", tmp_path / "other")
    for rank in ("rank0", "rank1", "rank2"):
        files = [(folder / rank / "weights.safetensors").read_bytes() for folder in (one, other)]
        assert files[0] == files[1]


def test_orders_of_tp_and_int8_write_the_same_fused_weights(alibi: Path, tmp_path: Path):
    one = run(alibi, "baichuan2,tp,int8", tmp_path / "one")
    other = run(alibi, "baichuan2,int8,tp", tmp_path / "other")
    for rank in ("rank0", "rank1"):
        files = [(folder / rank / "weights.safetensors").read_bytes() for folder in (one, other)]
        assert files[0] == files[1]


def test_slopes_of_a_rank_are_those_of_its_heads(alibi: Path):
    """From the true head count, padded with zeros: 6 heads on 4 ranks."""
    model = load_model(alibi)
    run_passes(model, resolve("baichuan2,tp{degree=4,pad=true}").passes)
    calls = [node for node in model.graph if node.op_type == "AlibiAttention"]
    (slopes,) = {node.inputs[3] for node in calls}
    assert list(slopes.shape) == [2, 1, 1]
    assert len(rank_models(model)) == 4


def test_fp16_is_fused_as_well(alibi: Path, alibi_fp16: Path, tmp_path: Path):
    output = run(alibi_fp16, "baichuan2,tp{degree=3}", tmp_path / "out")
    report = verify(load_any(alibi), load_any(output), options=VerifyOptions(tolerance=2e-2))
    assert report.ok, report.to_text()


@pytest.mark.parametrize("pipeline", ["baichuan2,tp,int8", "baichuan2,tp,int8{activations=dynamic}"])
def test_layerwise_verification_follows_fused_layers(family: Path, tmp_path: Path, pipeline: str):
    output = run(family, pipeline, tmp_path / "out")
    assert main(["verify", str(family), str(output), "--layerwise"]) == 0


def test_a_baked_mask_is_fused_like_the_formula(root: Path, tmp_path: Path):
    baked = tmp_path / "baked"
    options = ["--dtype=fp32", "--alibi=baked", "--no-self-check", "--trust-remote-code"]
    assert main(["export", str(root / "alibi"), "-o", str(baked), *options]) == 0
    output = run(baked, "baichuan2", tmp_path / "out")
    report = verify(load_any(baked), load_any(output), options=VerifyOptions(tolerance=1e-5))
    assert report.ok, report.to_text()
