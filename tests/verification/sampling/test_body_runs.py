"""Branches and bodies that ran in no sample are named, however deep they lie."""

from __future__ import annotations

import re

import pytest

from passopt.testing.checking import read_model
from passopt.verification.sampling.trace import trace
from passopt.verification.verify import verify

NEVER = "<float k = {-1}> { s = ReduceSumSquare <keepdims = 0> (x) c = Less(s, k) "
ALWAYS = NEVER.replace("Less", "Greater")
BRANCH = "If <then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Exp(x) }> (c)"
LOOP = """l = Loop <body = b (int64 i, bool go, float[2] a) => (bool more, float[2] z) {
    more = Identity(go) z = INNER }> (count, yes, x)"""
AT_ROUND = "k = Constant <value_int = N> () c = Equal(i, k)"
SCAN = "r, o = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] i) => (float[2] z, float[2] u) { z = INNER }>"
IN_A_FUNCTION = """(float[2] x, bool c) => (float[2] y) { y = d.f(x) }
    <domain: "d", opset_import: ["" : 21]> f (x) => (y) { k = Constant <value_float = -1.0> ()
        s = ReduceSumSquare <keepdims = 0> (x) c = Less(s, k) y = BRANCH }""".replace("BRANCH", BRANCH)

#: (the graph, the places that are named)
PLACES = [
    (f"(float[2] x, bool c) => (float[2] y) {{ y = {BRANCH} }}", []),
    (f"(float[2] x) => (float[2] y) {NEVER} y = {BRANCH} }}", ["then_branch of If y"]),
    (f"(float[2] x) => (float[2] y) {ALWAYS} y = {BRANCH} }}", ["else_branch of If y"]),
    (f"(float[2] x) => (float[2] y) {ALWAYS} [named] y = {BRANCH} }}", ["else_branch of If y"]),
    (
        f"(float[2] x, bool b) => (float[2] y) {NEVER} y = If <then_branch = t2 () => (float[2] v) {{ v = {BRANCH} }}, "
        f"else_branch = e2 () => (float[2] w) {{ w = Relu(x) }}> (b) }}",
        ["then_branch of If v, in then_branch of If y"],
    ),
    (
        f"(float[2] x) => (float[2] y) {NEVER} y = If <then_branch = t2 () => (float[2] v) {{ v = {BRANCH} }}, "
        f"else_branch = e2 () => (float[2] w) {{ w = Relu(x) }}> (c) }}",
        [
            "then_branch of If y",
            "then_branch of If v, in then_branch of If y",
            "else_branch of If v, in then_branch of If y",
        ],
    ),
    (
        f"(float[2] x, bool c) => (float[2] y) <int64 count = {{0}}, bool yes = {{1}}> "
        f"{{ {LOOP.replace('INNER', BRANCH)} y = Neg(l) }}",
        [
            "body of Loop l",
            "then_branch of If z, in body of Loop l",
            "else_branch of If z, in body of Loop l",
        ],
    ),
    (
        f"(float[2] x) => (float[2] y) <int64 count = {{3}}, bool yes = {{1}}> "
        f"{{ {LOOP.replace('INNER', BRANCH).replace('z = If', AT_ROUND.replace('N', '1') + ' z = If')} "
        f"y = Neg(l) }}",
        [],
    ),
    (
        f"(float[2] x) => (float[2] y) <int64 count = {{3}}, bool yes = {{1}}> "
        f"{{ {LOOP.replace('INNER', BRANCH).replace('z = If', AT_ROUND.replace('N', '7') + ' z = If')} "
        f"y = Neg(l) }}",
        ["then_branch of If z, in body of Loop l"],
    ),
    (
        f"(float[2] x, float[3,2] rows) => (float[2] y, float[3,2] o) {NEVER.replace('{ s', '{ s')} "
        f"{SCAN.replace('INNER', BRANCH + ' u = Neg(i)')} (x, rows) y = Identity(r) }}",
        ["then_branch of If z, in body of Scan r"],
    ),
    (
        f"(float[2] x, float[3,2] rows) => (float[2] y, float[2,3] o) "
        f"{{ {SCAN.replace('INNER', 'Add(a, i) u = Neg(i)').replace('<num', '<scan_output_axes = [1], num')} (x, rows) "
        f"y = Identity(r) }}",
        [],
    ),
    (
        "(seq(float[2]) x) => (seq(float[2]) y) { y = SequenceMap <body = b (float[2] i) => (float[2] o) "
        "{ o = Neg(i) }> (x) }",
        [],
    ),
    (IN_A_FUNCTION, ["then_branch of If y"]),
]


def read(text):
    imports = '["" : 21, "d" : 1]' if "d.f" in text else '["" : 21]'
    return read_model(f"<ir_version: 10, opset_import: {imports}> g {text}")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0][:70])
def test_bodies_that_never_ran_are_named(place):
    text, names = place
    found = trace(read(text))
    assert found.runs, found.problem
    assert [re.sub(r"\w+ \((\w+)\)", r"\1", place) for place in found.unrun] == names


def test_verify_says_which_branch_was_not_compared():
    text = f"(float[2] x) => (float[2] y) {NEVER} y = {BRANCH} }}"
    report = verify(read(text), read(text))
    assert report.ok
    assert any(
        note.startswith("not compared: the then_branch of If ")
        and note.endswith(" (y), since none of the inputs let it run")
        for note in report.notes
    )
    text = f"(float[2] x, bool c) => (float[2] y) {{ y = {BRANCH} }}"
    assert not any(note.startswith("not compared") for note in verify(read(text), read(text)).notes)
