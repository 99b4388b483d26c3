"""The driver of rewrite passes: what it applies, leaves, counts and refuses. Numbers are checked by `check`."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.errors import PassError, VerifyError
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM
from passopt.ir.graph.run_context import RunContext
from passopt.ir.serialization.text import print_model
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.testing.checking import check

X = "g (float[3,5] x, float[3,5] y)"


@pytest.fixture
def checked(parsed):
    """Run a rule with every check of `check`; returns (operators of the result, result, model)."""

    def run(item, text, **settings):
        item.accuracy = REASSOCIATED
        model, result = check(item, parsed(text), **settings)
        return [node.op_type for node in model.graph], result, model

    return run


@pytest.fixture
def double_negation(rule):
    return rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: op.Identity(a))


def test_a_match_is_replaced_and_what_died_is_removed(checked, double_negation):
    operators, result, _ = checked(
        double_negation, f"{X} => (float[3,5] out) {{ p = Neg(x) q = Neg(p) out = Sub(q, y) }}"
    )
    assert operators == ["Identity", "Sub"]
    assert (result.matches, result.modified) == (1, True)


def test_a_shared_interior_value_stays(checked, double_negation):
    operators, _, _ = checked(double_negation, f"{X} => (float[3,5] out) {{ p = Neg(x) q = Neg(p) out = Sub(q, p) }}")
    assert operators == ["Neg", "Identity", "Sub"]


def test_an_interior_value_that_is_an_output_stays(checked, double_negation):
    operators, _, model = checked(double_negation, f"{X} => (float[3,5] p, float[3,5] q) {{ p = Neg(x) q = Neg(p) }}")
    assert sorted(operators) == ["Identity", "Neg"]
    assert [value.name for value in model.graph.outputs] == ["p", "q"]


def test_every_match_of_a_chain_is_found(checked, double_negation):
    operators, result, _ = checked(
        double_negation,
        f"{X} => (float[3,5] out) {{ a = Neg(x) b = Neg(a) c = Neg(b) d = Neg(c) e = Neg(d) out = Neg(e) }}",
    )
    assert "Neg" not in operators
    assert result.matches == 3


def test_a_rewrite_far_upstream_completes_a_match(checked, rule):
    """The Neg at the end matches only when, two operators above it, the second rewrite has made a Mul."""
    item = rule(None, None)
    item.rules = lambda: [
        (lambda op, a: op.Neg(op.Floor(op.Mul(a, 2.0))), lambda op, a: op.Ceil(op.Mul(a, -2.0))),
        (lambda op, a: op.Sub(op.Abs(a), op.Neg(a)), lambda op, a: op.Add(op.Abs(a), a)),
        (lambda op, a: op.Add(op.Abs(a), a), lambda op, a: op.Mul(op.Relu(a), 2.0)),
    ]
    text = f"{X} => (float[3,5] out) {{ p = Abs(x) n = Neg(x) s = Sub(p, n) f = Floor(s) out = Neg(f) }}"
    operators, result, _ = checked(item, text)
    assert operators == ["Relu", "Mul", "Ceil"]
    assert result.matches == 3


def test_results_keep_the_names_of_graph_outputs(checked, rule):
    item = rule(lambda self, op, a, b: op.Add(a, b), lambda self, op, a, b: op.Sub(a, op.Neg(b)))
    _, _, model = checked(item, f"{X} => (float[3,5] out, float[3,5] two) {{ out = Add(x, y) two = Relu(out) }}")
    assert [value.name for value in model.graph.outputs] == ["out", "two"]


def test_a_graph_input_as_result_of_a_graph_output(checked, rule):
    """An output cannot take the name of an input: an Identity stands between."""
    item = rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: a)
    operators, _, model = checked(item, f"{X} => (float[3,5] out) {{ p = Neg(x) out = Neg(p) }}")
    assert operators == ["Identity"]
    assert [value.name for value in model.graph.inputs] == ["x", "y"]
    assert model.graph.outputs[0].name == "out"


def test_a_constant_as_result(checked, rule):
    item = rule(
        lambda self, op, a: op.Sub(a, a), lambda self, op, a: op.initializer("zeros", np.zeros((3, 5), np.float32))
    )
    operators, _, model = checked(item, f"{X} => (float[3,5] out) {{ p = Sub(x, x) out = Add(p, y) }}")
    assert operators == ["Add"]
    assert list(model.graph.initializers) == ["zeros"]


def test_several_roots_are_replaced_together(checked, rule):
    def pattern(self, op, a, b):
        shared = op.Relu(a)
        return [op.Neg(shared), op.Mul(shared, b)]

    def rewrite(self, op, a, b):
        shared = op.Max(a, 0.0)
        return [op.Sub(0.0, shared), op.Mul(b, shared)]

    item = rule(pattern, rewrite)
    operators, result, model = checked(
        item, f"{X} => (float[3,5] n, float[3,5] m) {{ r = Relu(x) n = Neg(r) m = Mul(r, y) }}"
    )
    assert operators == ["Max", "Sub", "Mul"]
    assert result.matches == 1
    assert [value.name for value in model.graph.outputs] == ["n", "m"]


def test_one_result_for_two_graph_outputs(checked, rule):
    item = rule(
        lambda self, op, a: [op.Neg(op.Neg(a)), op.Abs(op.Abs(a))],
        lambda self, op, a: [(total := op.Add(a, 0.0)), total],
    )
    feeds = {"x": np.arange(15, dtype=np.float32).reshape(3, 5)}
    text = f"{X} => (float[3,5] p, float[3,5] q) {{ n = Neg(x) p = Neg(n) m = Abs(x) q = Abs(m) }}"
    _, _, model = checked(item, text, feeds=feeds)
    assert [value.name for value in model.graph.outputs] == ["p", "q"]


def test_what_a_late_root_reads_may_come_after_users_of_the_first(checked, rule):
    """`used` reads the first root before the second root's operand exists; the order is restored."""

    def pattern(self, op, a, b):
        shared = op.Relu(a)
        return [op.Neg(shared), op.Mul(shared, op.Tanh(b))]

    def rewrite(self, op, a, b):
        late = op.Mul(op.Tanh(b), 0.0)
        shared = op.Add(op.Max(a, 0.0), late)
        return [op.Neg(shared), op.Mul(shared, op.Tanh(b))]

    body = "r = Relu(x) n = Neg(r) used = Abs(n) t = Sigmoid(y) h = Tanh(t) m = Mul(r, h)"
    operators, result, _ = checked(rule(pattern, rewrite), f"{X} => (float[3,5] used, float[3,5] m) {{ {body} }}")
    assert result.matches == 1
    assert operators.index("Abs") > operators.index("Tanh")


def test_roots_that_would_depend_on_each_other_are_an_error(rule, parsed):
    """The second root reads what is computed from the first: one node for both would be a cycle."""

    def pattern(self, op, a, b):
        shared = op.Relu(a)
        return [op.Neg(shared), op.Mul(shared, op.Tanh(b))]

    def rewrite(self, op, a, b):
        return op.Split(op.Concat(a, b, axis=0), [3, 3], axis=0, outputs=2)

    model = parsed(f"{X} => (float[3,5] m) {{ r = Relu(x) n = Neg(r) t = Abs(n) h = Tanh(t) m = Mul(r, h) }}")
    with pytest.raises(VerifyError, match="test-rule: .* would depend on themselves"):
        rule(pattern, rewrite).run(model)


def test_declines_are_counted_by_reason_and_change_nothing(rule, parsed):
    def rewrite(self, op, a):
        op.Abs(a)
        raise Decline("odd" if a.name == "x" else f"{a.name} is even")

    model = parsed(f"{X} => (float[3,5] out) {{ a = Relu(x) b = Relu(x) c = Relu(y) d = Add(a, b) out = Add(d, c) }}")
    before = print_model(model)
    result = rule(lambda self, op, a: op.Relu(a), rewrite).run(model)
    assert result.declines == {"odd": 2, "y is even": 1}
    assert (result.tries, result.matches, result.modified) == (3, 0, False)
    assert print_model(model) == before
    assert len(model.graph.inputs[0].uses()) == 2


def test_the_rewriter_declines_what_is_not_constant(rule, parsed):
    text = f"{X} => (float[3,5] out) <float[5] c = {{1,2,3,4,5}}> {{ a = Add(x, c) out = Add(a, y) }}"
    pattern = lambda self, op, a, b: op.Add(a, b)  # noqa: E731
    small = rule(pattern, lambda self, op, a, b: op.Sub(a, -op.constant(b))).run(parsed(text))
    assert small.matches == 1
    assert small.declines["y is not a small constant"] == 1
    weight = rule(pattern, lambda self, op, a, b: op.Sub(a, op.initializer("w", op.weight(b))))
    assert weight.run(parsed(text)).declines["y is not a constant weight"] == 1


def test_new_nodes_say_who_made_them_from_what(checked, rule):
    item = rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: op.Add(a, 0.0))
    _, _, model = checked(item, f"{X} => (float[3,5] out) {{ [first] p = Neg(x) [second] out = Neg(p) }}")
    (node,) = model.graph
    assert node.metadata_props[MADE_BY] == "test-rule"
    assert set(node.metadata_props[MADE_FROM].split(",")) == {"first", "second"}


def test_new_names_are_unique(checked, rule):
    item = rule(
        lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: op.Mul(a, op.initializer("one", np.float32([1])))
    )
    text = f"{X} => (float[3,5] o, float[3,5] p) <float[1] one = {{1}}>"
    text += " { a = Neg(x) o = Neg(a) b = Neg(y) c = Neg(b) p = Mul(c, one) }"
    _, result, model = checked(item, text)
    assert result.matches == 2
    assert sorted(model.graph.initializers) == ["one", "one.2", "one.3"]


def test_later_rules_are_tried_where_earlier_ones_decline(checked, rule):
    def refuse(op, a):
        raise Decline("not I")

    item = rule(None, None)
    item.rules = lambda: [(lambda op, a: op.Neg(a), refuse), (lambda op, a: op.Neg(a), lambda op, a: op.Sub(0.0, a))]
    operators, result, _ = checked(item, f"{X} => (float[3,5] out) {{ p = Neg(x) out = Add(p, y) }}")
    assert operators == ["Sub", "Add"]
    assert result.declines == {"not I": 1}


def refused(item, parsed):
    model = parsed(f"{X} => (float[3,5] out) {{ p = Neg(x) out = Add(p, y) }}")
    with pytest.raises(PassError) as error:
        item.run(model)
    return str(error.value)


def test_a_rewrite_that_wants_an_unknown_variable_is_refused(rule, parsed, source_line):
    def pattern(self, op, a):
        return op.Neg(a)

    message = refused(rule(pattern, lambda self, op, a, b, c: a), parsed)
    assert message == f"test-rule ({source_line(pattern)}): rewrite takes b, c, which the pattern does not bind"


def test_an_unused_variable_is_refused_with_the_line_of_the_rule(rule, parsed, source_line):
    def pattern(self, op, a, b):
        return op.Neg(a)

    message = refused(rule(pattern, lambda self, op, a: a), parsed)
    assert message == f"test-rule ({source_line(pattern)}): the pattern never uses its parameters b"


def test_a_pattern_without_a_root_is_refused_with_its_line(rule, parsed, source_line):
    def pattern(self, op, a):
        return a

    assert f"test-rule ({source_line(pattern)}): pattern must return" in refused(rule(pattern, None), parsed)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda op, a: [a, a], "rewrite returned 2 values for 1 roots at 'p'"),
        (lambda op, a: [], "rewrite returned 0 values for 1 roots at 'p'"),
        (lambda op, a: None, "rewrite returned None, expected a value per root, at 'p'"),
        (lambda op, a: [3], "rewrite returned 3, expected a value per root, at 'p'"),
    ],
)
def test_a_wrong_result_is_refused_with_the_line_of_the_rewrite(rule, parsed, source_line, returned, message):
    def rewrite(self, op, a):
        return returned(op, a)

    found = refused(rule(lambda self, op, a: op.Neg(a), rewrite), parsed)
    assert found == f"test-rule ({source_line(rewrite)}): {message}"


def test_a_rule_that_matches_its_own_result_is_stopped(rule, parsed, source_line):
    """At the first place, after a few more times than the graph has nodes."""

    def pattern(self, op, a):
        return op.Neg(a)

    message = refused(rule(pattern, lambda self, op, a: op.Neg(a)), parsed)
    assert f"test-rule ({source_line(pattern)}): fired 23 times in a row at 'p'" in message
    assert "its result matches its own pattern" in message


def test_a_rule_that_grows_without_end_is_stopped_as_early(rule, parsed):
    message = refused(rule(lambda self, op, a: op.Neg(a), lambda self, op, a: op.Neg(op.Neg(op.Neg(a)))), parsed)
    assert "fired 23 times in a row at" in message


def test_two_rules_that_undo_each_other_are_stopped(rule, parsed, source_line):
    def negation(op, a):
        return op.Neg(a)

    item = rule(None, None)
    item.rules = lambda: [
        (negation, lambda op, a: op.Sub(0.0, a)),
        (lambda op, a: op.Sub(0.0, a), lambda op, a: op.Neg(a)),
    ]
    message = refused(item, parsed)
    assert f"test-rule ({source_line(negation)}): fired 23 times in a row at 'p'" in message
    assert "another rule of the pass turns it back" in message


def test_a_long_chain_that_gets_shorter_is_no_loop(checked, rule):
    """Each rewrite takes up what the one before it made; a hundred in a row."""
    item = rule(
        lambda self, op, a: op.Transpose(op.Transpose(a, perm=[1, 2, 0]), perm=[1, 2, 0]),
        lambda self, op, a: op.Transpose(a, perm=[2, 0, 1]),
    )
    other = rule(
        lambda self, op, a: op.Transpose(op.Transpose(a, perm=[2, 0, 1]), perm=[1, 2, 0]),
        lambda self, op, a: op.Identity(a),
    )
    item.rules = lambda: [(item.pattern, item.rewrite), (other.pattern, other.rewrite)]
    body = "".join(f" v{i + 1} = Transpose<perm=[1,2,0]>(v{i})" for i in range(100))
    _, result, _ = checked(
        item, f"g (float[2,3,5] v0) => (float[3,5,2] out) {{{body} out = Transpose<perm=[0,1,2]>(v100) }}"
    )
    assert result.matches > 60


def test_an_operator_may_be_pushed_past_many_others(checked, rule):
    """As often as there are nodes: far from a loop."""
    item = rule(lambda self, op, a, b: op.Neg(op.Add(a, b)), lambda self, op, a, b: op.Add(op.Neg(a), op.Neg(b)))
    body = "".join(f" v{i + 1} = Add(v{i}, y)" for i in range(60))
    operators, result, _ = checked(
        item, f"g (float[3,5] v0, float[3,5] y) => (float[3,5] out) {{{body} out = Neg(v60) }}"
    )
    assert result.matches == 60
    assert operators.count("Neg") == 61


def test_what_a_later_rewrite_made_possible_upstream_is_found(checked, rule):
    """The Relu declines while two nodes read it; the rule at the end takes one of them away."""

    def relu(op, a):
        return op.Relu(a, bind="result")

    def lonely(op, a, result):
        if len(result.uses()) > 1:
            raise Decline("shared")
        return op.Max(a, 0.0)

    item = rule(None, None)
    item.rules = lambda: [(relu, lonely), (lambda op, a: op.Sub(a, a), lambda op, a: op.Mul(y_of(a), 0.0))]

    def y_of(value):
        return value.producer().inputs[1]

    body = "r = Relu(x) p = Add(r, y) z = Sub(p, p) out = Add(r, z)"
    operators, result, _ = checked(item, f"{X} => (float[3,5] out) {{ {body} }}")
    assert "Relu" not in operators
    assert result.matches == 2
    assert result.declines == {}


def test_a_name_of_one_alternative_needs_a_default(rule, parsed, source_line):
    def pattern(self, op, a, b):
        return op.Neg(op.any_of("kind", sum=op.Add(a, b), plain=a))

    message = refused(rule(pattern, lambda self, op, b, a: a), parsed)
    assert message.startswith(f"test-rule ({source_line(pattern)}): rewrite takes b, which only some alternatives bind")
    assert "such as b=None" in message
    seen = []
    item = rule(pattern, lambda self, op, a, b="none": seen.append((a.name, b)) or op.Identity(a))
    item.run(parsed(f"{X} => (float[3,5] out) {{ p = Neg(x) out = Add(p, y) }}"))
    assert seen == [("x", "none")]


def test_every_rule_has_statistics(rule, parsed, source_line):
    def negation(op, a):
        return op.Neg(a)

    def refuse(op, a):
        raise Decline("not x" if a.name == "x" else "other")

    def sigmoid(op, a):
        return op.Sigmoid(a)

    item = rule(None, None)
    item.rules = lambda: [(negation, refuse), (sigmoid, lambda op, a: op.Tanh(a))]
    model = parsed(f"{X} => (float[3,5] out) {{ p = Neg(x) q = Neg(p) s = Sigmoid(q) out = Add(s, y) }}")
    first, second = item.run(model).rules
    assert (first.name, first.source) == ("negation", source_line(negation))
    assert (first.tries, first.hits, first.declines) == (4, 0, {"not x": 1, "other": 1})
    assert (second.tries, second.hits, second.declines) == (1, 1, {})
    assert first.seconds is None


def test_rules_are_timed_when_asked(rule, parsed):
    model = parsed(f"{X} => (float[3,5] out) {{ p = Neg(x) out = Add(p, y) }}")
    RunContext.of(model).times_rules = True
    (statistics,) = rule(lambda self, op, a: op.Neg(a), lambda self, op, a: op.Sub(0.0, a)).run(model).rules
    assert statistics.seconds is not None
    assert statistics.seconds > 0


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (
            lambda self, op, a: op.Cast(a, to=11),
            r"test-rule \(.*:\d+\): would replace 'p' .FLOAT. by .* .DOUBLE.; .* keep the dtype",
        ),
        (
            lambda self, op, a: op.Transpose(a),
            r"test-rule \(.*:\d+\): would replace 'p' of shape \[3,5\] by .* of shape \[5,3\]",
        ),
    ],
)
def test_a_result_of_another_type_is_refused(rule, parsed, rewrite, message):
    model = parsed(f"{X} => (float[3,5] out) {{ p = Neg(x) out = Add(p, y) }}")
    with pytest.raises(VerifyError, match=message):
        rule(lambda self, op, a: op.Neg(a), rewrite).run(model)


def test_a_pass_without_pattern_or_rewrite_says_so(parsed):
    item = type("Empty", (RewritePass,), {})()
    item.name = "empty"
    with pytest.raises(PassError, match="empty has no pattern: define pattern"):
        item.run(parsed(f"{X} => (float[3,5] out) {{ out = Neg(x) }}"))


def test_a_rewrite_may_take_whatever_was_found(checked, rule):
    seen = []

    def pattern(self, op, a):
        return op.any_of("kind", product=op.Mul(a, op.variable("b")), root=op.Sqrt(a))

    def rewrite(self, op, kind, **found):
        seen.append((kind, {name: value.name for name, value in found.items() if hasattr(value, "name")}))
        raise Decline("only looking")

    checked(rule(pattern, rewrite), f"{X} => (float[3,5] out) {{ r = Sqrt(x) out = Mul(r, y) }}")
    assert ("root", {"a": "x"}) in seen
    assert ("product", {"a": "r", "b": "y"}) in seen


def test_what_is_shared_is_made_once_for_all_sites(checked, rule):
    def rewrite(self, op, a):
        return op.Mul(a, op.shared("three", lambda: op.initializer("three", np.array(3, np.float32))))

    def pattern(self, op, a):
        return op.Add(op.Add(a, a), a)

    body = "{ p = Add(x, x) q = Add(p, x) r = Add(y, y) s = Add(r, y) out = Sub(q, s) }"
    _, result, model = checked(rule(pattern, rewrite), f"{X} => (float[3,5] out) {body}")
    assert result.matches == 2
    assert list(model.graph.initializers) == ["three"]


def test_what_a_declined_site_shared_is_there_for_the_next(checked, rule):
    def rewrite(self, op, a):
        three = op.shared("three", lambda: op.initializer("three", np.array(3, np.float32)))
        if a.name == "x":
            raise Decline("not here")
        return op.Mul(a, three)

    def pattern(self, op, a):
        return op.Add(op.Add(a, a), a)

    body = "{ p = Add(x, x) q = Add(p, x) r = Add(y, y) s = Add(r, y) out = Sub(q, s) }"
    operators, result, model = checked(rule(pattern, rewrite), f"{X} => (float[3,5] out) {body}")
    assert (result.matches, result.declines["not here"] > 0) == (1, True)
    assert operators == ["Add", "Add", "Mul", "Sub"]
    assert list(model.graph.initializers) == ["three"]
