"""The attentions that a graph still spells out: found in every spelling, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from passopt.ir.errors import ExpectationError
from passopt.passes.pipeline.attention_sites import attentions, unfused_attentions
from passopt.passes.pipeline.expectations import parse_expectation
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checking import read_model

HEAD = (
    "g (float[2,3,4,5] q, float[2,3,6,5] k, float[2,3,6,7] v, float[2,3,4,6] mask, float[2,4,5] x) => (float[] y)"
    "<float c = {0.3}, float[5,6] w = random, float[6,2] u = random>"
)
TURNED = "kt = Transpose <perm = [0, 1, 3, 2]> (k)"
#: A product that no rule takes for scores: they are scaled by a value of the graph that may be anything.
ODD = f"{TURNED} s = MatMul(q, kt) o = Mul(s, mask) p = Softmax(o) y = MatMul(p, v)"


def read(body, opset=21):
    return read_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {HEAD} {{ {body} }}')


@pytest.mark.parametrize(
    "body",
    [
        ODD,
        f"{TURNED} s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)",
        f"{TURNED} s = MatMul(q, kt) a = Add(s, mask) t = Tanh(a) p = Softmax(t) d = Dropout(p) y = MatMul(d, v)",
        f"{TURNED} s = Einsum <equation = 'bhqd,bhtd->bhqt'> (q, k) p = Softmax(s) y = MatMul(p, v)".replace("'", '"'),
    ],
)
def test_a_softmax_between_two_products(body):
    model = read(body)
    assert [node.outputs[0].name for node in unfused_attentions(model)] == ["p"]
    assert attentions(model) == 1


@pytest.mark.parametrize(
    "body",
    [
        "s = MatMul(x, w) y = Softmax(s)",  # a classifier
        "s = MatMul(x, w) p = Softmax(s) y = MatMul(p, u)",  # a choice of experts, then a linear
        f"{TURNED} s = MatMul(q, kt) y = Softmax(s)",  # the graph hands the weights out, and nothing is weighed
        "p = Softmax(mask) y = MatMul(p, v)",  # weights that are no product
        "y = Neg(x)",
    ],
)
def test_what_is_no_attention(body):
    model = read(body)
    assert unfused_attentions(model) == []
    assert attentions(model) == 0


def run_fuse(model, *expect):
    resolved = resolve("fuse")
    names = [item.name for item in resolved.passes]
    texts = [*resolved.expectations, *expect]
    return run_passes(model, resolved.passes, expectations=[parse_expectation(text, names) for text in texts])


@pytest.mark.parametrize("body", [ODD, "y = Neg(x)", f"{TURNED} s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)"])
def test_fuse_refuses_no_graph_that_is_not_a_decoder(body):
    run_fuse(read(body))


def test_all_attentions_may_be_demanded():
    run_fuse(read(f"{TURNED} s = MatMul(q, kt) p = Softmax(s) y = MatMul(p, v)"), "fuse-attention==attentions")
    with pytest.raises(ExpectationError) as found:
        run_fuse(read(ODD), "fuse-attention==attentions")
    assert "softmaxes between two products are left: p" in str(found.value)
