"""cse: equal expressions become one, nothing else does, and what layers share stands before them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.graph.provenance import MADE_BY, MADE_FROM
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.cleanup.cse import MergeCommonSubexpressions
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def merged(text, matches, **settings):
    """(operators, model) after every check of `check`."""
    model, _ = check(MergeCommonSubexpressions(), HEADER + text, matches=matches, **settings)
    return [node.op_type for node in model.graph], model


def unchanged(text, **settings):
    model, result = check(MergeCommonSubexpressions(), HEADER + text, matches=0, **settings)
    assert not result.modified
    return model


def test_a_chain_is_merged_from_its_start(check_pass):
    check_pass(
        MergeCommonSubexpressions(),
        HEADER
        + """
        g (float[2,3] x) => (float[2,3] y) <float two = {2}, float zwei = {2}> {
            a = Pow(x, two)
            b = Exp(a)
            c = Pow(x, zwei)
            d = Exp(c)
            e = Neg(d)
            y = Mul(b, e)
        }""",
        matches=2,
    )


@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Min"])
def test_commutative_inputs_in_any_order(op):
    operators, _ = merged(
        f"g (float[3] x, float[3] z) => (float[3] y) {{ a = {op}(x, z) b = {op}(z, x) y = Sub(a, b) }}", 1
    )
    assert operators == [op, "Sub"]


def test_a_constant_may_stand_on_either_side():
    text = "g (float[3] x) => (float[3] y) <float a = {3}, float b = {3}> { p = Mul(x, a) q = Mul(b, x) y = Sub(p, q) }"
    assert merged(text, 1)[0] == ["Mul", "Sub"]


def test_other_inputs_keep_their_order():
    unchanged("g (float[3] x, float[3] z) => (float[3] y) { a = Sub(x, z) b = Sub(z, x) y = Mul(a, b) }")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a = Softmax <axis = 0> (x)", "b = Softmax <axis = 1> (x)"),
        ("a = Concat <axis = 0> (x, z)", "b = Concat <axis = 0> (z, x)"),
        ("a = Add(x, one)", "b = Add(x, two)"),
        ("a = Add(x, zero)", "b = Add(x, minus_zero)"),
        ("a = Sum(x, z)", "b = Sum(x, z, z)"),
        ("a = Clip(x, , one)", "b = Clip(x, one)"),
        ("a = Exp(x)", "b = Exp(z)"),
        ("a = Exp(x)", "b = Abs(x)"),
    ],
)
def test_declines_what_differs(first, second):
    constants = "<float one = {1}, float two = {2}, float zero = {0}, float minus_zero = {-0.0}>"
    unchanged(f"g (float[3,3] x, float[3,3] z) => (float[] y) {constants} {{ {first} {second} y = Sub(a, b) }}")


def test_equal_numbers_of_other_dtypes_differ():
    text = "g (float[3] x) => (float[3] y) <int64[1] i = {0}, int32[1] j = {0}>"
    unchanged(text + " { a = Gather(x, i) b = Gather(x, j) y = Add(a, b) }")


def test_an_absent_input_and_none_are_the_same():
    text = "g (float[3] x) => (float[3] y) <float one = {1}> { a = Clip(x, one) b = Clip(x, one, ) y = Sub(a, b) }"
    assert merged(text, 1)[0] == ["Clip", "Sub"]


def test_all_outputs_of_a_node():
    text = """g (float[2,6] x) => (float[2,3] y) <int64[2] s = {3, 3}, int64[2] t = {3, 3}> {
        a, b = Split <axis = 1> (x, s)
        c, d = Split <axis = 1> (x, t)
        e = Sub(a, d)
        f = Mul(c, b)
        y = Add(e, f)
    }"""
    assert merged(text, 1)[0] == ["Split", "Sub", "Mul", "Add"]


def test_constants_that_are_nodes():
    text = "g (float[2] x) => (float[2] y) { a = Constant <value = float[2] {1, 2}> ()"
    text += " b = Constant <value = float[2] {1, 2}> () p = Add(x, a) q = Add(x, b) y = Mul(p, q) }"
    assert merged(text, 2)[0] == ["Constant", "Add", "Mul"]


def test_declines_random_operators():
    unchanged(
        "g (float[2] x) => (float[2] y) { a = RandomNormalLike <seed = 1.0> (x) b = RandomNormalLike <seed = 1.0> (x)"
        " z = Sub(a, b) y = Mul(z, x) }"
    )


def test_declines_bodies():
    branch = "If (c) <then_branch = a () => (float[2] t{0}) {{ t{0} = Neg(x) }}, "
    branch += "else_branch = b () => (float[2] e{0}) {{ e{0} = Exp(x) }}>"
    text = f"p = {branch.format(0)} q = {branch.format(1)} y = Add(p, q)"
    unchanged(f"g (bool c, float[2] x) => (float[2] y) {{ {text} }}", feeds={"c": np.array(True)})


def test_a_body_that_reads_a_merged_value():
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Neg(x)
        b = Neg(x)
        z = If (c) <then_branch = l () => (float[2] t) { t = Exp(b) },
                    else_branch = r () => (float[2] e) { e = Abs(b) }>
        y = Sub(z, a)
    }"""
    for branch in (True, False):
        merged(text, 1, feeds={"c": np.array(branch)})


# Graph outputs


def test_an_output_moves_to_the_kept_node_with_its_name():
    operators, model = merged("g (float[3] x) => (float[3] y, float[3] z) { a = Exp(x) y = Exp(x) z = Neg(a) }", 1)
    assert operators == ["Exp", "Neg"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


def test_the_kept_node_is_an_output():
    operators, _ = merged("g (float[3] x) => (float[3] y, float[3] z) { y = Exp(x) b = Exp(x) z = Neg(b) }", 1)
    assert operators == ["Exp", "Neg"]


def test_two_outputs_stay_two():
    unchanged("g (float[3] x) => (float[3] y, float[3] z) { y = Exp(x) z = Exp(x) }")


def test_readers_of_a_second_output_read_the_first():
    text = "g (float[3] x) => (float[3] y, float[3] z, float[3] w) { y = Exp(x) z = Exp(x) w = Neg(z) }"
    operators, model = merged(text, 1)
    assert operators == ["Exp", "Exp", "Neg"]
    assert model.graph[2].inputs[0].name == "y"


# Other domains


FUNCTION = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[3] x) => (float[3] y) {{
    a = local.f <k = 2.0> (x)
    b = local.f <k = 2.0> (x)
    c = local.f <k = 3.0> (x)
    d = Sub(a, b)
    y = Add(c, d)
}}
<domain: "local", opset_import: ["" : 21]>
f <k> (x) => (y) {{
    {body}
}}"""


def test_calls_of_a_local_function():
    body = "c = Constant <value_float : float = @k> () y = Mul(x, c)"
    model, _ = check(MergeCommonSubexpressions(), read_model(FUNCTION.format(body=body)), matches=1)
    assert [node.op_type for node in model.graph] == ["f", "f", "Sub", "Add"]


def test_declines_calls_of_a_function_that_is_random():
    model = read_model(FUNCTION.format(body="r = RandomNormalLike <seed : float = @k> (x) y = Add(x, r)"))
    assert not MergeCommonSubexpressions().run(model).modified


def test_declines_operators_of_unknown_domains():
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[3] x) => (float[3] y) { a = com.microsoft.AllReduce(x) b = com.microsoft.AllReduce(x) y = Add(a, b) }"""
    assert not MergeCommonSubexpressions().run(read_model(text)).modified


def test_equal_looking_weights_of_a_checkpoint_are_not_read(monkeypatch):
    model = read_model(
        HEADER + "g (float[2] x) => (float[2] y) <float[2] v = {3, 4}, float[2] w = {3, 4}>"
        " { a = Add(x, v) b = Add(x, w) c = Add(v, x) d = Add(b, c) y = Mul(a, d) }"
    )
    for name in ("v", "w"):
        value = model.graph.initializers[name]
        value.const_value = LazyWeight(Literal.of(value.const_value.numpy()), name)
    monkeypatch.setattr(LazyWeight, "numpy", lambda self: pytest.fail("a weight was read"))
    assert MergeCommonSubexpressions().run(model).matches == 1
    assert [node.op_type for node in model.graph] == ["Add", "Add", "Add", "Mul"]


def test_a_merged_node_stands_for_all_its_origins():
    model = read_model(HEADER + "g (float[3] x) => (float[3] y) { a = Exp(x) b = Exp(x) c = Exp(x) y = Sum(a, b, c) }")
    for node in model.graph:
        node.metadata_props["namespace"] = node.name
    model.graph[1].metadata_props[MADE_FROM] = "early,late"
    MergeCommonSubexpressions().run(model)
    kept = model.graph[0].metadata_props
    assert kept[MADE_FROM] == "Exp_0,early,late,Exp_2"
    assert (kept[MADE_BY], kept["namespace"]) == ("cse", "Exp_0")


# Layers


LAYERS = """
g (int64[b,s] input_ids, float[b,s] p, float[b,2,"past.0"] "past.0.key", float[b,2,"past.0"] "past.1.key")
=> (float[b,s,3] y)
<float[7,3] embed = random, float[3,3] "layers.0.w" = random, float[3,3] "layers.1.w" = random, int64[1] axis = {2}> {
    e = Gather(embed, input_ids)
    m0 = MatMul(e, "layers.0.w")
    l0 = Shape <start = 2> ("past.0.key")
    f0 = Cast <to = 1> (l0)
    q0 = Add(p, f0)
    c0 = Cos(q0)
    u0 = Unsqueeze(c0, axis)
    a0 = Mul(m0, u0)
    r0 = Add(e, a0)
    m1 = MatMul(r0, "layers.1.w")
    q1 = Add(p, f0)
    c1 = Cos(q1)
    u1 = Unsqueeze(c1, axis)
    a1 = Mul(m1, u1)
    y = Add(r0, a1)
}"""


def test_what_layers_share_stands_before_the_first(check_pass):
    check_pass(MergeCommonSubexpressions(), HEADER + LAYERS, matches=3)


def test_a_single_number_named_after_a_layer_is_shared():
    """As exporters name the first use of a constant."""
    text = LAYERS.replace("int64[1] axis", 'float "layers.0.low" = {-3}, int64[1] axis')
    operators, _ = merged(
        text.replace("f0 = Cast <to = 1> (l0)", 'i0 = Cast <to = 1> (l0) f0 = Mul(i0, "layers.0.low")'), 3
    )
    assert operators[:7] == ["Shape", "Cast", "Mul", "Add", "Cos", "Unsqueeze", "Gather"]


def test_what_one_layer_reads_twice_stays_in_it():
    text = LAYERS.replace("m0 = MatMul(e", "k0 = Cos(e) k1 = Cos(e) k = Mul(k0, k1) m0 = MatMul(k").replace(
        "m1 = MatMul(r0", "j0 = Cos(r0) j1 = Cos(r0) j = Mul(j0, j1) m1 = MatMul(j"
    )
    operators, _ = merged(text, 5)
    assert operators[:8] == ["Shape", "Cast", "Add", "Cos", "Unsqueeze", "Gather", "Cos", "Mul"]


def test_what_layers_share_already_is_moved_too():
    text = LAYERS.replace("q1 = Add(p, f0)", "").replace("c1 = Cos(q1)", "").replace("u1 = Unsqueeze(c1, axis)", "")
    model, result = check(MergeCommonSubexpressions(), HEADER + text.replace("Mul(m1, u1)", "Mul(m1, u0)"), matches=0)
    assert result.modified
    assert result.notes == ["5 nodes that layers share moved before the first layer"]
    assert next(node.op_type for node in list(model.graph)[5:]) == "Gather"


def test_a_layer_that_branches_on_what_is_shared():
    """What only the body of an If reads counts as read by the layer."""
    branch = "If (c) <then_branch = n{0} () => (float[b,s,3] t) {{ t = Mul(m{0}, u{1}) }}, "
    branch += "else_branch = o{0} () => (float[b,s,3] o) {{ o = Add(m{0}, u{1}) }}>"
    text = LAYERS.replace("Mul(m0, u0)", branch.format(0, 0)).replace("Mul(m1, u1)", branch.format(1, 1))
    text = text.replace("g (int64[b,s] input_ids", "g (bool c, int64[b,s] input_ids")
    for value in (True, False):
        operators, _ = merged(text, 3, feeds={"c": np.array(value)})
        assert operators[5:7] == ["Gather", "MatMul"]


def test_one_layer_alone_is_left_in_place():
    text = 'g (float[2,3] x) => (float[2,3] y) <float[3,3] "layers.0.w" = random>'
    unchanged(text + ' { m = MatMul(x, "layers.0.w") c = Cos(x) y = Mul(m, c) }')


def test_merging_is_linear_in_the_number_of_equal_nodes():
    """A thousand equal chains become one, and the text says so once."""
    lines = "".join(f"a{i} = Exp(x) b{i} = Neg(a{i}) c{i} = Sum(b{i}, x)" for i in range(1000))
    terms = ", ".join(f"c{i}" for i in range(1000))
    model = read_model(HEADER + f"g (float[3] x) => (float[3] y) {{ {lines} y = Sum({terms}) }}")
    assert MergeCommonSubexpressions().run(model).matches == 2997
    assert len(model.graph) == 4
    assert "Exp (x)" in print_model(model)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("seq(float[n,2])", "q = Identity(s) k = SequenceLength(q)"),
        ("optional(float[n,2])", "q = Identity(s) k = OptionalHasElement(q)"),
    ],
)
def test_what_is_made_of_a_sequence_gets_no_tensor_type(kind, body):
    """A file that calls a sequence a tensor is refused by runtimes."""
    result = "int64 k" if kind.startswith("seq") else "bool k"
    model = read_model(f"{HEADER} g ({kind} s) => ({result}) {{ {body} }}")
    MergeCommonSubexpressions().run(model)
    onnx.checker.check_model(onnx_ir.to_proto(model), full_check=True)
