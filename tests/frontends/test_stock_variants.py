"""Code of checkpoints that is not quite stock: exported as it computes, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from passopt.api.export import clean_up
from passopt.cli import main
from passopt.frontends.checkpoint import open_checkpoint
from passopt.frontends.export import export_graph
from passopt.frontends.options import ExportOptions
from passopt.frontends.self_check import self_check
from passopt.ir.errors import CheckError, ModelError
from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.graph.decoder import positions_of
from passopt.ir.weights.expressions import DataType
from passopt.testing.checkpoints import ODD, ROTARY, CheckpointSpec, make_checkpoint

CODE = "modeling_baichuan.py"
NORM_HEAD = "NormHead(config.hidden_size, config.vocab_size, bias=False)"
PLAIN_HEAD = "nn.Linear(config.hidden_size, config.vocab_size, bias=False)"
KEYS = "        if past_key_value is not None:\n            key_states"
SLOPES = "torch.Tensor(_get_interleave(n_head))"


def options(**settings: Any) -> ExportOptions:
    return ExportOptions(**{"trust_remote_code": True, "dtype": DataType.FLOAT, **settings})


def variant(directory: Path, spec: CheckpointSpec, *changes: tuple[str, str], **config: Any) -> Path:
    """Write a checkpoint whose code has other lines in some places, and whose configuration has other values."""
    make_checkpoint(directory, spec, trained=False)
    code = (directory / CODE).read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (directory / CODE).write_text(code)
    update(directory, **config)
    return directory


def update(directory: Path, **config: Any) -> None:
    stated = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({key: value for key, value in stated.items() if value != ...}))


def logn(threshold: str) -> tuple[str, str]:
    """Return a change by which queries grow with the logarithm of the length, beyond a threshold."""
    scale = f"query_states = query_states * (math.log(kv_seq_len) / math.log({threshold}))"
    return KEYS, f"        if kv_seq_len > {threshold}:\n            {scale}\n{KEYS}"


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_branch_on_the_length_is_refused(tmp_path: Path, exporter: Any) -> None:
    directory = variant(tmp_path / "c", ROTARY, logn("self.config.train_length"), train_length=32)
    with pytest.raises(ModelError, match=r"BaichuanForCausalLM takes another branch where not .*<= 32 \(modeling_b"):
        export_graph(open_checkpoint(directory), options(exporter=exporter), tmp_path)


@pytest.mark.slow
def test_a_branch_at_the_end_of_the_positions_is_recorded(tmp_path: Path) -> None:
    directory = variant(tmp_path / "c", ROTARY, logn("128"))
    graph = export_graph(open_checkpoint(directory), options(), tmp_path)
    assert (graph.metadata_props["passopt.max_positions"], positions_of(graph)) == ("128", 128)


@pytest.mark.slow
def test_the_self_check_reaches_lengths_beyond_a_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nobody looked at the conditions of the trace."""
    directory = variant(tmp_path / "c", ROTARY, logn("self.config.train_length"), train_length=32)
    monkeypatch.setattr("passopt.frontends.probing.length_limits.Conditions.limit", lambda *_: None)
    with pytest.raises(CheckError, match="differs from the stock code"):
        self_check(open_checkpoint(directory), options(exporter="torchscript"), finish=clean_up)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ROTARY, ODD], ids=["rotary", "alibi"])
def test_the_self_check_runs_the_stock_code_behind_a_cache(tmp_path: Path, spec: CheckpointSpec) -> None:
    """Code may do something else for one token; a trace follows the branch of several, and shows no condition of it."""
    once = f"        if q_len == 1:\n            query_states = query_states * 1.5\n{KEYS}"
    directory = variant(tmp_path / "c", spec, (KEYS, once))
    with pytest.raises(CheckError, match="differs from the stock code"):
        self_check(open_checkpoint(directory), options(exporter="torchscript"), finish=clean_up)


def slopes_of(graph: Any) -> list[float]:
    tensor = graph.graph.initializers["alibi.slopes"].const_value
    assert tensor is not None
    return [float(slope) for slope in tensor.numpy().reshape(-1)]


@pytest.mark.slow
def test_slopes_of_an_interpolation_are_exported_as_they_are(tmp_path: Path) -> None:
    directory = variant(tmp_path / "c", ODD, (SLOPES, f"{SLOPES} / 2"))
    checkpoint = open_checkpoint(directory)
    graph = export_graph(checkpoint, options(), tmp_path)
    assert slopes_of(graph) == (alibi_slopes(ODD.heads) / 2).tolist()
    assert "passopt.max_positions" not in graph.metadata_props
    assert self_check(checkpoint, options(alibi="baked"), finish=clean_up) < 2e-5


@pytest.mark.slow
def test_slopes_that_follow_the_positions_are_exported_up_to_there(tmp_path: Path) -> None:
    directory = variant(tmp_path / "c", ODD, (SLOPES, f"{SLOPES} / max(1, max_pos / 28)"))
    graph = export_graph(open_checkpoint(directory), options(), tmp_path)
    assert slopes_of(graph) == (alibi_slopes(ODD.heads) / 2).tolist()
    assert positions_of(graph) == ODD.max_positions == 56


def test_slopes_that_follow_the_length_are_refused(tmp_path: Path) -> None:
    """Dynamic NTK, if the class builds the mask of every length by itself."""
    anew = (
        "        return self.future_mask[",
        "        if seq_length_with_past <= 28:\n            self._register_future_mask(tensor)\n"
        "        return self.future_mask[",
    )
    body = ("self.n_head, self.max_cache_pos).to(tensor)", "self.n_head, self.max_cache_pos).to(tensor) * scale")
    scale = (
        "        mask = _gen_alibi",
        "        scale = 1.0 if self.max_cache_pos > 0 else 2.0\n        mask = _gen_alibi",
    )
    cut = (
        "        if self.first_run:",
        "        self.max_cache_pos = seq_length_with_past\n        if self.first_run:",
    )
    steep = (SLOPES, f"{SLOPES} / max(1, max_pos / 28)")
    always = ("            self.first_run = False\n", "")
    directory = variant(tmp_path / "c", ODD, anew, body, scale, cut, steep, always)
    with pytest.raises(ModelError, match="BaichuanForCausalLM has ALiBi slopes that depend on the length: head 0"):
        export_graph(open_checkpoint(directory), options(exporter="torchscript"), tmp_path)


@pytest.mark.slow
def test_rotary_tables_of_layers_may_differ(tmp_path: Path) -> None:
    """A class with a base per layer: sharing the first layer's tables would be silently wrong.

    A self-check builds models of two layers, each of which takes both bases.
    """
    base = ("max_position_embeddings=self.max_position_embeddings)", "self.max_position_embeddings, 500 * next(BASES))")
    bases = ("def rotate_half", "import itertools\n\nBASES = itertools.cycle((20, 3))\n\n\ndef rotate_half")
    directory = variant(tmp_path / "c", ROTARY, base, bases)
    assert self_check(open_checkpoint(directory), options(exporter="torchscript"), finish=clean_up) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ROTARY, ODD], ids=["rotary", "alibi"])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_plain_head_agrees_with_the_stock_code(tmp_path: Path, spec: CheckpointSpec, exporter: Any) -> None:
    """As in Baichuan 1, whose configuration of 7B also has no model_max_length."""
    without = {"model_max_length": ...} if spec is ROTARY else {}
    directory = variant(tmp_path / "c", spec, (NORM_HEAD, PLAIN_HEAD), **without)
    assert self_check(open_checkpoint(directory), options(exporter=exporter), finish=clean_up) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ROTARY, ODD], ids=["rotary", "alibi"])
def test_a_plain_head_goes_through_the_pipelines(tmp_path: Path, spec: CheckpointSpec) -> None:
    directory = variant(tmp_path / "c", spec, (NORM_HEAD, PLAIN_HEAD))
    model, output = tmp_path / "exported", str(tmp_path / "out")
    flags = ["--trust-remote-code", "--no-self-check", "--dtype", "fp32"]
    assert main(["export", str(directory), "-o", str(model), *flags]) == 0
    passes = "baichuan2,tp{degree=3,pad=true},int8"
    assert main(["run", str(model / "model.onnx"), "--passes", passes, "-o", output]) == 0
    assert main(["verify", str(model / "model.onnx"), output]) == 0


def test_packages_of_gpu_kernels_may_be_imported_without_need(tmp_path: Path) -> None:
    imports = (
        "import torch\n",
        "import torch\nfrom xformers import ops as xops\nfrom flash_attn.layers import rotary\n",
    )
    directory = variant(tmp_path / "c", ODD, imports)
    assert export_graph(open_checkpoint(directory), options(exporter="torchscript"), tmp_path).graph.outputs


def test_packages_of_gpu_kernels_that_are_called_are_named(tmp_path: Path) -> None:
    imports = ("import torch\n", "import torch\nfrom flash_attn.layers import rotary\n")
    call = ("        proj = self.W_pack(hidden_states)\n", "        proj = self.W_pack(rotary.apply(hidden_states))\n")
    directory = variant(tmp_path / "c", ODD, imports, call)
    with pytest.raises(
        ModelError, match=r"cannot be traced: .*for flash_attn\.layers\.rotary\.apply, which is .*install"
    ):
        export_graph(open_checkpoint(directory), options(exporter="torchscript"), tmp_path)


def test_a_missing_package_is_named_with_its_line_and_without_an_extra(tmp_path: Path, capsys: Any) -> None:
    directory = variant(tmp_path / "c", ODD, ("import torch\n", "import torch\nimport no_such_package.part\n"))
    assert main(["export", str(directory), "-o", str(tmp_path / "out"), "--trust-remote-code"]) == 2
    said = capsys.readouterr().err
    assert "(at modeling_baichuan.py:9: import no_such_package.part)" in said
    assert "The code needs the package no_such_package, which is not installed" in said
    assert "passopt[" not in said


def test_code_in_a_repository_of_the_hub_is_found_beside_the_configuration(tmp_path: Path) -> None:
    names = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": f"{CODE[:-3]}.BaichuanForCausalLM",
    }
    auto_map = {role: f"someone/code--{name}" for role, name in names.items()}
    directory = variant(tmp_path / "c", ODD, auto_map=auto_map)
    assert export_graph(open_checkpoint(directory), options(exporter="torchscript"), tmp_path).graph.outputs


def test_the_reason_of_a_failing_class_is_told_in_full(tmp_path: Path) -> None:
    fails = ("        bsz, q_len, _ = hidden_states.size()\n", "        raise KeyError('first line\\nlast line')\n")
    directory = variant(tmp_path / "c", ODD, fails, transformers_version="4.1.0")
    with pytest.raises(ModelError) as caught:
        export_graph(open_checkpoint(directory), options(exporter="torchscript"), tmp_path)
    text = str(caught.value)
    assert "BaichuanForCausalLM cannot be traced: KeyError: " in text
    assert "last line" in text
    assert "(at modeling_baichuan.py:" in text
    assert "The checkpoint was made for transformers 4.1.0; 5." in text
