"""Running a pipeline: verified, counted and explained after every pass."""

from __future__ import annotations

import pytest

from passopt.ir.errors import ModelError, PassError, VerifyError
from passopt.ir.serialization.model_files import load_model
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes.cleanup.dead_code import RemoveDeadCode
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.defects import NEXT_STEP
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.instruments import Dump, PrintAfter, rule_table, summary_table
from passopt.passes.pipeline.runner import run_passes
from passopt.testing.decoders import tiny_decoder

TEXT = "g (float[3] x) => (float[3] y) { dead = Exp(x) one = Identity(x) y = Neg(one) }"


def made(name, run):
    """A pass from a function of the model."""
    cls = type("Made", (Pass,), {"run": lambda self, model: run(model) or PassResult()})
    cls.name = name
    return cls()


@pytest.fixture
def model(parsed):
    return parsed(TEXT)


def test_passes_run_in_the_order_given_and_are_recorded(model):
    first, second = run_passes(model, [RemoveDeadCode(), FoldConstants()])
    assert (first.name, first.nodes_before, first.nodes_after, first.result.matches) == ("dead-code", 3, 2, 1)
    assert (second.name, second.nodes_before, second.nodes_after) == ("fold-constants", 2, 1)
    assert first.seconds >= 0
    assert set(first.to_json()) == {
        "pass",
        "modified",
        "matches",
        "tries",
        "declines",
        "rules",
        "notes",
        "cpu_seconds",
        "nodes_before",
        "nodes_after",
    }


def fail(error):
    def run(model):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (PassError("wrong degree"), PassError, "mine: wrong degree (passes before it: dead-code, fold-constants)"),
        (PassError("mine: wrong"), PassError, "mine: wrong (passes before it: dead-code, fold-constants)"),
        (ModelError("no file"), ModelError, "mine: no file (passes before it: dead-code, fold-constants)"),
    ],
)
def test_errors_name_the_pass_and_those_before_it(model, error, kind, text):
    with pytest.raises(kind) as found:
        run_passes(model, [RemoveDeadCode(), FoldConstants(), made("mine", fail(error))])
    assert str(found.value) == text
    assert found.value.exit_code == kind.exit_code


def test_an_unexpected_error_names_the_line_and_the_node_at_work(model):
    def run(model):
        for node in model.graph:
            node.inputs[7]

    with pytest.raises(PassError) as found:
        run_passes(model, [RemoveDeadCode(), made("mine", run)])
    first, site, step = str(found.value).splitlines()
    line = run.__code__.co_firstlineno + 2
    assert first.startswith("mine: failed with IndexError: tuple index out of range, at ")
    assert f"test_runner.py:{line}: `node.inputs[7]` (passes before it: dead-code)" in first
    assert site == f"site: Identity {model.graph[0].name!r}, which makes one"
    assert step == NEXT_STEP


def test_the_first_pass_has_none_before_it(model):
    with pytest.raises(PassError, match=r"passes before it: none"):
        run_passes(model, [made("mine", fail(ValueError("x")))])


def test_an_unexpected_error_keeps_its_cause(model):
    cause = ZeroDivisionError("x")
    with pytest.raises(PassError) as found:
        run_passes(model, [made("mine", fail(cause))])
    assert found.value.__cause__ is cause


def breaks(model):
    model.graph.remove(model.graph[1])


def test_the_structure_is_verified_after_each_pass(model):
    with pytest.raises(VerifyError) as found:
        run_passes(model, [RemoveDeadCode(), made("mine", lambda m: m.graph.remove(m.graph[0])), FoldConstants()])
    assert str(found.value).startswith("mine left a broken graph (passes before it: dead-code): Neg")
    assert "-->" in str(found.value)


def test_a_broken_model_is_not_blamed_on_a_pass(model):
    breaks(model)
    with pytest.raises(VerifyError) as found:
        run_passes(model, [RemoveDeadCode()])
    assert "left a broken graph" not in str(found.value)


def test_verification_can_be_left_out(model):
    run_passes(model, [made("mine", breaks)], verify=False)


def test_instruments_see_the_model_after_each_pass(model):
    printed = []
    run_passes(model, [FoldConstants(), RemoveDeadCode(), RemoveDeadCode()], instruments=[PrintAfter(printed.append)])
    assert [text.splitlines()[0] for text in printed] == [
        "# after 1: fold-constants",
        "# after 2: dead-code",
        "# after 3: dead-code",
    ]
    assert printed[-1].partition("\n")[2] == print_model(model)


@pytest.mark.parametrize(
    ("settings", "count"), [({"only_changes": True}, 2), ({"names": ("dead-code",)}, 2), ({"names": ("shard",)}, 0)]
)
def test_printing_can_be_restricted(model, settings, count):
    printed = []
    passes = [FoldConstants(), RemoveDeadCode(), RemoveDeadCode()]
    run_passes(model, passes, instruments=[PrintAfter(printed.append, **settings)])
    assert len(printed) == count


def test_dumps_are_models_that_load(tmp_path):
    model = tiny_decoder()
    before = model.clone()
    run_passes(model, [FoldConstants(), RemoveDeadCode()], instruments=[Dump(tmp_path / "dump")])
    folders = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert folders == ["01-fold-constants", "02-dead-code"]
    assert print_model(load_model(tmp_path / "dump" / folders[-1])) == print_model(model)
    assert print_model(model) != print_model(before)
    assert not list((tmp_path / "dump").rglob("*.safetensors"))


def test_the_table_has_a_line_per_pass(model):
    records = run_passes(model, [FoldConstants(), RemoveDeadCode()])
    lines = summary_table(records).splitlines()
    assert [line.split() for line in lines] == [
        ["pass", "matches", "declined", "nodes"],
        ["fold-constants", "1", "0", "3", "→", "2"],
        ["dead-code", "1", "0", "2", "→", "1"],
    ]
    assert summary_table(records, times=True).splitlines()[0].endswith("CPU ms")


def test_declines_are_counted_in_the_record(rule, model):
    def rewrite(self, op, a):
        raise Decline("never")

    (record,) = run_passes(model, [rule(lambda self, op, a: op.Neg(a), rewrite)])
    assert record.to_json()["declines"] == {"never": 1}


def test_statistics_of_rules_are_in_the_record_and_timed_on_request(rule, model):
    item = rule(lambda self, op, a: op.Neg(a), lambda self, op, a: op.Sub(0.0, a))
    (record,) = run_passes(model, [item], time_rules=True)
    (statistics,) = record.to_json()["rules"]
    assert (statistics["rule"], statistics["tries"], statistics["hits"]) == ("<lambda>", 1, 1)
    assert statistics["source"].rpartition(":")[0].endswith("test_runner.py")
    assert statistics["cpu_seconds"] >= 0


def test_the_table_of_rules_has_a_line_per_rule_and_the_reasons_below(rule, model):
    reasons = iter("abcdefg")

    def rewrite(self, op, a):
        raise Decline(f"reason {next(reasons)}\nin two lines")

    text = "g (float[3] x) => (float[3] y) {" + "".join(f" n{i} = Neg(x)" for i in range(7)) + " y = Exp(x) }"
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    item = rule(lambda self, op, a: op.Neg(a), rewrite)
    header, line, *rest = rule_table(run_passes(model, [item])).splitlines()
    assert header.split() == ["pass", "rule", "tries", "hits", "declined", "CPU", "ms", "defined", "in"]
    assert line.split()[:6] == ["test-rule", "<lambda>", "7", "0", "7", "-"]
    assert rest == [*(f"    1 × reason {letter}" for letter in "abcde"), "    and 2 other reasons"]
    assert rule_table(run_passes(model, [RemoveDeadCode()])) == "no pass of this pipeline has rules"
