"""Compiled libraries against the exported graph in onnxruntime: both families, every precision, prefill to decode."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from passopt.api.compile import load_source
from passopt.cli import main
from passopt.ir.errors import UsageError
from passopt.targets.tvm.compiled_folder import Library, read_library

pytest.importorskip("tvm")

READY = "baichuan2,fold-norm-head"


def compiled(model: Path, output: Path, *options: str) -> Path:
    assert main(["compile", str(model), "-o", str(output), *options]) == 0
    return output


def verified(reference: Path, output: Path, capsys, *options: str) -> dict[str, dict[str, float]]:
    """The worst error per scenario of `passopt verify`, which must pass."""
    capsys.readouterr()
    assert main(["verify", str(reference), str(output), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    rows: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        seen = rows.setdefault(row["scenario"], row)
        if row["error"] > seen["error"]:
            rows[row["scenario"]] = row
    return rows


def test_fp32_equals_onnxruntime(family: Path, tmp_path: Path, capsys):
    output = compiled(family, tmp_path / "out", "--passes", READY)
    rows = verified(family, output, capsys, "--tolerance", "1e-4")
    assert {"decode with cache", "chunked prefill", "left padding, then decode"} <= rows.keys()


def test_fp16_has_fp16_weights_and_cache(alibi_fp16: Path, tmp_path: Path, capsys):
    output = compiled(alibi_fp16, tmp_path / "out", "--passes", READY)
    library = read_library(output)
    assert isinstance(library, Library)
    assert library.cache.dtype == "fp16"
    verified(alibi_fp16, output, capsys, "--tolerance", "2e-2")


@pytest.mark.parametrize("name", ["rotary", "alibi"])
def test_fp16_with_dynamic_activations_fuses_as_fp32_does(request, root: Path, name: str, tmp_path: Path, capsys):
    family = request.getfixturevalue(f"{name}_fp16")
    capsys.readouterr()
    passes = "baichuan2,int8{activations=dynamic,head=true}"
    output = compiled(family, tmp_path / "out", "--passes", passes, "--json")
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    library = read_library(output)
    assert isinstance(library, Library)
    layers = library.cache.layers
    assert sum(count for kernel, count in kernels.items() if kernel.endswith("_residual")) == 2 * layers
    assert sum(count for kernel, count in kernels.items() if "rms_norm" in kernel) == 2 * layers + 1
    assert all(kernel.endswith("_quantized") for kernel in kernels if "rms_norm" in kernel or "swiglu" in kernel)
    rows = verified(family, output, capsys, "--text", str(root / "text.txt"), "--max-tokens", "2000")
    assert rows["text"]["error"] < 0.01


def test_bf16(alibi: Path, tmp_path: Path, capsys):
    output = compiled(alibi, tmp_path / "out", "--passes", f"{READY},cast{{dtype=bf16}}")
    library = read_library(output)
    assert isinstance(library, Library)
    assert library.cache.dtype == "bf16"
    verified(alibi, output, capsys)


def test_int8_weights_equal_the_dequantised_graph(family: Path, tmp_path: Path, capsys):
    graph = tmp_path / "int8"
    assert main(["run", str(family), "--passes", "baichuan2,int8{embedding=true,head=true}", "-o", str(graph)]) == 0
    output = compiled(graph, tmp_path / "out")
    verified(graph, output, capsys, "--tolerance", "1e-4")
    library = read_library(output)
    assert isinstance(library, Library)
    assert library.quantized == "weights"


def test_library_of_the_last_position(family: Path, tmp_path: Path, capsys):
    output = compiled(family, tmp_path / "out", "--passes", f"{READY},slice-last-token")
    verified(family, output, capsys, "--tolerance", "1e-4")


@pytest.mark.parametrize("passes", ["int8{head=true}", "int8{activations=dynamic,head=true}"])
def test_int8_keeps_the_perplexity_of_fp32(family: Path, root: Path, tmp_path: Path, capsys, passes: str):
    output = compiled(family, tmp_path / "out", "--passes", f"baichuan2,{passes}")
    rows = verified(family, output, capsys, "--text", str(root / "text.txt"), "--max-tokens", "2000")
    assert rows["text"]["error"] < 0.01


def test_graph_that_was_not_fused_is_refused(family: Path, tmp_path: Path, capsys):
    assert main(["compile", str(family), "-o", str(tmp_path / "out"), "--passes", "fold-norm-head"]) == 2
    message = capsys.readouterr().err
    assert "no native kernel for" in message
    assert "MatMul" in message
    assert "baichuan2" in message
    assert not (tmp_path / "out").exists()


def test_fallback_runs_without_a_cache_in_place_and_says_so(family: Path, tmp_path: Path, capsys):
    output = compiled(family, tmp_path / "out", "--passes", "fold-norm-head", "--allow-fallback")
    assert "fallback: node" in capsys.readouterr().err
    library = read_library(output)
    assert isinstance(library, Library)
    assert library.cache.kind == "functional"
    verified(family, output, capsys, "--tolerance", "1e-4")


def test_report_lists_kernels(family: Path, tmp_path: Path, capsys):
    compiled(family, tmp_path / "out", "--passes", READY, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["fallbacks"] == []
    assert any(name.startswith("attention:") for name in report["kernels"])


def test_steps_can_be_printed(family: Path, tmp_path: Path, capsys):
    compiled(family, tmp_path / "out", "--passes", READY, "--print-after", "legalize")
    assert capsys.readouterr().err.count("// after legalize") == 1
    assert main(["compile", str(family), "-o", str(tmp_path / "other"), "--print-after", "legalise"]) == 2
    told = capsys.readouterr().err
    assert "no step 'legalise'" in told
    assert re.search(r"\n  legalize +lower small operators to TIR", told)


def test_without_a_c_compiler_it_says_so_before_anything_else(alibi: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["compile", str(alibi), "-o", str(tmp_path / "out"), "--passes", READY]) == 2
    assert "no-such-compiler (from CXX or CC) is not there. Install gcc or clang" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_config_is_told_before_anything_is_written(alibi: Path, tmp_path: Path, capsys):
    model = tmp_path / "model"
    shutil.copytree(alibi, model)
    (model / "config.json").write_text("{")
    assert main(["compile", str(model), "-o", str(tmp_path / "out"), "--passes", READY]) != 0
    assert "config.json: is no JSON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [model]


def test_unknown_cpu_is_named(family: Path, tmp_path: Path, capsys):
    assert main(["compile", str(family), "-o", str(tmp_path / "out"), "--mcpu", "z80"]) == 2
    assert "LLVM knows no CPU 'z80'" in capsys.readouterr().err


def test_passes_do_not_run_over_ranks(family: Path, tmp_path: Path):
    ranks = tmp_path / "ranks"
    assert main(["run", str(family), "--passes", f"{READY},tp", "-o", str(ranks)]) == 0
    with pytest.raises(UsageError, match="on which passes cannot run any more"):
        load_source(ranks, "int8")


def test_ranks_of_two_runs_are_refused(family: Path, tmp_path: Path, capsys):
    """Checkpoints of one shape have graphs that are equal byte for byte; their norms differ."""
    ranks = tmp_path / "ranks"
    assert main(["run", str(family), "--passes", f"{READY},tp", "-o", str(ranks)]) == 0
    weights = ranks / "rank1" / "weights.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name.endswith("input_layernorm.weight"))
    changed = bytearray(whole)
    changed[8 + size + header[name]["data_offsets"][0]] ^= 1
    weights.write_bytes(changed)
    assert main(["compile", str(ranks), "-o", str(tmp_path / "out")]) == 2
    assert f"rank1/weights.safetensors: weight '{name}' is not the one that" in capsys.readouterr().err
    weights.write_bytes(whole)
    graph = ranks / "rank0" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x12\x00")  # another producer name
    assert main(["compile", str(ranks), "-o", str(tmp_path / "out")]) == 2
    assert "rank0/model.onnx: is not the graph that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
