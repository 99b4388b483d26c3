"""`run --stop-after` and `run --rewrite-limit`: a prefix of a run, as a model of its own."""

from __future__ import annotations

import json

import pytest

from passopt.cli import main
from passopt.ir.serialization.model_files import load_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,6] y) <float[6,3] "a.w" = random, float[6,6] "b.w" = random, int64[2] three = {3, 3}> {
    t = Transpose<perm = [1, 0]>("a.w")
    a = MatMul(x, t)
    u = Transpose<perm = [1, 0]>("b.w")
    b = MatMul(a, u)
    i = Identity(b)
    y = Relu(i)
    lost = Abs(b)
}"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "graph.onnxtxt"
    path.write_text(TEXT)
    return path


def text_of(model, capsys, *options):
    assert main(["run", str(model), "--emit", "text", *options]) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def quantised(text):
    return [name for name in ("a.w", "b.w") if f'"{name}.codes"' in text]


@pytest.mark.parametrize(("limit", "expected"), [(0, []), (1, ["a.w"]), (2, ["a.w", "b.w"]), (9, ["a.w", "b.w"])])
def test_rewrites_of_rules_are_counted(model, capsys, limit, expected):
    text, log = text_of(model, capsys, "--passes", "quantize-weights{head=true}", "--rewrite-limit", str(limit))
    assert quantised(text) == expected
    applied = min(limit, 2)
    assert f"rewrite limit {limit}: {applied} applied" in log
    assert ("quantize-weights" in log.splitlines()[0]) == bool(applied)


def test_the_last_rewrite_is_named_with_its_rule_and_site(model, capsys):
    _, log = text_of(model, capsys, "--passes", "quantize-weights{head=true}", "--rewrite-limit", "1")
    assert "1 applied; the last was quantize-weights" in log
    assert "quantize_weights.py:" in log
    assert log.splitlines()[0].endswith("at 't'")


def test_a_whole_graph_pass_is_one_and_counts_only_if_it_changed_something(model, capsys):
    passes = "fold-constants,fold-constants,quantize-weights{head=true},dead-code"
    two, log = text_of(model, capsys, "--passes", passes, "--rewrite-limit", "2")
    assert "Identity" not in two
    assert quantised(two) == ["a.w"]
    assert "Abs" in two
    four, log = text_of(model, capsys, "--passes", passes, "--rewrite-limit", "4")
    assert "Abs" not in four
    assert "4 applied; the last was dead-code" in log


def test_what_a_pipeline_expects_is_not_asked_of_a_prefix(model, capsys):
    text, _ = text_of(model, capsys, "--passes", "int8", "--rewrite-limit", "0")
    assert quantised(text) == []
    options = ["--passes", "int8", "--rewrite-limit", "0", "--expect", "quantize-weights>=1"]
    assert main(["run", str(model), *options]) == 4


def test_a_pipeline_stops_after_the_first_pass_of_that_name(model, capsys):
    passes = "fold-constants,quantize-weights{head=true},fold-constants,dead-code"
    text, log = text_of(model, capsys, "--passes", passes, "--stop-after", "fold-constants")
    assert "Identity" not in text
    assert quantised(text) == []
    assert "quantize-weights" not in log
    text, log = text_of(model, capsys, "--passes", passes, "--stop-after", "quantize-weights")
    assert quantised(text) == ["a.w", "b.w"]
    assert "Abs" in text


def test_expectations_hold_for_what_ran_whole(model, capsys):
    assert main(["run", str(model), "--passes", "int8{head=true}", "--stop-after", "fold-norm-head", "--dry-run"]) == 0
    small = model.with_name("small.onnxtxt")
    small.write_text('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Abs(x) }')
    assert main(["run", str(small), "--passes", "int8", "--stop-after", "quantize-weights", "--dry-run"]) == 4
    capsys.readouterr()
    assert main(["run", str(model), "--passes", "int8", "--stop-after", "dead-kode"]) == 2
    assert (
        "--stop-after: unknown pass of this pipeline 'dead-kode'; did you mean 'dead-code'" in capsys.readouterr().err
    )


def test_the_output_and_its_manifest_say_what_it_is_a_prefix_of(model, capsys):
    options = ["--passes", "int8{head=true}", "--stop-after", "quantize-weights", "--rewrite-limit", "1"]
    assert main(["run", str(model), *options]) == 0
    folder = model.parent / "graph.int8.until-quantize-weights.limit-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pipeline"] == (
        "fold-norm-head,quantize-weights{embedding=false,head=true,method=auto,from=} # rewrite-limit=1"
    )
    assert "a.w.codes" in load_model(folder).graph.initializers


@pytest.mark.parametrize("number", ["-1", "x"])
def test_a_limit_is_a_number(model, capsys, number):
    with pytest.raises(SystemExit) as stop:
        main(["run", str(model), "--passes", "int8", f"--rewrite-limit={number}"])
    assert stop.value.code == 2
    capsys.readouterr()
