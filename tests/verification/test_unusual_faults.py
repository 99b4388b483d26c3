"""Faults that only certain inputs show are found by `verify` and the numeric check; right twins raise no alarm."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.graph.completion import complete_types
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.pipeline.runner import run_passes
from passopt.testing.checking import read_model
from passopt.verification.rewrites.check import NumericCheck, Violation
from passopt.verification.sampling.trace import trace
from passopt.verification.verify import verify

REPEATED = """(float[n] x, int64 rounds) => (float[n] y) <bool yes = {1}, float limit = {1000}> {
    count = Abs(rounds) y, z = Loop <body = b (int64 i, bool go, float[n] a, float[n] c)
        => (bool more, float[n] a2, float[n] c2) {
            half = Constant <value_float = 0.5> () a2 = Mul(a, half) c2 = Add(c, a2)
            s = ReduceSum <keepdims = 0> (c2) more = Less(s, limit) }> (count, yes, x, x) }"""
BOTH = """(int64[b,e] input_ids, int64[b,e] attention_mask, int64[b,d] decoder_input_ids) => (float[b,d,6] hidden)
    <float[20,6] words = random, int64 axis = {1}, int64 zero = {0}, int64[1] one = {1}> {
    x = Gather(words, input_ids) y = Gather(words, decoder_input_ids) m = Cast <to = 1> (attention_mask)
    w = Unsqueeze(m, one) xt = Transpose <perm = [0, 2, 1]> (x) s = MatMul(y, xt) t = Mul(s, w) c = MatMul(t, x)
    r = ReduceMean(c, one) l = Shape(input_ids) k = Gather(l, axis) f = Cast <to = 1> (k) u = Mul(c, f)
    hidden = Add(u, r) }"""
SELECTED = """(float[1,a,4] boxes, float[1,c,a] scores) => (int64[k,3] y)
    <int64 top = {3}, float overlap = {0.5}, float least = {0.0}> {
    y = NonMaxSuppression(boxes, scores, top, overlap, least) }"""

#: (the graph, what is replaced, by what)
FAULTS = [
    (REPEATED, "more = Less(s, limit)", "less = Less(s, limit) more = Or(less, go)"),
    (REPEATED, "ReduceSum <keepdims = 0> (c2)", "ReduceSum <keepdims = 0> (a2)"),
    (BOTH, "l = Shape(input_ids)", "l = Shape(decoder_input_ids)"),
    (SELECTED, "overlap = {0.5}", "overlap = {0.6}"),
    ("(float[n] x) => (bool[n] y) { y = IsInf <detect_negative = 0> (x) }", " <detect_negative = 0>", ""),
    (
        "(float[n] x) => (bool[n] y) { a = Neg(x) y = IsNaN(a) }",
        "y = IsNaN(a)",
        "f = IsInf(a) z = IsNaN(a) y = Or(f, z)",
    ),
    (
        "(float[n] x) => (float[n] y) <float one = {1}> { y = Softplus(x) }",
        "y = Softplus(x)",
        "e = Exp(x) f = Add(e, one) y = Log(f)",
    ),
]


def read(text):
    model = read_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    complete_types(model)
    return model


def checked(before, after):
    def run(self, model):
        model.graph = after.clone().graph
        return PassResult(modified=True, matches=1)

    made = type("Replace", (Pass,), {"run": run, "accuracy": REASSOCIATED})
    made.name = "replace"
    watch = NumericCheck()
    run_passes(before.clone(), [made()], instruments=[watch], verify=False)
    return watch.summaries[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[2] or fault[1])
def test_a_fault_that_only_certain_inputs_show_is_found(fault):
    text, old, new = fault
    right, wrong = read(text), read(text.replace(old, new))
    assert verify(right, right.clone()).ok
    assert not verify(right, wrong).ok
    assert checked(right, right).whole
    with pytest.raises(Violation, match="replace: "):
        checked(right, wrong)


def test_an_encoder_is_as_long_as_it_likes():
    lengths = [run.sample.lengths.known for run in trace(read(BOTH)).runs]
    assert any(item["e"] != item["d"] for item in lengths)


FOLDED = """(float[b,2,h] x) => (float[b,2,h] y) <float low = {0}, float high = {6}, float[2] s = {3, -2},
    float[2] b = {1, 5}, float[2] m = {70, 30}, float[2] v = {0.0004, 0.0001}, float[2,2,1] k = {1, 2, -3, 4}> {
    c = Conv(x, k) n = BatchNormalization <epsilon = 0.0> (c, s, b, m, v) y = Clip(n, low, high) }"""


def folded(model, error=0.0):
    """A batch norm folded into the convolution, as tools for deployment do, in weights of other names."""
    s, b, m, v, k = (model.graph.initializers[name].const_value.numpy() for name in "sbmvk")
    factor = (s / np.sqrt(v)).astype(np.float32)
    text = FOLDED.replace(
        "c = Conv(x, k) n = BatchNormalization <epsilon = 0.0> (c, s, b, m, v)", "n = Conv(x, wk, wb)"
    )
    result = read(text.replace("float[2] s =", "float[2,2,1] wk = {1,1,1,1}, float[2] wb = {1,1}, float[2] s ="))
    for name, array in (("wk", k * factor[:, None, None] * (1 + error)), ("wb", b - m * factor)):
        result.graph.initializers[name].const_value = onnx_ir.tensor(array.astype(np.float32), name=name)
    return result


def test_a_folded_norm_before_a_clip_raises_no_alarm():
    """Large numbers cancel before the Clip, and `low` is a weight that is zero."""
    model = read(FOLDED)
    assert checked(model, folded(model)).sites
    with pytest.raises(Violation):
        checked(model, folded(model, 0.01))


def test_numbers_that_cancel_have_more_room():
    text = "(float[n,4] x, float[n,4] z) => (float[n,4] y) <float k = {3000}> { BODY y = Sub(a, b) }"
    model = read(text.replace("BODY", "w = Sub(x, k) a = Add(w, z) b = Add(z, x)"))
    report = verify(model, read(text.replace("BODY", "s = Add(x, z) a = Sub(s, k) b = Add(x, z)")))
    assert report.ok, report.to_text()
    text = "(float[n,8] x) => (float[n,8] y) <float k = {20}> { c = Add(x, k) s = Sub(c, k) y = BODY }"
    model = read(text.replace("BODY", "Neg(s)"))
    assert verify(model, read("(float[n,8] x) => (float[n,8] y) { y = Neg(x) }")).ok
    assert not verify(model, read("(float[n,8] x) => (float[n,8] y) <float k = {-1.001}> { y = Mul(x, k) }")).ok


def test_a_candidate_that_refuses_empty_inputs_says_so():
    text = "(float[n,4] x) => (float[n,4] y) <int64 first = {0}> { y = Neg(x) }"
    other = text.replace("y = Neg(x)", "g = Gather(x, first) z = Sub(g, g) n = Neg(x) y = Add(n, z)")
    report = verify(read(text), read(other))
    assert report.ok, report.to_text()
    assert any(note.startswith("not compared on empty inputs, n 0") for note in report.notes)
    assert not verify(read(text), read(other.replace("y = Add(n, z)", "w = Abs(x) y = Add(w, z)"))).ok


def test_kernels_that_may_crash_on_empty_inputs_never_see_them():
    """Einsum and GRU end the process; the original would take empty inputs."""
    text = "(float[n,4] x, float[4,n] z) => (float[n,n] y) { y = MatMul(x, z) }"
    model, other = read(text), read(text.replace("MatMul(x, z)", 'Einsum <equation = "ij,jk->ik"> (x, z)'))
    report = verify(model, other)
    assert report.ok
    assert any(note.startswith("not compared on empty inputs, n 0") for note in report.notes)
    assert checked(model, other).whole


@pytest.mark.parametrize(("last", "right"), [("{0, 0, 6}", True), ("{0, 1, -1}", False)])
def test_a_target_of_a_reshape_may_be_said_in_other_numbers(last, right):
    text = """(float[b,s,2,3] x) => (float[b,s,6] y) <int64[1] six = {6}, float[6] t = {1, 2, 3, 4, 5, 6}> {
        l = Shape <end = 2> (x) to = Concat <axis = 0> (l, six) r = Reshape(x, to) y = Mul(r, t) }"""
    other = text.replace("l = Shape <end = 2> (x) to = Concat <axis = 0> (l, six)", "")
    other = other.replace("int64[1] six = {6}", f"int64[3] to = {last}")
    if right:
        assert checked(read(text), read(other)).sites
        return
    with pytest.raises(Violation):
        checked(read(text), read(other))
