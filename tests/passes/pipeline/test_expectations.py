"""What must hold after a pipeline: counted, and explained where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from passopt.ir.errors import ExpectationError, UsageError
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.expectations import parse_expectation
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


def unmet(model, passes, text):
    """The lines of the message of an expectation that does not hold."""
    names = [item.name for item in passes]
    with pytest.raises(ExpectationError) as found:
        run_passes(model, passes, expectations=[parse_expectation(text, names)])
    return str(found.value).splitlines()


def matching(count, tries=9, **declines):
    result = PassResult(matches=count, tries=tries)
    result.declines.update(declines)
    return made("mine", lambda model: result)


@pytest.mark.parametrize(
    ("text", "count", "holds"),
    [
        ("mine==2", 2, True),
        ("mine==2", 3, False),
        ("mine>=2", 3, True),
        ("mine>=2", 1, False),
        ("mine<=2", 0, True),
        ("mine <= 2", 3, False),
        ("mine<=2", 2, True),
        ("mine>=2", 2, True),
        ("mine==num_layers", 2, True),
        ("mine==num_layers", 3, False),
    ],
)
def test_expectations(text, count, holds):
    model = tiny_decoder()
    expectation = parse_expectation(text, ["mine"])
    if holds:
        run_passes(model, [matching(count)], expectations=[expectation])
        return
    with pytest.raises(ExpectationError, match=f"matched {count} times, tried 9 nodes") as found:
        run_passes(model, [matching(count)], expectations=[expectation])
    assert found.value.exit_code == 4


def test_matches_of_a_repeated_pass_are_added(model):
    run_passes(model, [matching(1), matching(2)], expectations=[parse_expectation("mine==3", ["mine"])])


def test_an_unmet_expectation_lists_why_the_pass_declined(model):
    assert unmet(model, [matching(0, big=3, odd=5)], "mine==1") == [
        "expected mine==1: matched 0 times, tried 9 nodes",
        "mine works on the whole graph, by no rule that could come near; it changes nothing here",
        "1. declined × 3",
        "    big",
        "2. declined × 5",
        "    odd",
    ]


def test_an_unmet_expectation_explains_the_nearest_miss(rule, model, source_line):
    def pattern(self, op, a):
        return op.Neg(op.Identity(op.Identity(a)))

    item = rule(pattern, lambda self, op, a: a)
    assert unmet(model, [item], "test-rule>=1") == [
        "expected test-rule>=1: matched 0 times, tried 1 nodes",
        "1. 2 of 3 nodes fit at y (Neg)",
        "    one (Identity), input 0: expected Identity, found the graph input float[3] x",
        f"    rule pattern ({Path(source_line(pattern)).name})",
    ]


def test_the_graph_is_explained_as_the_pass_left_it(rule, model):
    """Later passes may change what came near: here nothing is left of it."""
    item = rule(lambda self, op, a: op.Neg(op.Identity(op.Identity(a))), lambda self, op, a: a)
    lines = unmet(model, [item, FoldConstants()], "test-rule>=1")
    assert lines[1] == "1. 2 of 3 nodes fit at y (Neg)"


def test_too_many_matches_are_not_explained_by_misses(model):
    assert unmet(model, [matching(3)], "mine<=2") == ["expected mine<=2: matched 3 times, tried 9 nodes"]


def test_a_message_has_at_most_20_lines(rule, parsed):
    kinds = ["Abs", "Exp", "Sqrt", "Floor", "Ceil", "Sigmoid", "Tanh"]
    body = " ".join(f"u{i} = {kind}(x) v{i} = Relu(u{i}) w{i} = Neg(v{i})" for i, kind in enumerate(kinds))
    outputs = ", ".join(f"float[3] w{i}" for i in range(len(kinds)))
    item = rule(lambda self, op, a: op.Neg(op.Relu(op.Log(a))), lambda self, op, a: a)
    lines = unmet(parsed(f"g (float[3] x) => ({outputs}) {{ {body} }}"), [item], "test-rule==7")
    assert len(lines) <= 20
    assert lines[-1] == "and 3 places of 3 more kinds, less near (`limit=0` shows all)"


def making(name, *operators):
    """A pass that matches nothing and stands for these operators."""
    item = made(name, lambda model: None)
    type(item).makes = operators
    return item


def test_what_a_pass_makes_is_counted_in_the_final_graph(model):
    """Whoever made it: a model that was fused before, or by the exporter, holds what it should."""
    run_passes(model, [making("mine", "Neg", "other::Fused")], expectations=[parse_expectation("mine==1", ["mine"])])


def test_what_a_pass_makes_may_be_an_operator_of_another_domain(parsed):
    text = """g (float[3] x) => (float[3] y) { a = other.Fused(x) b = other.Neg(a) y = Neg(b) }"""
    model = parsed(text)
    model.graph.opset_imports["other"] = 1
    expected = [parse_expectation("mine==2", ["mine"])]
    run_passes(model, [making("mine", "Neg", "other::Fused")], expectations=expected)


def test_a_local_function_is_one_node_whatever_its_body_holds(parsed):
    model = parsed(
        """g (float[3] x) => (float[3] y) { y = other.Twice(x) }
        <domain: "other", opset_import: ["" : 21]> Twice (a) => (c) { b = Neg(a) c = Neg(b) }"""
    )
    model.graph.opset_imports["other"] = 1
    run_passes(model, [making("mine", "Neg")], expectations=[parse_expectation("mine==0", ["mine"])])


def test_what_is_decomposed_on_purpose_is_counted_before(model):
    def run(model):
        model.graph[-1].op_type = "Abs"

    later = made("later", run)
    expected = [parse_expectation("mine==1", ["mine"])]
    with pytest.raises(ExpectationError, match="the graph has 0 nodes Neg"):
        run_passes(model.clone(), [making("mine", "Neg"), later], expectations=expected)
    type(later).decomposes = ("Neg",)
    run_passes(model.clone(), [making("mine", "Neg"), later], expectations=expected)


def test_operators_that_are_missing_are_named(model):
    lines = unmet(model, [making("mine", "Attention", "passopt::AlibiAttention")], "mine==2")
    assert lines[0] == (
        "expected mine==2: the graph has 0 nodes Attention or passopt::AlibiAttention; matched 0 times, tried 0 nodes"
    )


def test_operators_that_a_later_pass_took_away_are_not_blamed_on_the_fusion(model):
    lines = unmet(model, [making("mine", "Identity"), FoldConstants()], "mine==1")
    assert lines == [
        "expected mine==1: the graph has 0 nodes Identity; matched 0 times, tried 0 nodes",
        "it held when mine had run: a later pass took some away",
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("mine==2*num_layers", 4),
        ("mine==2*num_layers+1", 5),
        ("mine == 3 * num_layers - 2", 4),
        ("mine==1+num_layers", 3),
        ("mine==num_layers+num_layers", 4),
        ("mine==7-2", 5),
    ],
)
def test_counts_are_small_arithmetic(text, count):
    expectation = parse_expectation(text, ["mine"])
    run_passes(tiny_decoder(), [matching(count)], expectations=[expectation])
    (line,) = unmet(tiny_decoder(), [matching(count + 1)], text)
    assert line == f"expected {expectation} (that is {count}): matched {count + 1} times, tried 9 nodes"


def test_a_number_that_stands_there_is_not_said_twice():
    (line,) = unmet(tiny_decoder(), [matching(4)], "mine==3")
    assert line == "expected mine==3: matched 4 times, tried 9 nodes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", "write PASS==N, PASS>=N or PASS<=N"),
        ("mine=2", "write PASS==N"),
        ("mine==two", "write PASS==N"),
        ("mine==-1", "write PASS==N"),
        ("mine==num_layers*2", "write PASS==N"),
        ("mine==2*layers", "write PASS==N"),
        ("mine==2+", "write PASS==N"),
        ("mine==num_layers2", "write PASS==N"),
        ("mien==2", "unknown pass of this pipeline 'mien'; did you mean 'mine'"),
    ],
)
def test_bad_expectations_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_expectation(text, ["mine"])


def test_the_number_of_layers_is_that_of_a_decoder(model):
    with pytest.raises(UsageError, match="but num_layers is unknown"):
        run_passes(model, [matching(1)], expectations=[parse_expectation("mine==num_layers", ["mine"])])
