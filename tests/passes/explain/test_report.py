"""The report of `why`: what is counted, what comes first, what is one kind, and that nothing changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.provenance import MODULE, SOURCE
from passopt.ir.serialization.text import print_model
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.passes.explain.report import explain
from passopt.passes.framework.base import Decline, Pass, Refusal
from passopt.passes.framework.records import PassResult
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import read_model

X = "g (float[3,5] x, float[3,5] y)"


def layers(*bodies):
    """A graph with one output per body; `#` in a body is its number."""
    text = " ".join(body.replace("#", str(index)) for index, body in enumerate(bodies))
    outputs = ", ".join(f"float[3,5] out{index}" for index in range(len(bodies)))
    return f"{X} => ({outputs}) {{ {text} }}"


def silu_negated(self, op, a):
    return op.Neg(op.Mul(a, op.Sigmoid(a)))


WHOLE = "s# = Sigmoid(x) m# = Mul(x, s#) out# = Neg(m#)"
OTHER_OPERATOR = "s# = Tanh(x) m# = Mul(x, s#) out# = Neg(m#)"
OTHER_VALUE = "s# = Sigmoid(y) m# = Mul(x, s#) out# = Neg(m#)"
FAR = "out# = Neg(x)"


@pytest.fixture
def silu(rule):
    return rule(silu_negated, lambda self, op, a: op.Abs(a))


@pytest.fixture
def lines(parsed):
    """The report of a pass on a graph, without the lines that say where the rule is written."""

    def report(item, text, limit=4):
        found = explain(item, parsed(text)).lines(limit)
        return [line for line in found if not line.startswith("    rule ")]

    return report


def test_matches_are_counted_and_leave_nothing_to_say(lines, silu):
    assert lines(silu, layers(WHOLE, WHOLE)) == ["test-rule: matched 2 times, declined 0 times, came near at 0 places"]


def test_equal_misses_are_one_kind_with_an_example(lines, silu):
    assert lines(silu, layers(OTHER_OPERATOR, WHOLE, OTHER_OPERATOR, OTHER_OPERATOR)) == [
        "test-rule: matched 1 times, declined 0 times, came near at 3 places",
        "1. 2 of 3 nodes fit × 3, such as out0 (Neg)",
        "    m0 (Mul), input 1: expected Sigmoid, found Tanh s0",
    ]


def test_nearer_misses_come_first_and_far_ones_are_counted(lines, silu):
    two_away = "s# = Tanh(x) m# = Add(x, s#) out# = Neg(m#)"
    assert lines(silu, layers(FAR, two_away, OTHER_OPERATOR, OTHER_VALUE)) == [
        "test-rule: matched 0 times, declined 0 times, came near at 2 places",
        "1. 2 of 3 nodes fit at out2 (Neg)",
        "    m2 (Mul), input 1: expected Sigmoid, found Tanh s2",
        "2. 2 of 3 nodes fit at out3 (Neg)",
        "    s3 (Sigmoid), input 0 (a): expected the same value as a, x, found the graph input float[3,5] y",
        "and 2 places of 2 more kinds, less near (`limit=0` shows all)",
    ]


def test_the_limit_is_of_kinds(lines, silu):
    text = layers(OTHER_OPERATOR, OTHER_OPERATOR, OTHER_VALUE, FAR)
    assert [line[:2] for line in lines(silu, text, 1)] == ["te", "1.", "  ", "an"]
    assert lines(silu, text, 1)[-1] == "and 2 places of 2 more kinds, less near (`limit=0` shows all)"
    assert [line[:2] for line in lines(silu, text, 0)] == ["te", "1.", "  ", "2.", "  ", "3.", "  "]


def test_where_nothing_is_near_the_nearest_are_shown(lines, silu):
    report = lines(silu, layers(FAR, "m# = Abs(x) out# = Neg(m#)", "m# = Exp(x) out# = Neg(m#)"))
    assert report[0] == "test-rule: matched 0 times, declined 0 times, came near at 0 places"
    assert [line for line in report if line[0].isdigit()] == [
        "1. 1 of 3 nodes fit at out0 (Neg)",
        "2. 1 of 3 nodes fit at out1 (Neg)",
    ]
    assert report[-1] == "and 1 places of 1 more kinds, less near (`limit=0` shows all)"


def test_the_nearest_kind_shows_three_differences_others_one(lines, rule):
    def pattern(self, op, a):
        return op.Concat(op.Relu(a), op.Neg(a), op.Abs(a), op.Exp(a), op.Ceil(a), axis=0)

    def one(*kinds):
        parts = " ".join(f"{kind[0]}# = {kind}(x)" for kind in kinds)
        return f"{parts} out# = Concat<axis=0>({', '.join(f'{kind[0]}#' for kind in kinds)})"

    text = layers(one("Relu", "Neg", "Abs", "Tan", "Ceil"), one("Relu", "Neg", "Abs", "Tan", "Sqrt"))
    report = lines(rule(pattern, lambda self, op, a: a), text.replace("float[3,5] out", "float[15,5] out"))
    assert report[1:] == [
        "1. 5 of 6 nodes fit at out0 (Concat)",
        "    out0 (Concat), input 3: expected Exp, found Tan T0",
        "2. 4 of 6 nodes fit at out1 (Concat)",
        "    out1 (Concat), input 3: expected Exp, found Tan T1 (and 1 more)",
    ]


def test_declines_come_first_with_the_rules_own_reason(lines, rule):
    def refuse(self, op, a):
        op.Abs(a)
        raise Decline(f"{a.name} is not wanted")

    text = layers(OTHER_OPERATOR, WHOLE, "n# = Abs(y) s# = Sigmoid(n#) m# = Mul(n#, s#) out# = Neg(m#)", WHOLE)
    assert lines(rule(silu_negated, refuse), text) == [
        "test-rule: matched 0 times, declined 3 times, came near at 1 places",
        "1. declined × 3, such as out1 (Neg)",
        "    x is not wanted",
        "2. 2 of 3 nodes fit at out0 (Neg)",
        "    m0 (Mul), input 1: expected Sigmoid, found Tanh s0",
    ]


def test_reasons_with_other_numbers_are_other_kinds(lines, rule):
    def refuse(self, op, a, b):
        raise Decline(f"layer{a.name[-1]}.bias has {b.shape[0]} rows")

    text = f"{X} => (float[3,5] s0, float[3,5] s1, float[1,5] s2) <float[1,5] z = {{1, 2, 3, 4, 5}}> "
    text += "{ a0 = Abs(x) s0 = Sub(a0, y) a1 = Abs(y) s1 = Sub(a1, y) a2 = Abs(z) s2 = Sub(a2, z) }"
    assert lines(rule(lambda self, op, a, b: op.Sub(a, b), refuse), text)[1:] == [
        "1. declined × 2, such as s0 (Sub)",
        "    layer0.bias has 3 rows",
        "2. declined at s2 (Sub)",
        "    layer2.bias has 1 rows",
    ]


def test_a_rewrite_that_fails_is_a_reason(lines, rule):
    def broken(self, op, a):
        raise PassError("no such table")

    assert lines(rule(silu_negated, broken), layers(WHOLE)) == [
        "test-rule: did not finish, declined 2 times, came near at 0 places",
        "1. declined",
        "    the pass fails on this model: no such table",
        "2. declined at out0 (Neg)",
        "    the rewrite fails: no such table",
    ]


def test_a_rewrite_with_a_defect_is_a_reason_too(lines, rule):
    item = rule(silu_negated, lambda self, op, a: 1 // 0)
    failed, why, site, step, second, reason = lines(item, layers(WHOLE))[1:]
    assert (failed, second) == ("1. declined at out0 (Neg)", "2. declined at out0 (Neg)")
    fault = "failed with ZeroDivisionError: integer division or modulo by zero, at "
    assert why.startswith("    the pass fails on this model: test-rule (")
    assert f"<lambda> {fault}" in why
    assert site == "    site: Neg 'Neg_2', which makes out0"
    assert "defect of the pass" in step
    assert reason.startswith(f"    the rewrite {fault}")
    assert "test_report.py" in reason


def test_where_another_rule_of_the_pass_applies_nothing_is_missed(lines, rule):
    def refuse(op, a):
        raise Decline("not I")

    item = rule(None, None)
    item.rules = lambda: [
        (lambda op, a: op.Neg(op.Tanh(a)), refuse),
        (lambda op, a: op.Neg(a), lambda op, a: op.Abs(a)),
    ]
    report = lines(item, layers("t# = Tanh(x) out# = Neg(t#)"))
    assert report == [
        "test-rule: matched 1 times, declined 0 times, came near at 0 places",
    ]


def test_what_an_earlier_match_makes_possible_is_a_match(lines, rule):
    item = rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: a)
    report = lines(item, layers("a# = Neg(x) b# = Neg(a#) c# = Neg(b#) d# = Neg(c#) out# = Abs(d#)"))
    assert report[0] == "test-rule: matched 2 times, declined 0 times, came near at 0 places"


def test_what_the_pass_made_is_no_miss(lines, rule):
    def once(self, op, a):
        if a.producer() is not None and a.producer().op_type == "Abs":
            raise Decline("done")
        return op.Neg(op.Abs(a))

    report = lines(rule(lambda self, op, a: op.Neg(a), once), layers(FAR, "a# = Abs(x) out# = Neg(a#)"))
    assert report == [
        "test-rule: matched 1 times, declined 1 times, came near at 0 places",
        "1. declined at out1 (Neg)",
        "    done",
    ]


def test_a_root_that_no_node_has_is_said(lines, rule):
    item = rule(lambda self, op, a: op.any_op("kind", ["Min", "Max"], op.Neg(a), a), lambda self, op, a, kind: a)
    assert lines(item, layers(FAR)) == [
        "test-rule: matched 0 times, declined 0 times, came near at 0 places",
        "the graph has none of the operators at which these rules start: Min or Max (<lambda>)",
    ]


def test_a_place_where_only_the_root_differs_is_found(lines, rule):
    def pattern(self, op, a):
        return op.Div(op.Neg(op.Exp(op.Abs(a))), 2.0)

    item = rule(pattern, lambda self, op, a: a)
    assert lines(item, layers("a# = Abs(x) e# = Exp(a#) n# = Neg(e#) out# = Relu(n#)"))[1:] == [
        "1. 3 of 4 nodes fit at n0 (Neg)",
        "    n0 (Neg), read by: expected Div that reads n0, found Relu out0",
        "the graph has none of the operators at which these rules start: Div (pattern)",
    ]


def test_nodes_that_all_fit_are_not_said_to_be_the_miss(lines, rule):
    def pattern(self, op, a):
        return op.Mul(op.Exp(op.Abs(op.Floor(a))), 2.0)

    item = rule(pattern, lambda self, op, a: a)
    body = "f# = Floor(x) n# = Abs(f#) e# = Exp(n#) t# = Tanh(e#) out# = Mul(t#, two)"
    assert lines(item, layers(body).replace("{", "<float two = {2}> {", 1))[1:] == [
        "1. all 4 nodes fit, but not next to each other at out0 (Mul)",
        "    out0 (Mul), input 0: expected Exp, found Tanh t0 with Exp behind it",
    ]


def test_a_place_is_explained_once(lines, rule):
    """The inner Mul could be the root as well, with the outer one missing: that is no other place."""

    def pattern(self, op, a, b):
        return op.Mul(b, op.Mul(a, op.Exp(op.Abs(op.Floor(a)))))

    item = rule(pattern, lambda self, op, a, b: a)
    assert lines(item, layers("f# = Floor(x) n# = Abs(f#) e# = Tanh(n#) i# = Mul(x, e#) out# = Mul(y, i#)"))[1:] == [
        "1. 4 of 5 nodes fit at out0 (Mul)",
        "    i0 (Mul), input 1: expected Exp, found Tanh e0",
    ]


def test_layers_that_share_what_fits_are_all_counted(lines, rule):
    """A mask that is computed once belongs to the place in every layer."""

    def pattern(self, op, a, b):
        return op.Softmax(op.Add(op.Neg(a), op.Exp(op.Abs(op.Floor(b)))), axis=-1)

    shared = "f = Floor(y) p = Abs(f) e = Exp(p)"
    layer = "n# = Tanh(x) s# = Add(n#, e) out# = Softmax(s#)"
    report = lines(rule(pattern, lambda self, op, a, b: a), layers(shared + " " + layer, layer, layer))
    assert report[1:] == [
        "1. 5 of 6 nodes fit × 3, such as out0 (Softmax)",
        "    s0 (Add), input 0: expected Neg, found Tanh n0",
    ]


def test_the_source_line_and_module_are_those_of_the_difference(parsed, silu):
    model = parsed(layers(OTHER_OPERATOR))
    tanh, mul, _ = model.graph
    mul.metadata_props.update({SOURCE: "modeling_x.py:7", MODULE: "model.layers.0.mlp"})
    place = f"rule silu_negated ({Path(__file__).name}:{silu_negated.__code__.co_firstlineno})"
    assert explain(silu, model).lines()[-1] == f"    modeling_x.py:7 in model.layers.0.mlp; {place}"
    tanh.metadata_props[SOURCE] = "modeling_x.py:5"
    assert explain(silu, model).lines()[-1] == f"    modeling_x.py:5; {place}"


def test_labels_of_alternatives_are_named(parsed, rule):
    def pattern(self, op, a):
        return op.Neg(op.any_of("kind", soft=op.Sigmoid(op.Abs(a)), hard=op.Relu(op.Abs(a))))

    item = rule(pattern, lambda self, op, a, kind: a)
    report = explain(item, parsed(layers("b# = Ceil(x) s# = Relu(b#) out# = Neg(s#)"))).lines()
    assert report[-1].endswith("; kind=hard")


def test_the_model_is_not_changed(parsed, rule):
    """Neither its text nor the uses of its values, though the rules' own rewrites ran on it."""

    def refuse(self, op, a):
        op.Add(op.Abs(a), op.initializer("extra", __import__("numpy").zeros((3, 5), "float32")))
        raise Decline("never")

    model = parsed(layers(WHOLE, OTHER_OPERATOR, OTHER_VALUE))
    before = print_model(model, fold=False)
    uses = [[(use.node.name, use.idx) for use in value.uses()] for value in model.graph.inputs]
    explain(rule(silu_negated, refuse), model)
    explain(rule(silu_negated, lambda self, op, a: op.Abs(a)), model)
    assert print_model(model, fold=False) == before
    assert [[(use.node.name, use.idx) for use in value.uses()] for value in model.graph.inputs] == uses


def test_json_holds_every_place_and_every_difference(parsed, silu):
    model = parsed(layers(OTHER_OPERATOR, OTHER_OPERATOR, FAR))
    model.graph[1].metadata_props.update({SOURCE: "m.py:7", MODULE: "mlp"})
    body = json.loads(json.dumps(explain(silu, model).to_json()))
    assert (body["pass"], body["matched"], body["remarks"]) == ("test-rule", 0, [])
    near, far = body["groups"]
    assert (near["count"], near["sites"], near["value"]) == (2, ["out0", "out1"], "out0")
    assert (near["matched_nodes"], near["pattern_nodes"], near["declined"]) == (2, 3, None)
    assert near["differences"] == [
        {
            "kind": "operator",
            "node": "Mul_1",
            "op_type": "Mul",
            "place": "input 1",
            "expected": "Sigmoid",
            "found": "Tanh s0",
            "found_node": "Tanh_0",
            "source": "m.py:7",
            "module": "mlp",
        }
    ]
    assert near["rule_name"] == "silu_negated"
    assert (far["count"], far["matched_nodes"]) == (1, 1)


def whole(run, found=()):
    """A pass over the whole graph, kept out of the registry."""
    methods = {"run": lambda self, model: run(model), "explain": lambda self, model: found}
    cls = type("Whole", (Pass,), methods)
    cls.name = "test-whole"
    return cls()


def test_a_pass_over_the_whole_graph_says_what_it_is_and_why_it_declines(lines):
    def run(model):
        result = PassResult(notes=["looked at 3 nodes"])
        result.declines["no head"] += 2
        return result

    assert lines(whole(run), layers(FAR)) == [
        "test-whole: matched 0 times, declined 2 times, came near at 0 places",
        "test-whole works on the whole graph, by no rule that could come near; it changes nothing here",
        "looked at 3 nodes",
        "1. declined × 2",
        "    no head",
    ]


def test_a_pass_over_the_whole_graph_may_explain_places(parsed):
    model = parsed(layers(FAR))
    found = [Refusal(model.graph[0], "it is the last one")]
    assert explain(whole(lambda model: PassResult(modified=True, matches=1), found), model).lines()[1:] == [
        "test-whole works on the whole graph, by no rule that could come near; it changes this one",
        "1. declined at out0 (Neg)",
        "    it is the last one",
    ]


def test_a_pass_over_the_whole_graph_that_fails(lines):
    def run(model):
        raise PassError("degree 5 does not divide 6")

    assert lines(whole(run), layers(FAR)) == [
        "test-whole: did not finish, declined 1 times, came near at 0 places",
        "1. declined",
        "    the pass fails on this model: degree 5 does not divide 6",
    ]


def test_what_is_searched_once_is_right_in_every_layer(parsed, rule):
    """Layers of two kinds, one of them spelled like the other but for what is shared: each as if searched alone."""
    from passopt.passes.explain.nearest_match import nearest
    from passopt.passes.explain.sites import sites
    from passopt.passes.patterns.rules import rules_of

    def pattern(self, op, a, b):
        return op.Neg(op.Mul(op.Abs(a), op.any_of("kind", one=op.Sigmoid(op.Exp(a)), two=op.Relu(op.Exp(b)))))

    alike = "p# = Abs(x) e# = Ceil(x) s# = Sigmoid(e#) m# = Mul(p#, s#) out# = Neg(m#)"
    shared = alike.replace("Ceil(x)", "Ceil(p#)")
    apart = alike.replace("Abs(x)", "Abs(y)")
    fitting = alike.replace("Ceil(x)", "Exp(y)")
    model = parsed(layers(alike, shared, apart, alike, shared, fitting, fitting))
    item = rule(pattern, lambda self, op, a, b=None: a)
    found = [site.miss for site in sites(item, model, rules_of(item))]
    assert len(found) == 7
    for miss in found:
        alone = nearest(rules_of(item)[0].pattern, miss.node, 21)
        assert [str(item) for item in miss.differences] == [str(item) for item in alone.differences]
        assert (miss.matched, miss.total, miss.nodes) == (alone.matched, alone.total, frozenset(alone.nodes.values()))


def test_passes_that_belong_before_are_named_where_something_is_missed(parsed, silu):
    type(silu).after = ("legalize", "cse")
    near = explain(silu, parsed(layers(OTHER_OPERATOR)), ["cse"]).lines()
    assert near[1] == "test-rule belongs after legalize; give a pipeline with `within`, or passes with `after`"
    assert explain(silu, parsed(layers(OTHER_OPERATOR)), ["cse", "legalize"]).lines()[1].startswith("1. 2 of 3")
    assert len(explain(silu, parsed(layers(WHOLE))).lines()) == 1


def test_the_nearest_rule_explains_a_root_and_every_decline(lines, rule):
    def refuse(op, a):
        raise Decline(f"not {a.name}")

    item = rule(None, None)
    item.rules = lambda: [
        (lambda op, a: op.Neg(op.Abs(op.Exp(op.Tan(a)))), lambda op, a: a),
        (lambda op, a: op.Neg(op.Abs(op.Exp(op.Sqrt(op.Relu(a))))), lambda op, a: a),
        (lambda op, a: op.Neg(op.Abs(op.Floor(a))), refuse),
        (lambda op, a: op.Neg(op.Abs(a)), refuse),
    ]
    nearest_only = "s# = Sqrt(x) e# = Exp(s#) b# = Abs(e#) out# = Neg(b#)"
    report = lines(item, layers("f# = Floor(x) b# = Abs(f#) out# = Neg(b#)"))
    assert [line for line in report if line.startswith("    ")] == ["    not x", "    not f0"]
    assert lines(rule_without_declines(rule), layers(nearest_only)) == [
        "test-rule: matched 0 times, declined 0 times, came near at 1 places",
        "1. 4 of 5 nodes fit at out0 (Neg)",
        "    s0 (Sqrt), input 0: expected Relu, found the graph input float[3,5] x",
    ]


def rule_without_declines(rule):
    item = rule(None, None)
    item.rules = lambda: [
        (lambda op, a: op.Neg(op.Abs(op.Exp(op.Tan(a)))), lambda op, a: a),
        (lambda op, a: op.Neg(op.Abs(op.Exp(op.Sqrt(op.Relu(a))))), lambda op, a: a),
    ]
    return item


def test_a_failure_points_at_the_node_that_it_names(parsed):
    def run(model):
        raise PassError("Neg 'Neg_0': cannot be split")

    model = parsed(layers(FAR))
    model.graph[0].metadata_props[SOURCE] = "m.py:3"
    assert explain(whole(run), model).lines()[1:] == [
        "1. declined at out0 (Neg)",
        "    the pass fails on this model: Neg 'Neg_0': cannot be split",
        "    m.py:3",
    ]


STAYING = """<ir_version: 10, opset_import: ["" : 21]>
g (float[3,5] x) => (float[4,5] turned, float[2] two, float[3,4] y, float[3,4] z, float[8,9] filled)
<float[5,4] w = random, float[5,4] v = random, float one = {1}, int64[2] big = {8, 9}, float scale = {0.5},
 int8[5,4] codes = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2}> {
    turned = Transpose(w)
    two = Concat<axis = 0>(a, a)
    a = Constant<value_floats = [1.0]>()
    d = DequantizeLinear(codes, scale)
    y = MatMul(x, d)
    n = Neg(v)
    z = MatMul(x, n)
    e = Expand(one, big)
    filled = Abs(e)
}"""


def test_fold_constants_says_what_it_leaves():
    text = STAYING.replace("    two = Concat<axis = 0>(a, a)\n    a = Constant<value_floats = [1.0]>()\n",
                           "    a = Constant<value_floats = [1.0]>()\n    two = Concat<axis = 0>(a, a)\n")  # fmt: skip
    report = explain(FoldConstants(limit=64), read_model(text)).lines(0)
    assert [line.strip() for line in report[3:]] == [
        "it reads a weight of the checkpoint, which no pass does",
        "2. declined at two (Concat)",
        "its result is an output of the graph",
        "3. declined at d (DequantizeLinear)",
        "DequantizeLinear is never evaluated",
        "4. declined at n (Neg)",
        "it reads a weight of the checkpoint, which no pass does",
        "5. declined at e (Expand)",
        "its result is larger than 64 bytes; fold-constants{limit=…} allows more",
    ]


def test_shard_says_what_stays_whole():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,seq,4] x) => (float[batch,seq,4] y)
    <float[4,6] up = random, float[6,4] down = random, float[1,4] gain = random> {
        z = Mul(x, gain) h = MatMul(z, up) r = Relu(h) y = MatMul(r, down)
    }"""
    model = read_model(text)
    report = explain(Shard(), model, Shard.after).lines()
    assert report[0] == "shard: matched 2 times, declined 1 times, came near at 0 places"
    assert report[3:] == [
        "1. declined at z (Mul)",
        "    gain [1, 4] stays whole on every rank: what reads it is not split",
    ]
    assert explain(Shard(degree=5), model).lines()[1:] == [
        "1. declined",
        "    the pass fails on this model: shard: degree 5 does not divide 6 units of up. Legal degrees: 2, 3, 6; "
        "or pad with zeros: tp{degree=5,pad=true}",
        "2. declined at z (Mul)",
        "    gain [1, 4] stays whole on every rank: what reads it is not split",
    ]


def test_a_report_has_at_most_20_lines(parsed, rule):
    """Many kinds, each of several differences, and everything else that a report may say."""

    def pattern(self, op, a):
        return op.Max(op.Relu(a), op.Neg(a), op.Abs(a), op.Exp(a), op.Ceil(a), op.Sin(a), op.Cos(a), op.Tan(a))

    def body(*kinds):
        parts = " ".join(f"v{i}_# = {kind}(x)" for i, kind in enumerate(kinds))
        return f"{parts} out# = Max({', '.join(f'v{i}_#' for i in range(8))})"

    first = ["Relu", "Neg", "Abs", "Exp", "Ceil"]
    others = [("Log", "Erf", kind) for kind in ("Sqrt", "Floor", "Sigmoid", "Tanh", "Round", "Sign")]
    item = rule(pattern, lambda self, op, a: a)
    type(item).after = ("legalize",)
    report = explain(item, parsed(layers(*(body(*first, *more) for more in others)))).lines()
    assert len(report) <= 20
    assert sum(line[0].isdigit() for line in report) == 4
    assert report[-1].startswith("and 2 places of 2 more kinds")
