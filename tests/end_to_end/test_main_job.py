"""The main job on both trained families: tensor parallelism and int8, checked against the unsplit fp32 model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passopt.cli import main
from passopt.ir.graph.decoder import find_decoder
from passopt.ir.serialization.model_files import load_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import QuantizeCodes, QuantizeScales
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.joined_ranks import load_any, rank_models
from passopt.verification.verify import VerifyOptions, verify

DEGREES = ["tp", "tp{degree=4,pad=true}", "tp{degree=3,pad=true}", "split-packed-qkv,tp{degree=3,pad=true}"]


def run(model: Path, pipeline: str, output: Path, *options: str) -> Path:
    assert main(["run", str(model), "--passes", pipeline, "-o", str(output), *options]) == 0
    return output


@pytest.mark.parametrize("pipeline", DEGREES)
def test_ranks_joined_equal_the_unsplit_model(family: Path, tmp_path: Path, pipeline: str):
    output = run(family, pipeline, tmp_path / "out")
    report = verify(load_any(family), load_any(output), options=VerifyOptions(tolerance=1e-5))
    assert report.ok, report.to_text()
    scenarios = {row.scenario for row in report.rows}
    assert {"decode with cache", "chunked prefill", "left padding, then decode"} <= scenarios


def test_a_perturbed_rank_is_caught(alibi: Path, tmp_path: Path):
    output = run(alibi, "tp", tmp_path / "out")
    weights = output / "rank1" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4000:-2000] = bytes(2000)
    weights.write_bytes(data)
    assert main(["verify", str(alibi), str(output)]) == 1


def test_every_layer_has_two_all_reduces_and_only_logits_are_gathered(family: Path, tmp_path: Path):
    output = run(family, "tp", tmp_path / "out")
    manifest = json.loads((output / "manifest.json").read_text())
    decoder = find_decoder(load_model(family))
    assert decoder is not None
    kinds = [entry["op"] for entry in manifest["collectives"]]
    assert kinds.count("AllReduce") == 2 * decoder.layers + 1
    assert kinds.count("AllGather") == 1
    assert [entry["index"] for entry in manifest["collectives"]] == list(range(len(kinds)))


@pytest.mark.parametrize("pipeline", ["tp", "tp{degree=3,pad=true}"])
def test_shards_of_all_ranks_are_the_full_tensors_once(family: Path, tmp_path: Path, pipeline: str):
    """Every element of a full tensor is on exactly one rank; the rest is padding."""
    output = run(family, pipeline, tmp_path / "out")
    manifest = json.loads((output / "manifest.json").read_text())
    unsplit = load_model(family)
    run_passes(unsplit, resolve("fold-norm-head,inject-norm-head-bias").passes)
    ranks = [load_model(output / f"rank{rank}") for rank in range(manifest["degree"])]
    assert manifest["sharded"]
    for name in manifest["sharded"]:
        with Evaluator() as evaluator:
            full = evaluator.array(unsplit.graph.initializers[name].const_value.expression)
            parts = [evaluator.array(rank.graph.initializers[name].const_value.expression) for rank in ranks]
        shards = np.sort(np.concatenate([part.reshape(-1) for part in parts]))
        padding = shards.size - full.size
        assert padding >= 0
        expected = np.sort(np.concatenate([full.reshape(-1), np.zeros(padding, full.dtype)]))
        np.testing.assert_array_equal(shards, expected, err_msg=name)
    for name in manifest["replicated"]:
        digests = {entry["tensors"][name] for entry in manifest["ranks"]}
        assert len(digests) == 1, name


@pytest.mark.parametrize("tp", ["tp", "tp{degree=3,pad=true}"])
@pytest.mark.parametrize("options", ["", "{embedding=true,head=true}"])
def test_int8_before_and_after_tp_gives_the_same_codes_and_scales(family: Path, tp: str, options: str):
    both = []
    for pipeline in (f"{tp},int8{options}", f"int8{options},{tp}"):
        model = load_model(family)
        run_passes(model, resolve(pipeline).passes)
        both.append([_quantized_bytes(rank) for rank in rank_models(model)])
    assert both[0] == both[1]
    assert all(both[0])


def test_int8_before_and_after_tp_writes_the_same_weight_files(alibi: Path, tmp_path: Path):
    one = run(alibi, "tp,int8", tmp_path / "one")
    other = run(alibi, "int8,tp", tmp_path / "other")
    for rank in ("rank0", "rank1"):
        files = [(folder / rank / "weights.safetensors").read_bytes() for folder in (one, other)]
        assert files[0] == files[1]


def _quantized_bytes(model) -> dict[str, bytes]:
    with Evaluator() as evaluator:
        return {
            name: evaluator.array(value.const_value.expression).tobytes()
            for name, value in model.graph.initializers.items()
            if any(
                isinstance(part, (QuantizeCodes, QuantizeScales))
                for part in getattr(value.const_value, "expression", _NOTHING).walk()
            )
        }


class _NOTHING:
    @staticmethod
    def walk():
        return iter(())


def test_int8_keeps_the_perplexity_within_half_a_percent(root: Path, family: Path, tmp_path: Path, capsys):
    output = run(family, "tp,int8", tmp_path / "out")
    capsys.readouterr()
    text = str(root / "text.txt")
    code = main(["verify", str(family), str(output), "--text", text, "--max-tokens", "1500", "--json"])
    report = json.loads(capsys.readouterr().out)
    (row,) = [r for r in report["rows"] if r["output"] == "perplexity" and "original" in r["comparison"]]
    assert code == 0
    assert 0 < row["error"] <= 0.005
    twin = [r["error"] for r in report["rows"] if "dequantised" in r["comparison"] and r["output"] == "logits"]
    assert max(twin) <= 1e-5


def test_fp16_stays_within_two_percent_of_fp32(alibi: Path, alibi_fp16: Path, tmp_path: Path):
    output = run(alibi_fp16, "tp{degree=3}", tmp_path / "out")
    options = VerifyOptions(tolerance=2e-2)
    for candidate in (alibi_fp16, output):
        report = verify(load_any(alibi), load_any(candidate), options=options)
        assert report.ok, report.to_text()


def test_layerwise_verification_agrees(family: Path, tmp_path: Path):
    output = run(family, "tp,int8", tmp_path / "out")
    assert main(["verify", str(family), str(output), "--layerwise"]) == 0


def test_last_token_slice_is_compared_with_the_last_column(family: Path, tmp_path: Path):
    output = run(family, "slice-last-token,tp", tmp_path / "out")
    report = verify(load_any(family), load_any(output), options=VerifyOptions(tolerance=1e-5))
    assert report.ok, report.to_text()


def test_dry_run_names_the_exact_bytes(family: Path, tmp_path: Path, capsys):
    capsys.readouterr()
    assert main(["run", str(family), "--passes", "tp,int8", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["files"]
    output = run(family, "tp,int8", tmp_path / "out")
    written = {str(path.relative_to(output)): path.stat().st_size for path in output.rglob("*") if path.is_file()}
    assert written == planned
