"""unmerge-heads: attention over batch·heads becomes attention over batch and heads, with the same numbers."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.graph.completion import complete_types
from passopt.passes.attention.unmerge_heads import UnmergeHeads
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
HEAD = "g (float[batch,5,seq,3] q, float[batch,5,t,3] k, float[batch,5,t,4] v, float[batch,5,t] bias) => (float[] y)"
CONSTANTS = (
    "<int64[1] minus = {-1}, int64[1] one = {1}, int64[1] three = {3}, int64[1] four = {4}, int64[1] five = {5},"
    "float scale = {0.4}, float[3] many = {1, 2, 3}, float[1,1,4] row = {1, 2, 3, 4}> {"
    "b = Shape<end=1>(q) s = Shape<start=2, end=3>(q) t = Shape<start=2, end=3>(k)"
)
MERGE = """
    qs = Concat<axis=0>(minus, s, three) q3 = Reshape(q, qs)
    ks = Concat<axis=0>(minus, t, three) k3 = Reshape(k, ks)
    vs = Concat<axis=0>(minus, t, four) v3 = Reshape(v, vs)
    bs = Concat<axis=0>(minus, one, t) b3 = Reshape(bias, bs)"""
SCORES = " kt = Transpose<perm=[0, 2, 1]>(k3) raw = MatMul(q3, kt) scaled = Mul(scale, raw) sum = Add(b3, scaled)"
APART = " out = Concat<axis=0>(b, five, s, four) y = Reshape(o, out)"
SHARES = " p = Softmax<axis=-1>(sum) o = MatMul(p, v3)"


def unmerged(body, head=HEAD, matches=1):
    model, _ = check(UnmergeHeads(), f"{HEADER}{head}{CONSTANTS}{body} }}", matches=matches)
    return model


def declined(reason, body, head=HEAD):
    result = UnmergeHeads().run(read_model(f"{HEADER}{head}{CONSTANTS}{body} }}"))
    assert not result.modified
    assert any(reason in text for text in result.declines), result.declines


def test_attention_over_merged_heads(check_pass):
    check_pass(UnmergeHeads(), f"{HEADER}{HEAD}{CONSTANTS}{MERGE}{SCORES}{SHARES}{APART} }}", matches=1)


@pytest.mark.parametrize("shares", [SHARES.replace("<axis=-1>", ""), SHARES.replace("-1", "2"),
    " d = Cast<to=11>(sum) e = Softmax(d) p = Cast<to=1>(e) o = MatMul(p, v3)"])  # fmt: skip
def test_softmax_and_casts(shares):
    model = unmerged(MERGE + SCORES + shares + APART)
    product = model.graph.outputs[0].producer()
    assert product.op_type == "MatMul"
    assert [value.name for value in product.inputs][1] == "v"
    assert str(product.inputs[0].shape) == "[batch,5,seq,t]"


def test_scores_that_others_read_stay():
    head = HEAD.replace("(float[] y)", "(float[] y, float[m,seq,t] sum, float[] z)")
    model = unmerged(MERGE + SCORES + SHARES + APART + " z = Neg(p)", head)
    assert [value.name for value in model.graph.outputs] == ["y", "sum", "z"]
    assert [node.op_type for node in model.graph].count("Softmax") == 2


def test_declines_other_reshapes():
    declined(
        "does not split [batch·heads, …] into batch and heads",
        " shape = Concat<axis=0>(b, minus, four) y = Reshape(v, shape)",
    )


def test_declines_what_is_not_computed_merged():
    body = MERGE + " shape = Concat<axis=0>(b, five, s, three) y = Reshape(q3, shape)"
    declined("q3 is not computed with batch and heads merged", body)


def test_declines_what_has_no_form_apart():
    body = MERGE + SCORES + SHARES.replace("sum)", "low)").replace(" p =", " low = Tanh(sum) p =") + APART
    declined("low comes from Tanh, which has no form with batch and heads apart", body)


@pytest.mark.parametrize("perm", ["<perm=[1, 0, 2]>", ""])
def test_declines_another_transpose(perm):
    head = "g (float[5,2,3] x) => (float[] y)"
    constants = CONSTANTS.partition("> {")[0] + ", int64[4] apart = {1, 3, 2, 5}> {"
    body = f"a = Neg(x) u = Transpose{perm}(a) w = Add(u, u) y = Reshape(w, apart) }}"
    if perm:
        constants = constants.replace("{1, 3, 2, 5}", "{1, 2, 5, 3}")
    result = UnmergeHeads().run(read_model(HEADER + head + constants + body))
    assert any("comes from Transpose, which has no form" in text for text in result.declines), result.declines


def test_declines_a_softmax_over_rows():
    body = MERGE + SCORES + SHARES.replace("-1", "1") + APART
    declined("comes from Softmax, which has no form", body)


def test_declines_what_every_head_shares():
    body = MERGE + " o = Add(v3, row)" + APART.replace("b, five, s", "b, five, t")
    declined("row [1, 1, 4] does not have batch and heads merged", body)


def test_declines_other_elements():
    head = HEAD.replace("float[batch,5,t] bias", "float[t,4] bias")
    body = " vs = Concat<axis=0>(minus, t, four) v3 = Reshape(v, vs) one3 = Concat<axis=0>(one, t, four)"
    body += " b3 = Reshape(bias, one3) o = Add(v3, b3)" + APART.replace("b, five, s", "b, five, t")
    declined("merges ['t', 4], not ['batch', 5, 't', 4]", body, head)


def test_a_length_that_an_exporter_states_its_own_way():
    """torch states the columns of a prefill's scores as `(seq**2)//seq`; the other lengths leave them no choice."""
    text = MERGE + SCORES + SHARES + APART
    model = read_model(f"{HEADER}{HEAD}{CONSTANTS}{text} }}")
    complete_types(model)
    (parted,) = (node for node in model.graph if node.outputs[0].is_graph_output())
    parted.inputs[0].shape = onnx_ir.Shape(["5*batch", "seq", 4])
    parted.outputs[0].shape = onnx_ir.Shape(["batch", 5, "(seq**2)//seq", 4])
    result = UnmergeHeads().run(model)
    assert result.matches == 1


def test_declines_lengths_of_which_none_is_known_to_stay():
    text = MERGE + SCORES + SHARES + APART
    model = read_model(f"{HEADER}{HEAD}{CONSTANTS}{text} }}")
    complete_types(model)
    (parted,) = (node for node in model.graph if node.outputs[0].is_graph_output())
    parted.inputs[0].shape = onnx_ir.Shape(["rows", "seq", 4])
    parted.outputs[0].shape = onnx_ir.Shape(["batch", 5, "(seq**2)//seq", 4])
    result = UnmergeHeads().run(model)
    assert not result.modified
    assert any("does not split [batch·heads, …] into batch and heads" in reason for reason in result.declines)
