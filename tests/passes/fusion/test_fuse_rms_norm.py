"""fuse-rms-norm: every spelling becomes one operator, and what is no norm stays."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.provenance import MADE_BY
from passopt.passes.fusion.fuse_rms_norm import FuseRmsNorm
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
HEAD = "g (float[batch,seq,6] x, float[6] w) => (float[] y)"
CONSTANTS = (
    "<float two = {2}, float one = {1}, float eps = {0.01}, float minus_half = {-0.5}, int64[1] last = {-1},"
    "int64[1] axis2 = {2}, int64[1] axis1 = {1}, int64[2] both = {1, 2}, float[6] many = {1, 2, 3, 4, 5, 6}>"
)
BODY = """
    p = Pow(x, two)
    m = ReduceMean <keepdims = 1> (p, last)
    v = Add(m, eps)
    s = Sqrt(v)
    r = Reciprocal(s)
    n = Mul(x, r)
    y = Mul(w, n)"""


def fused(body=BODY, head=HEAD, opset=23, **settings):
    model, result = check(FuseRmsNorm(), f"{HEADER % opset}{head}{CONSTANTS} {{ {body} }}", **settings)
    return [node.op_type for node in model.graph], result, model


def declined(reason, body=BODY, head=HEAD, opset=23):
    _, result, _ = fused(body, head, opset, matches=0)
    assert any(reason in text for text in result.declines), result.declines


def test_six_operators_become_one(check_pass):
    check_pass(FuseRmsNorm(), f"{HEADER % 23}{HEAD}{CONSTANTS} {{ {BODY} }}", matches=1)


@pytest.mark.parametrize("square", ["p = Pow(x, two)", "p = Mul(x, x)"])
@pytest.mark.parametrize(
    "inverse",
    [
        "s = Sqrt(v) r = Reciprocal(s) n = Mul(x, r)",
        "s = Sqrt(v) r = Div(one, s) n = Mul(r, x)",
        "s = Sqrt(v) n = Div(x, s)",
        "r = Pow(v, minus_half) n = Mul(x, r)",
    ],
)
@pytest.mark.parametrize("factor", ["y = Mul(w, n)", "y = Mul(n, w)"])
def test_spellings(square, inverse, factor):
    body = f"{square} m = ReduceMean(p, axis2) v = Add(eps, m) {inverse} {factor}"
    operators, _, model = fused(body, matches=1)
    assert operators == ["RMSNormalization"]
    attributes = model.graph[0].attributes
    assert attributes["epsilon"].as_float() == pytest.approx(0.01)
    assert attributes["axis"].as_int() == -1


def half(body, kind="float16", weight="float16"):
    head = f"g ({kind}[batch,seq,6] h, {weight}[6] w) => ({weight}[] y)"
    x = np.random.default_rng(3).standard_normal((2, 3, 6)) * 300  # squares overflow in fp16
    return fused(body, head, feeds={"h": x.astype(np.float16)}, tolerance=2e-3)


def test_the_casts_of_half_precision_go():
    body = "x = Cast <to = 1> (h)" + BODY.replace("y = Mul(w, n)", "c = Cast <to = 10> (n) y = Mul(w, c)")
    operators, _, model = half(body)
    assert operators == ["RMSNormalization"]
    assert model.graph[0].inputs[0].name == "h"


def test_a_weight_in_fp32_keeps_the_cast():
    operators, _, _ = half("x = Cast <to = 1> (h)" + BODY, weight="float")
    assert operators == ["Cast", "RMSNormalization"]


def test_a_factor_may_be_computed_and_have_leading_axes():
    head = "g (float[batch,seq,6] x, float[1,1,6] v1) => (float[] y)"
    operators, _, _ = fused("w = Add(v1, one)" + BODY, head, matches=1)
    assert operators == ["Add", "Reshape", "RMSNormalization"]


def test_what_others_read_stays():
    head = HEAD.replace("(float[] y)", "(float[] y, float[batch,seq,1] r)")
    operators, _, model = fused(BODY, head, matches=1)
    assert "RMSNormalization" in operators
    assert operators.count("Reciprocal") == 1
    assert [value.name for value in model.graph.outputs] == ["y", "r"]


def test_two_norms_of_one_input_are_two():
    head = "g (float[batch,seq,6] x, float[6] w, float[6] u) => (float[] y, float[] z)"
    operators, _, _ = fused(BODY + " z = Mul(n, u)", head, matches=2)
    assert operators == ["RMSNormalization", "RMSNormalization"]


def test_provenance_names_the_pass():
    _, _, model = fused()
    assert "fuse-rms-norm" in model.graph[0].metadata_props[MADE_BY]


def test_declines_an_older_opset():
    declined("needs opset 23, this model has 21; run legalize first", opset=21)


@pytest.mark.parametrize("axes", ["axis1", "both"])
def test_declines_the_mean_of_another_axis(axes):
    declined("not the last one", BODY.replace("last", axes))


def test_declines_a_factor_that_is_no_weight():
    for shape in ("batch,seq,6", "seq,6", "1", "batch,1,6"):
        declined("is not a weight of the last axis", head=HEAD.replace("float[6] w", f"float[{shape}] w"))


def test_declines_an_epsilon_per_channel():
    declined("many is [6], not one number", BODY.replace("eps", "many"))
    declined("eps is not a small constant", head=HEAD.replace("float[6] w", "float[6] w, float eps"))


def test_declines_a_cast_of_what_was_not_widened():
    head = "g (float[batch,seq,6] x, float16[6] w) => (float16[] y)"
    body = BODY.replace("y = Mul(w, n)", "c = Cast <to = 10> (n) y = Mul(w, c)")
    declined("is cast to FLOAT16, but x was not widened from that", body, head)


def test_declines_double():
    head = HEAD.replace("float", "double")
    constants = CONSTANTS.replace("float ", "double ")
    _, result = check(FuseRmsNorm(), f"{HEADER % 23}{head}{constants} {{ {BODY} }}", matches=0)
    assert result.declines == {"the input x is DOUBLE, the operator computes in FLOAT": 1}


def test_no_match_without_the_kept_axis():
    body = BODY.replace("keepdims = 1", "keepdims = 0").replace("n = Mul(x, r)", "u = Unsqueeze(r, last) n = Mul(x, u)")
    assert fused(body, matches=0)[0][-1] == "Mul"
