"""Wrong passes through the command line: stopped, written down as a reproducer, and replayed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from passopt.cli import main
from passopt.ir.graph.provenance import MODULE, SOURCE
from passopt.ir.serialization.model_files import load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.passes.framework import base
from passopt.passes.framework.base import Pass
from passopt.passes.framework.defects import NEXT_STEP
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.testing.checking import read_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,seq,40] x, float[batch,seq,30] y) => (float[batch,seq,30] out) <float[40,30] w = random> {
    [dead] unused = Exp(y)
    h = MatMul(x, w)
    d = Sub(h, y)
    out = Relu(d)
}"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_materialized(read_model(TEXT), folder)
    return folder


@pytest.fixture
def registered(monkeypatch):
    """`registered(cls)`: the pass has its name until the test is over; a later one may take it."""
    return lambda cls: monkeypatch.setitem(base.REGISTERED, cls.name, cls)


def swapped(order):
    """Sub(h, y) as h + (-y); with another order, wrong."""

    @dataclasses.dataclass(frozen=True)
    class Swap(RewritePass):
        def pattern(self, op, x, w, y):
            return op.Sub(op.MatMul(x, op.weight(w)), y)

        def rewrite(self, op, x, w, y):
            terms = [op.MatMul(x, w), y]
            return op.Add(terms[order[0]], op.Neg(terms[order[1]]))

    Swap.name = "swap-terms"
    return Swap


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_wrong_rule_is_caught_and_its_reproducer_replays(model, registered, capsys, tmp_path):
    registered(swapped((1, 0)))
    output = tmp_path / "out"
    arguments = ("run", model, "--passes", "dead-code,swap-terms,fold-constants", "-o", output)
    assert run(capsys, *arguments, "--verify-each=structure")[0] == 0, "the structure alone does not show it"
    output = tmp_path / "checked"
    code, _, message = run(capsys, *arguments[:-1], output, "--verify-each=numeric")
    assert code == 1
    folder = tmp_path / "checked.reproducer"
    assert "swap-terms (" in message
    assert "test_reproducer.py:" in message
    assert "changed the numbers of d: max|Δ|/max|reference| = " in message
    assert message.rstrip().endswith(f"run it again with: passopt replay {folder}")
    assert not output.exists()

    report = json.loads((folder / "reproducer.json").read_text())
    assert report["passes"] == "swap-terms,fold-constants{limit=1048576}"
    assert (report["kind"], report["verify_each"]) == ("Violation", "numeric")
    assert report["command"] == f"passopt replay {folder}"
    assert report["versions"]["onnxruntime"] == onnxruntime.__version__
    before = load_model(folder)
    assert "Exp" not in print_model(before), "the model is the one that the failing pass got"
    assert not (folder / "weights.safetensors").exists()

    code, printed, message = run(capsys, "replay", folder)
    assert code == 1
    assert "after.onnx against before.onnx: max|Δ|/max|reference| = " in printed
    assert f"{folder}: still fails: swap-terms (" in message

    registered(swapped((0, 1)))
    code, printed, _ = run(capsys, "replay", folder)
    assert code == 0
    assert f"{folder}: no longer fails; it failed with:\n  swap-terms (" in printed


def test_the_rewrite_alone_runs_in_plain_onnxruntime(model, registered, capsys, tmp_path):
    registered(swapped((1, 0)))
    folder = tmp_path / "kept"
    passes = ("--passes", "swap-terms", "--verify-each=numeric", "--dry-run")
    assert run(capsys, "run", model, *passes, "--reproducer", folder)[0] == 1
    with np.load(folder / "inputs.npz") as stored:
        inputs = dict(stored)
    results = []
    for name in ("before.onnx", "after.onnx"):
        assert len(onnx.load(folder / name).graph.node) < 6
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        (value,) = session.run(None, {item.name: inputs[item.name] for item in session.get_inputs()})
        results.append(value)
    assert np.allclose(results[0], -results[1], atol=1e-5)
    assert np.abs(results[0]).max() > 0.1


def failing(action):
    @dataclasses.dataclass(frozen=True)
    class Failing(Pass):
        number: int = 3

        def run(self, model):
            action(model)
            return PassResult(modified=True)

    Failing.name = "failing"
    return Failing


def raises(model):
    raise ZeroDivisionError("by zero")


def removes(model):
    model.graph.remove(model.graph[-1])


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        (raises, "PassError", "failing: failed with ZeroDivisionError: by zero"),
        (removes, "VerifyError", "failing left a broken graph"),
    ],
)
def test_any_failure_of_a_pass_leaves_a_reproducer(model, registered, capsys, tmp_path, action, kind, text):
    registered(failing(action))
    passes = "dead-code,failing{number=5},fold-constants"
    code, _, message = run(capsys, "run", model, "--passes", passes, "-o", tmp_path / "out")
    assert code == 3
    assert text in message
    folder = tmp_path / "out.reproducer"
    report = json.loads((folder / "reproducer.json").read_text())
    assert (report["kind"], report["passes"].partition(",")[0]) == (kind, "failing{number=5}")
    assert run(capsys, "replay", folder)[0] == 1
    registered(failing(lambda model: None))
    assert run(capsys, "replay", folder)[0] == 0


class Faulty(RewritePass):
    """A rule that fails in its pattern or in its rewrite."""

    def pattern(self, op, x, y):
        if self.name == "faulty-pattern":
            return op.Relu(x.missing)
        return op.Relu(op.Sub(x, y))

    def rewrite(self, op, x, y):
        return op.Relu(op.Sub(x, y.shape[5]))


@pytest.mark.parametrize(
    ("name", "method", "error", "code"),
    [
        ("faulty-rewrite", "rewrite", "IndexError", "return op.Relu(op.Sub(x, y.shape[5]))"),
        ("faulty-pattern", "pattern", "AttributeError", "return op.Relu(x.missing)"),
    ],
)
def test_a_defect_of_a_rule_names_rule_line_and_site(model, registered, capsys, tmp_path, name, method, error, code):
    graph = load_model(model)
    graph.graph[-1].metadata_props.update({MODULE: "layers.0.mlp", SOURCE: "modeling_x.py:12"})
    folder = tmp_path / "named"
    folder.mkdir()
    save_materialized(graph, folder)
    kind = dataclasses.dataclass(frozen=True)(type("Kind", (Faulty,), {"name": name}))
    registered(kind)
    arguments = ("run", folder, "--passes", name, "-o", tmp_path / "out")
    found, _, message = run(capsys, *arguments)
    assert found == 3
    head, *rest = message.splitlines()
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = [text.strip() for text in lines].index(code) + 1
    rule = f"{__file__}:{Faulty.pattern.__code__.co_firstlineno}"
    assert head.startswith(f"passopt run: {name} ({rule}): {method} failed with {error}: ")
    assert f", at {__file__}:{line}: `{code}`" in head
    if method == "rewrite":
        assert rest[0] == "site: Relu 'Relu_3', which makes out, modeling_x.py:12 in layers.0.mlp"
        assert rest[1] == NEXT_STEP
    assert f"passopt replay {tmp_path / 'out.reproducer'}" in message
    assert "Traceback" not in message
    assert run(capsys, "replay", tmp_path / "out.reproducer")[0] == 1
    assert "Traceback (most recent call last)" in run(capsys, *arguments, "--traceback")[2]


def test_what_stood_before_the_failing_pass_may_come_again_after_it(model, registered, capsys, tmp_path):
    """As in tp,int8, whose steps are shared: the rest of the pipeline, taken alone, would be out of order."""
    failing_late = failing(raises)
    failing_late.after = ("dead-code",)
    registered(failing_late)
    passes = ("--passes", "dead-code,failing,dead-code", "-o", tmp_path / "out")
    assert run(capsys, "run", model, *passes)[0] == 3
    code, _, message = run(capsys, "replay", tmp_path / "out.reproducer")
    assert code == 1
    assert "still fails: failing: failed with ZeroDivisionError" in message


def test_another_failure_than_the_one_written_down_is_told_apart(model, registered, capsys, tmp_path):
    registered(failing(raises))
    assert run(capsys, "run", model, "--passes", "failing", "-o", tmp_path / "out")[0] == 3
    registered(failing(removes))
    code, _, message = run(capsys, "replay", tmp_path / "out.reproducer")
    assert code == 1
    assert "fails in another way: failing left a broken graph" in message


def test_a_second_reproducer_takes_another_name(model, registered, capsys, tmp_path):
    registered(failing(raises))
    for name in ("out.reproducer", "out.reproducer.2"):
        _, _, message = run(capsys, "run", model, "--passes", "failing", "-o", tmp_path / "out")
        assert message.rstrip().endswith(f"passopt replay {tmp_path / name}")
        assert (tmp_path / name / "reproducer.json").exists()


def test_a_rewrite_limit_holds_for_the_replay_too(model, registered, capsys, tmp_path):
    """dead-code uses one rewrite of two, so one is left for the pass that fails."""
    registered(swapped((1, 0)))
    arguments = ("run", model, "--passes", "dead-code,swap-terms", "--verify-each=numeric", "-o", tmp_path / "out")
    assert run(capsys, *arguments, "--rewrite-limit=2")[0] == 1
    path = tmp_path / "out.reproducer" / "reproducer.json"
    report = json.loads(path.read_text())
    assert report["rewrite_limit"] == 1
    assert run(capsys, "replay", path.parent)[0] == 1
    path.write_text(json.dumps({**report, "rewrite_limit": 0}))
    assert run(capsys, "replay", path.parent)[0] == 0


def test_a_dry_run_leaves_nothing_unless_asked(model, registered, capsys, tmp_path):
    registered(failing(raises))
    before = sorted(tmp_path.rglob("*"))
    code, _, message = run(capsys, "run", model, "--passes", "failing", "--dry-run")
    assert code == 3
    assert "replay" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_folder_is_refused_before_anything_runs(model, registered, capsys, tmp_path):
    registered(failing(raises))
    taken = tmp_path / "taken"
    taken.mkdir()
    code, _, message = run(capsys, "run", model, "--passes", "failing", "--reproducer", taken)
    assert code == 2
    assert f"{taken}: exists" in message


def test_an_unmet_expectation_is_no_failure_of_a_pass(model, capsys, tmp_path):
    passes = ("--passes", "dead-code", "--expect", "dead-code==7", "-o", tmp_path / "out")
    code, _, message = run(capsys, "run", model, *passes)
    assert code == 4
    assert "replay" not in message
    assert not list(tmp_path.glob("*.reproducer"))


def test_a_reproducer_whose_pass_is_gone_says_so(model, registered, capsys, tmp_path):
    registered(failing(raises))
    run(capsys, "run", model, "--passes", "failing", "-o", tmp_path / "out")
    del base.REGISTERED["failing"]
    code, _, message = run(capsys, "replay", tmp_path / "out.reproducer")
    assert code == 2
    assert "cannot be replayed, its pipeline is failing{number=3}: unknown pass 'failing'" in message


@pytest.mark.parametrize("content", [None, "not json", '{"passes": "x"}', "[]"])
def test_what_is_no_reproducer_is_refused(capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "reproducer.json").write_text(content)
    code, _, message = run(capsys, "replay", tmp_path)
    assert code == 2
    assert str(tmp_path) in message
