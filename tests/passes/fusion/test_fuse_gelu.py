"""fuse-gelu: every spelling by erf, tanh and sigmoid becomes one operator, and what is another function stays."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.passes.fusion.fuse_gelu import FuseGelu
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
HEAD = "g (float[batch,5] x) => (float[batch,5] y)"
CONSTANTS = (
    "<float half = {0.5}, float one = {1}, float two = {2}, float three = {3}, float root = {1.4142135},"
    "float inverse = {0.70710678}, float short_root = {1.41421}, float factor = {0.7978845608},"
    "float cubic = {0.044715}, float alpha = {1.702}, float near_root = {1.4142}, float other = {0.6}, "
    "float[1] cubic1 = {0.044715},"
    "float[1] half1 = {0.5}, float[1] one1 = {1}, float[1] root1 = {1.4142135}, float[5] many = {1, 1, 1, 1, 1.1}>"
)
ERF = "d = Div(x, root) e = Erf(d) p = Add(e, one)"
END = "m = Mul(x, p) y = Mul(m, half)"


def gelu(body, head=HEAD, opset=20, **settings):
    """The operators that are left; numbers agree over small and large values."""
    x = (np.linspace(-9, 9, 15) ** 3 / 90).reshape(3, 5)
    feeds = {"x": x.astype(np.float32)} if "batch" in head else {}
    model, result = check(FuseGelu(), f"{HEADER % opset}{head}{CONSTANTS} {{ {body} }}", feeds=feeds, **settings)
    return [node.op_type for node in model.graph], result, model


def declined(reason, body, head=HEAD, opset=20):
    _, result, _ = gelu(body, head, opset, matches=0)
    assert any(reason in text for text in result.declines), result.declines


def test_gelu_by_erf(check_pass):
    check_pass(FuseGelu(), f"{HEADER % 20}{HEAD}{CONSTANTS} {{ {ERF} {END} }}", matches=1)


@pytest.mark.parametrize("inner", ["d = Div(x, root)", "d = Mul(x, inverse)", "d = Div(x, short_root)"])
@pytest.mark.parametrize(
    "end",
    [
        "m = Mul(p, x) y = Mul(half, m)",
        "h = Mul(x, half) y = Mul(h, p)",
        "h = Mul(p, half1) y = Mul(x, h)",
        "m = Mul(x, p) y = Div(m, two)",
        "h = Div(x, two) y = Mul(p, h)",
    ],
)
def test_spellings_by_erf(inner, end):
    operators, _, model = gelu(f"{inner} e = Erf(d) p = Add(one, e) {end}", matches=1)
    assert operators == ["Gelu"]
    assert model.graph[0].attributes["approximate"].as_string() == "none"


@pytest.mark.parametrize("cube", ["c = Pow(x, three)", "s = Mul(x, x) c = Mul(s, x)", "s = Pow(x, two) c = Mul(x, s)"])
@pytest.mark.parametrize("end", [END, "h = Mul(x, half) y = Mul(h, p)", "h = Mul(half, p) y = Mul(h, x)"])
def test_spellings_by_tanh(cube, end):
    body = f"{cube} k = Mul(c, cubic) a = Add(x, k) i = Mul(a, factor) t = Tanh(i) p = Add(t, one) {end}"
    operators, _, model = gelu(body, matches=1)
    assert operators == ["Gelu"]
    assert model.graph[0].attributes["approximate"].as_string() == "tanh"


@pytest.mark.parametrize(
    "inner",
    [
        "k = Mul(x, cubic) k2 = Mul(k, x) a = Add(one, k2) f = Mul(x, factor) i = Mul(f, a)",
        "s = Mul(x, x) k = Mul(cubic1, s) a = Add(k, one) f = Mul(factor, x) i = Mul(a, f)",
        "s = Mul(x, x) k = Mul(s, cubic) a = Add(k, one) f = Mul(x, a) i = Mul(factor, f)",
        "s = Mul(x, x) k = Mul(s, cubic) a = Add(k, one) f = Mul(factor, a) i = Mul(x, f)",
    ],
)
def test_spellings_by_tanh_with_x_taken_out(inner):
    assert gelu(f"{inner} t = Tanh(i) p = Add(one, t) h = Mul(half, x) y = Mul(h, p)", matches=1)[0] == ["Gelu"]


def test_quick_gelu_is_a_swish():
    body = "a = Mul(x, alpha) s = Sigmoid(a) y = Mul(x, s)"
    operators, _, model = gelu(body, opset=24, matches=1)
    assert operators == ["Swish"]
    assert model.graph[0].attributes["alpha"].as_float() == pytest.approx(1.702)
    declined("needs opset 24, this model has 23", body, opset=23)


def test_half_precision():
    """Half precision is written in bit patterns: √2, 1 and 0.5; √2 is off by 1e-4 there."""
    constants = "<float16 root = {15784}, float16 one = {15360}, float16 half = {14336}>"
    text = f"{HEADER % 20}{HEAD.replace('float[', 'float16[')}{constants} {{ {ERF} {END} }}"
    model, _ = check(FuseGelu(), text, matches=1)
    assert [node.op_type for node in model.graph] == ["Gelu"]


def test_a_value_that_others_read():
    operators, _, _ = gelu(f"{ERF} {END} z = Neg(p)", HEAD.replace("y)", "y, float[batch,5] z)"), matches=1)
    assert operators.count("Gelu") == 1
    assert "Erf" in operators


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("Div(x, root)", "Div(x, near_root)"), "near_root is 1.4142, Gelu has 1.414214 there"),
        (("Mul(m, half)", "Mul(m, other)"), "other is 0.6, Gelu has 0.5 there"),
    ],
)
def test_declines_other_numbers(change, reason):
    declined(reason, f"{ERF} {END}".replace(*change))


def test_declines_old_opsets():
    declined("needs opset 20, this model has 19", f"{ERF} {END}", opset=19)


def test_declines_doubles():
    head = HEAD.replace("float[", "double[")
    text = f"{HEADER % 20}{head}{CONSTANTS.replace('float', 'double')} {{ {ERF} {END} }}"
    result = check(FuseGelu(), text, matches=0)[1]
    assert any("not exact enough" in reason for reason in result.declines)


def test_declines_a_number_to_which_constants_add_an_axis():
    body = "d = Div(x, root1) e = Erf(d) p = Add(e, one1) m = Mul(x, p) y = Mul(m, half1)"
    declined("it has none, so that a constant may add some", body, "g (float x) => (float[1] y)")


def test_what_is_no_gelu():
    for body in (f"d = Div(x, root) e = Erf(d) p = Add(e, many) {END}", f"e = Erf(x) p = Add(e, one) {END}"):
        assert gelu(body, matches=0)[1].matches == 0


@pytest.mark.parametrize("place", ["p = Add(e, one)", "m = Mul(x, p) y = Mul(m, half)"])
def test_a_number_of_two_axes_is_none_of_the_formula(place):
    """It would give the Gelu of a vector two axes."""
    body = f"{ERF} {END}".replace(place, place.replace("one", "deep").replace("half", "deep"))
    text = f"{HEADER % 20}g (float[5] x) => (float[1,5] y){CONSTANTS.replace('<', '<float[1,1] deep = {1}, ', 1)}"
    _, result = check(FuseGelu(), f"{text} {{ {body} }}", matches=0)
    assert not result.modified
