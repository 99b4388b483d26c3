"""fuse-layer-norm: every spelling becomes one operator, with and without a factor and a bias; what is none stays."""

from __future__ import annotations

import pytest

from passopt.passes.fusion.fuse_layer_norm import FuseLayerNorm
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
HEAD = "g (float[batch,seq,6] x, float[6] w, float[6] b) => (float[] y)"
CONSTANTS = (
    "<float two = {2}, float one = {1}, float eps = {0.01}, float minus_half = {-0.5}, int64[1] last = {-1},"
    "int64[1] axis2 = {2}, int64[1] axis1 = {1}, int64[2] both = {1, 2}, float[6] many = {1, 2, 3, 4, 5, 6}>"
)
NORM = """
    m = ReduceMean <keepdims = 1> (x, last) d = Sub(x, m) p = Pow(d, two)
    m2 = ReduceMean <keepdims = 1> (p, last) v = Add(m2, eps) s = Sqrt(v) n = Div(d, s)"""
AFFINE = "f = Mul(n, w) y = Add(f, b)"


def fused(body, head=HEAD, opset=18, **settings):
    model, result = check(FuseLayerNorm(), f"{HEADER % opset}{head}{CONSTANTS} {{ {body} }}", **settings)
    return [node.op_type for node in model.graph], result, model


def declined(reason, body=f"{NORM} {AFFINE}", head=HEAD, opset=18, matches=0):
    _, result, _ = fused(body, head, opset, matches=matches)
    assert any(reason in text for text in result.declines), result.declines


def test_nine_operators_become_one(check_pass):
    check_pass(FuseLayerNorm(), f"{HEADER % 18}{HEAD}{CONSTANTS} {{ {NORM} {AFFINE} }}", matches=3)


@pytest.mark.parametrize("square", ["p = Pow(d, two)", "p = Mul(d, d)"])
@pytest.mark.parametrize(
    "division",
    [
        "s = Sqrt(v) r = Reciprocal(s) n = Mul(d, r)",
        "s = Sqrt(v) r = Div(one, s) n = Mul(r, d)",
        "s = Sqrt(v) n = Div(d, s)",
        "r = Pow(v, minus_half) n = Mul(d, r)",
    ],
)
@pytest.mark.parametrize(
    ("affine", "inputs"),
    [("y = Neg(n)", 2), ("y = Mul(w, n)", 2), (AFFINE, 3), ("f = Mul(w, n) y = Add(b, f)", 3), ("y = Add(n, b)", 3)],
)
def test_spellings(square, division, affine, inputs):
    body = (
        f"m = ReduceMean(x, axis2) d = Sub(x, m) {square} m2 = ReduceMean(p, last) v = Add(eps, m2) {division} {affine}"
    )
    operators, _, model = fused(body)
    assert [kind for kind in operators if kind != "Neg"] == ["LayerNormalization"]
    assert len(model.graph[0].inputs) == inputs
    assert model.graph[0].attributes["epsilon"].as_float() == pytest.approx(0.01)


def test_norms_without_a_factor_share_their_ones():
    body = f"{NORM} y1 = Neg(n) q = ReduceMean(y1, last) e = Sub(y1, q) e2 = Mul(e, e) k2 = ReduceMean(e2, last)"
    body += " v2 = Add(k2, eps) s2 = Sqrt(v2) y = Div(e, s2)"
    operators, _, model = fused(body, matches=2)
    assert operators == ["LayerNormalization", "Neg", "LayerNormalization"]
    assert model.graph[0].inputs[1] is model.graph[2].inputs[1]


@pytest.mark.parametrize("lengths", [{"batch": 1, "seq": 1}, {"batch": 2, "seq": 0}])
def test_short_and_empty_inputs(lengths):
    fused(f"{NORM} {AFFINE}", lengths=lengths, matches=3)


@pytest.mark.parametrize("dims", ["1,1,6", "1,6"])
def test_a_factor_with_axes_of_one(dims):
    operators, _, _ = fused(f"{NORM} {AFFINE}", HEAD.replace("float[6] w", f"float[{dims}] w"), matches=3)
    assert operators == ["Reshape", "LayerNormalization"]


def test_half_precision_is_widened_by_the_operator():
    head = HEAD.replace("float[", "float16[")
    body = NORM.replace("(x", "(wide").replace("m = ", "wide = Cast <to = 1> (x) m = ", 1)
    operators, _, model = fused(f"{body} h = Cast <to = 10> (n) f = Mul(h, w) y = Add(f, b)", head, matches=3)
    assert operators == ["LayerNormalization"]
    assert model.graph[0].inputs[0].name == "x"


def test_a_skip_connection_stays_in_front():
    head = HEAD.replace("float[6] w", "float[batch,seq,6] skip, float[6] w")
    body = f"t = Add(x, skip) {NORM.replace('(x', '(t')} {AFFINE}"
    operators, _, _ = fused(body, head, matches=3)
    assert operators == ["Add", "LayerNormalization"]


def test_a_norm_that_others_read_keeps_its_factor_apart():
    head = HEAD.replace("float[] y", "float[] y, float[batch,seq,6] z")
    operators, result, _ = fused(f"{NORM} {AFFINE} z = Neg(n)", head, matches=1)
    assert sorted(operators) == ["Add", "LayerNormalization", "Mul", "Neg"]
    assert any("others read" in reason for reason in result.declines)


def test_declines_old_opsets():
    by_attribute = "ReduceMean <keepdims = 1, axes = [-1]>"
    body = NORM.replace("ReduceMean <keepdims = 1>", by_attribute).replace(", last)", ")")
    _, result, _ = fused(f"{body} {AFFINE}", opset=16, matches=0)
    assert not result.modified


@pytest.mark.parametrize("axes", [("axis1", "axis1"), ("last", "axis1"), ("both", "both")])
def test_declines_other_axes(axes):
    body = NORM.replace("(x, last)", f"(x, {axes[0]})").replace("(p, last)", f"(p, {axes[1]})")
    declined("not the last one", f"{body} {AFFINE}")


def test_declines_a_width_that_is_unknown():
    declined("is unknown", f"{NORM} y = Neg(n)", "g (float[batch,seq,c] x) => (float[] y)")


def test_declines_doubles():
    constants = CONSTANTS.replace("float", "double")
    text = f"{HEADER % 18}{HEAD.replace('float', 'double')}{constants} {{ {NORM} {AFFINE} }}"
    _, result = check(FuseLayerNorm(), text, matches=0)
    assert any("computes in FLOAT" in reason for reason in result.declines)


@pytest.mark.parametrize(("dims", "matches"), [("batch,seq,6", 1), ("seq,6", 1), ("1,1,1,6", 1), ("1", 1)])
def test_declines_factors_that_are_no_vector(dims, matches):
    head = HEAD.replace("float[6] w", f"float[{dims}] w")
    declined("is not known to be a vector of the 6 channels", f"{NORM} {AFFINE}", head, matches=matches)


def test_declines_a_bias_that_is_no_vector():
    head = HEAD.replace("float[6] b", "float[batch,seq,6] b")
    declined("the bias b", f"{NORM} {AFFINE}", head, matches=2)


def test_a_norm_with_a_factor_of_its_own_keeps_it():
    body = "n = LayerNormalization <axis = -1> (x, many) y = Mul(n, w)"
    declined("has a factor or a bias of its own", body)
    declined("has a bias of its own", "n = LayerNormalization <axis = -1> (x, many, many) y = Add(n, w)")


@pytest.mark.parametrize(("dims", "matches"), [("D", 1), ("1,D", 1), ("E", 0), ("?", 0), ("1,?", 0), ("1,1,D", 0)])
def test_a_bias_of_a_width_that_is_only_named(dims, matches):
    """An equal name is an equal width; with another name, it may be a single number, which is added to all channels."""
    head = f"g (float[n,D] x, float[D] s, float[{dims}] b) => (float[] y)"
    body = "f = LayerNormalization(x, s) y = Add(f, b)"
    if "?" in dims:
        declined("is not known to be a vector", body, head, matches=None)
        return
    for lengths in ({"n": 3, "D": 5, "E": 1}, {"n": 1, "D": 1, "E": 4}):
        fused(body, head, matches=matches, lengths=lengths)


def test_a_number_of_two_axes_is_none_of_the_formula():
    """It would give the norm of a vector two axes."""
    head = "g (float[6] x, float[6] w, float[6] b) => (float[] y)"
    body = NORM.replace("Sqrt(v) n = Div(d, s)", "Sqrt(v) r = Div(deep, s) n = Mul(d, r)") + AFFINE
    source = f"{HEADER % 18}{head}{CONSTANTS}".replace("<float two", "<float[1,1] deep = {1}, float two")
    check(FuseLayerNorm(), f"{source} {{ {body} }}", matches=0)
