"""`why --node`: every rule of a pass at one node, as its root or inside of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passopt.ir.errors import UsageError
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE
from passopt.passes.explain.node_report import explain_node
from passopt.passes.framework.base import Decline

X = "g (float[3,5] x, float[3,5] y) => (float[3,5] out)"
BODY = "{ s = Tanh(x) m = Mul(x, s) n = Neg(m) out = Abs(n) }"


def soft(op, a):
    return op.Neg(op.Mul(a, op.any_of("gate", sigmoid=op.Sigmoid(a), relu=op.Relu(op.Ceil(a)))))


def twice(op, a):
    return op.Abs(op.Neg(a))


def refuse(op, a):
    raise Decline(f"{a.name} is not wanted")


@pytest.fixture
def lines(parsed, rule):
    """The report of a pass of these rules at a node; the file of the rules is called FILE."""

    def report(name, *rules, text=f"{X} {BODY}"):
        item = rule(None, None)
        item.rules = lambda: list(rules)
        found = explain_node(item, parsed(text), name).lines()
        return [line.replace(Path(__file__).name, "FILE") for line in found]

    return report


def where(function):
    return f"rule {function.__name__} (FILE:{function.__code__.co_firstlineno})"


def test_a_root_shows_all_differences_and_every_label(lines):
    assert lines("n", (soft, lambda op, a: a)) == [
        "test-rule at n (Neg)",
        f"{where(soft)}: starts here",
        "    2 of 3 nodes fit at n (Neg)",
        "      m (Mul), input 1: expected Sigmoid or Relu, found Tanh s",
        "    gate=sigmoid: 2 of 3 nodes fit: m (Mul), input 1: expected Sigmoid, found Tanh s",
        "    gate=relu: 2 of 4 nodes fit: m (Mul), input 1: expected Relu, found Tanh s",
    ]


def test_an_inner_node_shows_the_place_it_belongs_to(lines):
    assert lines("m", (soft, lambda op, a: a)) == [
        "test-rule at m (Mul)",
        f"{where(soft)}: takes this node as an inner one",
        "    2 of 3 nodes fit at n (Neg)",
        "      m (Mul), input 1: expected Sigmoid or Relu, found Tanh s",
    ]


def test_a_match_and_a_decline(lines):
    assert lines("out", (twice, refuse), (twice, lambda op, a: a)) == [
        "test-rule at out (Abs)",
        f"{where(twice)}: starts here",
        "    declines at out (Abs), where all 2 nodes fit",
        "      m is not wanted",
        f"{where(twice)}: starts here",
        "    matches at out (Abs), 2 nodes",
    ]


def test_every_rule_has_a_say(lines):
    assert lines("s", (soft, lambda op, a: a), (twice, lambda op, a: a)) == [
        "test-rule at s (Tanh)",
        f"{where(soft)}: has no Tanh; it starts at Neg",
        f"{where(twice)}: has no Tanh; it starts at Abs",
    ]


def test_an_operator_that_nothing_leads_to(lines):
    text = f"{X} {{ s = Sigmoid(x) out = Abs(s) }}"
    assert lines("s", (soft, lambda op, a: a), text=text)[1:] == [
        f"{where(soft)}: has a Sigmoid inside, but nothing that reads this one fits",
    ]


def test_a_node_is_found_by_its_own_name_and_by_its_values(lines):
    text = f"{X} {{ [first] s = Tanh(x) [second] out = Abs(s) }}"
    assert lines("second", text=text) == lines("out", text=text) == ["test-rule at out (Abs)"]


def test_an_unknown_node_names_the_nearest(lines):
    with pytest.raises(UsageError, match=r"^unknown node 'outt'; did you mean 'out'\?$"):
        lines("outt")
    with pytest.raises(UsageError, match=r"^unknown node 'zzzz'; passopt print shows all\.$"):
        lines("zzzz")


def test_where_the_node_comes_from(parsed, rule):
    model = parsed(f"{X} {BODY}")
    model.graph[2].metadata_props.update(
        {SOURCE: "m.py:7", MODULE: "mlp", MADE_BY: "fold-constants", MADE_FROM: "Neg_4,Neg_5"}
    )
    item = rule(None, None)
    item.rules = list
    assert explain_node(item, model, "n").lines() == [
        "test-rule at n (Neg), m.py:7 in mlp; made by fold-constants from Neg_4,Neg_5"
    ]


def test_json(parsed, rule):
    item = rule(None, None)
    item.rules = lambda: [(soft, lambda op, a: a), (twice, lambda op, a: a)]
    body = json.loads(json.dumps(explain_node(item, parsed(f"{X} {BODY}"), "n").to_json()))
    assert (body["node"], body["op_type"]) == ("Neg_2", "Neg")
    first, second = body["rules"]
    assert (first["rule_name"], first["remark"], first["sites"][0]["matches"]) == ("soft", "starts here", False)
    assert [item["label"] for item in first["spellings"]] == ["sigmoid", "relu"]
    assert first["sites"][0]["differences"][0]["found"] == "Tanh s"
    assert second["sites"] == [{"root": "Abs_3", "matches": True}]
