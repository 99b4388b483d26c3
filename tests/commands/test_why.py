"""`passopt why` on the command line: what runs first, what is explained, exit codes."""

from __future__ import annotations

import json

import pytest

from passopt.cli import main

GRAPH = """<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,seq,4] x) => (float[batch,seq,6] logits)
<float[6,4] w = random> {
    [turn] t = Transpose<perm = [1, 0]>(w)
    [same] i = Identity(t)
    [head] logits = MatMul(x, i)
}
"""


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "graph.onnxtxt"
    path.write_text(GRAPH)
    return path


@pytest.fixture
def why(graph, capsys):
    """Run the command on the graph; returns (exit code, lines of stdout, stderr)."""

    def run(*arguments, text=None):
        if text is not None:
            graph.write_text(text)
        name, *rest = arguments
        code = main(["why", name, str(graph), *rest])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def test_the_graph_as_it_is(why):
    code, lines, _ = why("inject-norm-head-bias")
    assert code == 0
    assert lines[:4] == [
        "inject-norm-head-bias: matched 0 times, declined 0 times, came near at 1 places",
        "inject-norm-head-bias belongs after fold-norm-head; give a pipeline with --in, or passes with --after",
        "1. all 2 nodes fit, but not next to each other at logits (MatMul)",
        "    logits (MatMul), input 1: expected Transpose, found Identity i with Transpose behind it",
    ]


def test_passes_can_run_first(why):
    code, lines, _ = why("inject-norm-head-bias", "--after", "fold-constants")
    assert (code, lines) == (
        0,
        ["inject-norm-head-bias: matched 1 times, declined 0 times, came near at 0 places"],
    )


def test_the_steps_of_a_pipeline_before_the_pass_run_first(why):
    code, lines, _ = why("quantize-weights", "--in", "fold-constants,int8,tp")
    assert code == 0
    assert lines[0] == "quantize-weights: matched 0 times, declined 1 times, came near at 0 places"
    assert lines[1:3] == ["1. declined at t (Transpose)", "    w is the head; int8{head=true} includes it"]


def test_options_come_from_the_pipeline_or_from_the_pass(why):
    for arguments in (["quantize-weights", "--in", "fold-constants,int8{head=true}"],
                      ["quantize-weights{head=true}", "--in", "fold-constants,int8"],
                      ["quantize-weights{head=true}", "--after", "fold-constants"]):  # fmt: skip
        code, lines, _ = why(*arguments)
        assert (code, lines[0].split(",")[0]) == (0, "quantize-weights: matched 1 times")


def test_one_node(why):
    code, lines, _ = why("inject-norm-head-bias", "--node", "head")
    assert code == 0
    assert lines[0] == "inject-norm-head-bias at logits (MatMul)"
    assert lines[2:] == [
        "    all 2 nodes fit, but not next to each other at logits (MatMul)",
        "      logits (MatMul), input 1: expected Transpose, found Identity i with Transpose behind it",
    ]


def test_json_of_a_report_and_of_a_node(why):
    code, lines, _ = why("inject-norm-head-bias", "--json")
    assert code == 0
    assert json.loads("\n".join(lines))["groups"][0]["sites"] == ["logits"]
    code, lines, _ = why("inject-norm-head-bias", "--json", "--node", "logits")
    assert code == 0
    assert json.loads("\n".join(lines))["node"] == "head"


def test_the_model_file_is_not_touched(why, graph):
    before = sorted(graph.parent.iterdir()), graph.read_bytes()
    why("fold-constants")
    assert (sorted(graph.parent.iterdir()), graph.read_bytes()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inject-norm-head-biass"], "unknown pass 'inject-norm-head-biass'; did you mean 'inject-norm-head-bias'"),
        (["int8"], "int8 is a pipeline; choose one of its passes with --in int8: fold-norm-head, quantize-weights, "
         "quantize-activations, dead-code"),
        (["cse,dead-code"], "'cse,dead-code' is a pipeline; why explains one pass, the others go into --after"),
        (["cse", "--in", "int8"], "--in: unknown pass of int8 'cse'"),
        (["cse,dead-code", "--in", "int8"], "'cse,dead-code' is a pipeline; why explains one pass"),
        (["inject-norm-head-bias", "--node", "hed"], "unknown node 'hed'; did you mean 'head'?"),
        (["dead-code", "--node", "head"], "dead-code has no rules that could be tried at a node; leave --node away"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_a_usage_error(why, arguments, message):
    code, lines, error = why(*arguments)
    assert (code, lines) == (2, [])
    assert f"passopt why: {message}" in error


def test_a_pass_that_fails_before_it_is_its_error(why):
    code, lines, error = why("dead-code", "--after", "shard{degree=5}")
    assert (code, lines) == (2, [])
    assert "shard: degree 5 does not divide" in error


def test_an_unmet_expectation_of_run_prints_the_same_explanation(graph, capsys):
    arguments = ["run", str(graph), "--passes", "inject-norm-head-bias", "--expect", "inject-norm-head-bias==1"]
    assert main([*arguments, "--dry-run"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("passopt run: expected inject-norm-head-bias==1: matched 0 times, tried 1 nodes")
    assert lines[2] == "    logits (MatMul), input 1: expected Transpose, found Identity i with Transpose behind it"


def test_a_negative_limit_is_refused(why, capsys):
    with pytest.raises(SystemExit) as stopped:
        why("cse", "--limit", "-1")
    assert stopped.value.code == 2
    assert "-1 is negative" in capsys.readouterr().err
