"""A model of 4 bits from export to compiled libraries, of one rank and of two, against the exported graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passopt.cli import main
from passopt.targets.tvm.compiled_folder import Library, read_library
from passopt.testing.checkpoints import CheckpointSpec, make_checkpoint

#: Widths that groups of 32 fill, also on two ranks: 128 = 4 · 32 and 192 = 6 · 32.
SPEC = CheckpointSpec("rotary", heads=4, hidden=128, intermediate=192, layers=2, vocab=390, max_positions=64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("four-bits")
    make_checkpoint(root / "checkpoint", SPEC, trained=False)
    options = ["--trust-remote-code", "--dtype=fp16", "--no-self-check"]
    assert main(["export", str(root / "checkpoint"), "-o", str(root / "model"), *options]) == 0
    return root / "model"


def run(model: Path, output: Path, passes: str) -> Path:
    assert main(["run", str(model), "--passes", passes, "-o", str(output)]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_compiled_model_multiplies_its_own_codes(exported: Path, tmp_path: Path, capsys, symmetric: str):
    pytest.importorskip("tvm")
    passes = f"baichuan2,int4{{group=32,symmetric={symmetric},head=true}}"
    graph = run(exported, tmp_path / "graph", passes)
    capsys.readouterr()
    assert main(["compile", str(graph), "-o", str(tmp_path / "out"), "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert sum(count for name, count in kernels.items() if "linear_int4" in name) == 7 * SPEC.layers + 1
    assert main(["verify", str(graph), str(tmp_path / "out"), "--tolerance", "2e-3"]) == 0
    library = read_library(tmp_path / "out")
    assert isinstance(library, Library)
    assert library.quantized == "groups"
    codes = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert codes < (exported / "weights.safetensors").stat().st_size / 2


@pytest.mark.slow
def test_compile_refuses_a_cpu_without_a_kernel(exported: Path, tmp_path: Path, capsys):
    pytest.importorskip("tvm")
    options = ["--passes", "baichuan2,int4{group=32}", "--mcpu", "x86-64", "-o", str(tmp_path / "out")]
    assert main(["compile", str(exported), *options]) == 2
    message = capsys.readouterr().err
    assert "weights of 4 bits have kernels for avx512-vnni and avx2, not for plain: quantise to int8 there" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_of_four_bits_agree_with_the_whole(exported: Path, tmp_path: Path):
    whole = run(exported, tmp_path / "whole", "baichuan2,int4{group=32}")
    ranks = run(exported, tmp_path / "ranks", "baichuan2,tp{degree=2},int4{group=32}")
    assert main(["verify", str(whole), str(ranks)]) == 0
