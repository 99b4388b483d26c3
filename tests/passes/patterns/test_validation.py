"""Patterns that could never match are refused before anything is matched, with the line of the rule."""

from __future__ import annotations

import pytest

from passopt.ir.errors import PassError
from passopt.passes.framework.catalog import catalog, pass_class
from passopt.passes.patterns.language import trace
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import rules_of
from passopt.passes.patterns.validation import check_pattern


def refusal(pattern) -> str:
    with pytest.raises(PassError) as error:
        check_pattern(trace(pattern, "here"), "here")
    return str(error.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda op, a: op.Relu(a, a), "no Relu can match: the pattern has 2 inputs, the operator takes 1"),
        (lambda op, a: op.Where(a, a), "no Where can match: the pattern has 2 inputs, the operator takes 3"),
        (lambda op: op.Max(), "no Max can match: the pattern has 0 inputs, the operator takes 1 or more"),
        (lambda op, a: op.Gather(a, 0, 1), "no Gather can match: the pattern has 3 inputs, the operator takes 2"),
        (
            lambda op, a: op.Relu(a, outputs=2)[0],
            "no Relu can match: the pattern has 2 outputs, the operator gives at most 1",
        ),
        (
            lambda op, a: op.Softmax(a, axes=-1),
            "no Softmax can match: it has no attribute axes, only axis",
        ),
        (lambda op, a: op.Matmul(a, a), "ONNX has no operator Matmul, did you mean MatMul?"),
        (lambda op, a: op.Xyzzy(a), "ONNX has no operator Xyzzy; name its domain, if it is not one of ONNX's"),
        (lambda op, a: op.Max(op.rest("all"), a), "op.rest stands before the last input of Max"),
        (
            lambda op, a: op.Sub(op.any_of("a", x=op.Neg(a), y=a), a),
            "any_of 'a' has the name of something else that the pattern binds",
        ),
        (
            lambda op, a: op.Sub(op.any_of("s", x=op.Neg(a), y=a), op.Abs(a, bind="s")),
            "any_of 's' has the name of something else that the pattern binds",
        ),
        (lambda op, a: op.Neg(a, bind="a"), "bind 'a' has the name of something else that the pattern binds"),
        (
            lambda op, a: op.Sub(op.any_of("s", x=op.Neg(a), y=a), op.any_of("s", x=op.Neg(a), z=a)),
            "one name is one label everywhere",
        ),
        (lambda op, a: op.Sub(op.Neg(a, bind="n"), op.Abs(a, bind="n")), "Neg and Abs both have bind='n'"),
        (
            lambda op, a, b: [op.Neg(a), op.Abs(b)],
            "root 2 (Abs) shares no value with the roots before it, so it cannot be found",
        ),
    ],
)
def test_a_pattern_that_never_matches_is_refused(pattern, message):
    found = refusal(pattern)
    assert found.startswith("here: ")
    assert message in found


@pytest.mark.parametrize(
    "pattern",
    [
        lambda op, a, b: op.ReduceMean(a, b, keepdims=1),  # axes are an input since 18
        lambda op, a: op.ReduceMean(a, axes=[-1]),  # and were an attribute before
        lambda op, a: op.Squeeze(a, axes=[0]),
        lambda op, a: op.Anything(a, a, a, strange=1, domain="com.example"),
        lambda op, a: op.Concat(a, op.rest("others"), axis=0),
        lambda op, a: op.any_of("k", x=op.Neg(a, bind="n"), y=op.Abs(a, bind="n")),
        lambda op, a: op.Sub(op.any_of("k", x=op.Neg(a, bind="n"), y=a), op.any_of("k", x=a, y=op.Abs(a, bind="n"))),
        lambda op, a, b: [op.Neg(op.Abs(a)), op.Mul(op.Relu(op.Abs(a)), b)],
    ],
)
def test_what_some_opset_knows_is_accepted(pattern):
    check_pattern(trace(pattern, "here"), "here")


def test_a_shared_piece_with_a_name_is_one_node():
    def pattern(op, a):
        piece = op.Neg(a, bind="n")
        return op.Sub(piece, op.Abs(piece))

    check_pattern(trace(pattern, "here"), "here")


def test_refused_at_the_first_run_though_nothing_could_match(rule, parsed, source_line):
    def pattern(self, op, a):
        return op.Softmax(a, axes=-1)

    model = parsed("g (float[3,5] x) => (float[3,5] y) { y = Neg(x) }")
    with pytest.raises(PassError) as error:
        rule(pattern, lambda self, op, a: a).run(model)
    assert str(error.value).startswith(f"test-rule ({source_line(pattern)}): no Softmax can match")


def test_the_rules_of_all_passes_are_sound():
    checked = 0
    for cls in map(pass_class, catalog()):
        if issubclass(cls, RewritePass):
            checked += len(rules_of(cls()))
    assert checked > 0
