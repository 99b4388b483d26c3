"""Call every operation of `import passopt` as a user does, on the tiny decoder, rightly and wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

import passopt
from passopt.ir import print_model
from passopt.passes import RewritePass, resolve
from passopt.testing import DecoderSpec, tiny_decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model, with its weights in files."""
    graph = tiny_decoder(DecoderSpec(), checkpoint=tmp_path / "checkpoint.safetensors")
    passopt.save(graph, tmp_path / "model")
    return tmp_path / "model"


def script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_importing_loads_nothing_heavy_and_hands_on_its_packages():
    code = """
import sys, passopt
heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "tvm"} & set(sys.modules)
assert not heavy, heavy
print(passopt.__version__, passopt.passes.Pass.__name__, passopt.ir.Editor.__name__, passopt.testing.check.__name__)
"""
    done = script(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [passopt.__version__, "Pass", "Editor", "check"]


def test_every_public_name_is_there_and_nothing_else_is_listed():
    for name in passopt.__all__:
        assert getattr(passopt, name) is not None
    public = [name for name in dir(passopt) if not name.startswith("__")]
    assert set(public) == {*passopt.__all__, "ir", "passes", "testing"} - {"__version__"}
    with pytest.raises(AttributeError, match="'passopt' has no attribute 'nosuch'"):
        passopt.nosuch  # noqa: B018


def test_a_model_is_loaded_by_file_by_folder_and_by_text(folder: Path):
    whole = passopt.load(folder)
    assert whole.path == folder / "model.onnx"
    assert str(passopt.load(str(folder / "model.onnx"))) == str(whole) == passopt.print_text(folder)
    assert repr(whole).startswith("<passopt.Model of ")
    assert f"{len(whole.ir.graph)} nodes" in repr(whole)


@pytest.mark.parametrize("form", ["path", "model", "graph"])
def test_a_run_changes_no_model_that_it_is_given(folder: Path, form: str):
    model = passopt.load(folder)
    before = print_model(model.ir)
    given = {"path": folder, "model": model, "graph": model.ir}[form]
    result = passopt.run(given, "tp{degree=2,pad=true},int8")
    assert print_model(model.ir) == before
    assert result.model.degree == 2
    assert result.output is None
    assert str(result).endswith("nothing was written: no output was named")
    assert result.sizes.weights.codes > 0


def test_results_are_json_and_short_to_look_at(folder: Path, tmp_path: Path):
    model = passopt.load(folder)
    results = [
        passopt.run(model, "int8", tmp_path / "out"),
        passopt.verify(model, tmp_path / "out"),
        passopt.why("fuse-attention", model),
        passopt.plan(model),
        passopt.provenance(model),
        passopt.list_passes(),
        passopt.explain("fuse-rotary"),
        passopt.save(model, tmp_path / "saved"),
    ]
    for result in results:
        assert json.loads(json.dumps(result.to_json()))
        assert len(repr(result)) < 200
        assert repr(result).startswith(f"<passopt.{type(result).__name__} ")
        assert str(result).strip()
        assert "<" in result._repr_html_()
        assert isinstance(result.ok, bool)
    assert "<td" in model._repr_html_()


def test_what_a_run_writes_is_what_it_says(folder: Path, tmp_path: Path):
    result = passopt.run(folder, "tp{degree=2,pad=true}", tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == set(result.sizes.files)
    assert passopt.verify(folder, tmp_path / "out").ok


def test_two_runs_in_memory_leave_the_manifest_of_one(folder: Path, tmp_path: Path):
    middle = passopt.run(folder, "fold-norm-head").model
    passopt.run(middle, "int8", tmp_path / "twice")
    passopt.run(folder, "fold-norm-head,int8", tmp_path / "once")
    twice, once = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("twice", "once"))
    assert twice == once
    assert passopt.load(tmp_path / "twice").pipeline == resolve("fold-norm-head,int8").expanded


def test_a_model_from_memory_is_saved_and_loaded(tmp_path: Path):
    graph = tiny_decoder(DecoderSpec())
    result = passopt.save(graph, tmp_path / "saved")
    assert result.output == tmp_path / "saved"
    assert passopt.verify(graph, tmp_path / "saved").ok
    reference = passopt.save(tmp_path / "saved", tmp_path / "plan", weights="reference")
    assert reference.stream is None
    assert passopt.print_text(tmp_path / "plan") == passopt.print_text(tmp_path / "saved")


def test_passes_may_be_given_as_objects(folder: Path):
    (codes, *_) = [item for item in resolve("int8").passes if item.name == "quantize-weights"]
    by_object = passopt.run(folder, [codes])
    assert str(by_object.model) == str(passopt.run(folder, "quantize-weights").model)
    assert passopt.why(codes, folder).ok == passopt.why("quantize-weights", folder).ok


def test_verify_finds_a_wrong_model(folder: Path):
    wrong = passopt.load(folder).copy()
    for value in wrong.ir.graph.initializers.values():
        if value.name.endswith("down_proj.weight"):
            value.const_value = onnx_ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
    report = passopt.verify(folder, wrong)
    assert not report.ok
    assert "FAILED" in str(report)


WRONG = [
    (lambda model, out: passopt.load(model / "nosuch"), "no such model"),
    (lambda model, out: passopt.load(None), "a model is a"),
    (lambda model, out: passopt.run(model, ["int8"]), "a list of passes"),
    (lambda model, out: passopt.run(model, RewritePass), "call the class to make a pass"),
    (lambda model, out: passopt.run(model, "int9"), "did you mean 'int8'"),
    (lambda model, out: passopt.run(model, "int8", weights="cpy"), "weights is one of copy, reference"),
    (lambda model, out: passopt.run(model, "int8", verify_each="num"), "verify_each is one of"),
    (lambda model, out: passopt.run(model, "int8", rewrite_limit=-1), "rewrite_limit is at least 0"),
    (lambda model, out: passopt.run(model, "int8", out, workers=0), "workers is at least 1"),
    (lambda model, out: passopt.run(model, "int8", expect=[3]), "expect is a text or a list"),
    (lambda model, out: passopt.run(model, "int8", out, memory=0), "memory is at least 1"),
    (lambda model, out: passopt.save(model, out, weights="ref"), "weights is one of copy, reference"),
    (lambda model, out: passopt.save(model, model), "output exists"),
    (lambda model, out: passopt.verify(model, model, tolerance=-1), "tolerance is a number from 0 on"),
    (lambda model, out: passopt.verify(model, model, max_tokens=-5), "max_tokens is at least 1"),
    (lambda model, out: passopt.verify(model, model, max_positions=0), "max_positions is at least 1"),
    (lambda model, out: passopt.verify(model, None), "a path, not None"),
    (lambda model, out: passopt.why(passopt.load(model), "fuse-attention"), "and then the model"),
    (lambda model, out: passopt.why("int8", model), "is a pipeline"),
    (lambda model, out: passopt.why("cse", model, within="int8"), "it is no part of that pipeline"),
    (lambda model, out: passopt.export(out / "nosuch", out, dtype="fp8"), "dtype is one of"),
    (lambda model, out: passopt.compile(model, out, target="cude"), "target is one of llvm, cuda"),
    (lambda model, out: passopt.generate(out, 5), "library.json"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_is_told_and_nothing_is_written(folder: Path, tmp_path: Path, number: int):
    call, message = WRONG[number]
    with pytest.raises(passopt.PassoptError) as caught:
        call(folder, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_expectation_alone_is_a_text(folder: Path):
    assert passopt.run(folder, "dead-code", expect="dead-code==0").ok
    with pytest.raises(passopt.ExpectationError, match="expected dead-code==7"):
        passopt.run(folder, "dead-code", expect="dead-code==7")


def test_a_reporter_hears_and_nothing_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Heard(passopt.Reporter):
        said: list[str] = []  # noqa: RUF012
        shown: list[str] = []  # noqa: RUF012

        def say(self, message: str) -> None:
            self.said.append(message)

        def show(self, text: str) -> None:
            self.shown.append(text)

    heard = Heard()
    passopt.run(folder, "fuse-rotary,int8", tmp_path / "out", print_after="dead-code", reporter=heard)
    assert [text.partition("\n")[0] for text in heard.shown] == ["# after 5: dead-code"]
    assert capsys.readouterr() == ("", "")
