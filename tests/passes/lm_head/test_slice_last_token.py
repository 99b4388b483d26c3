"""slice-last-token: the logits of the last position, bit by bit, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.passes.lm_head.slice_last_token import SliceLastToken
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.shard import Shard
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
HEAD = """
g (float[batch,seq,6] x) => (float[batch,seq,5] logits) <float[6,5] w = random, float[5] b = {1, 2, 3, 4, 5}> {
    h = Relu(x)
    m = MatMul(h, w)
    logits = Add(m, b)
}"""
#: A pass that changes a shape can only be compared where the shape stays: on one position.
ONE = {"seq": 1}


def sliced(text, lengths):
    """(outputs before, outputs after) on `lengths`, after every check of `check`."""
    model = read_model(HEADER + text)
    changed, result = check(SliceLastToken(), model, lengths=ONE)
    assert result.matches == 1, result.declines
    feeds = random_feeds(model, lengths)
    return Session(model).run(feeds), Session(changed).run(feeds)


def declined(text):
    _, result = check(SliceLastToken(), HEADER + text, lengths=ONE)
    assert not result.modified
    (reason,) = result.declines
    return reason


def test_head_sees_the_last_position(check_pass):
    model, _ = check_pass(SliceLastToken(), HEADER + HEAD, lengths=ONE, matches=1)
    assert str(model.graph.outputs[0].shape) == "[batch,1,5]"


@pytest.mark.parametrize("seq", [1, 4, 7])
def test_logits_are_those_of_the_last_position(seq):
    before, after = sliced(HEAD, {"batch": 2, "seq": seq})
    assert after["logits"].shape == (2, 1, 5)
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6)


def test_casts_and_scales_after_the_head():
    text = HEAD.replace(
        "logits = Add(m, b)", "a = Add(b, m) t = Mul(a, two) u = Tanh(t) v = Cast<to=11>(u) logits = Cast<to=1>(v)"
    )
    before, after = sliced(text.replace("b = {1", "two = {2, 2, 2, 2, 2}, float[5] b = {1"), {"seq": 3})
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6)


def test_a_slice_of_the_vocabulary_after_the_head():
    text = HEAD.replace("logits = Add(m, b)", "logits = Slice(m, zero, three, last)").replace("seq,5]", "seq,3]")
    text = text.replace(
        "float[5] b = {1, 2, 3, 4, 5}", "int64[1] zero = {0}, int64[1] three = {3}, int64[1] last = {-1}"
    )
    before, after = sliced(text, {"seq": 3})
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6)


def test_other_users_of_the_hidden_state_see_all_positions():
    text = HEAD.replace("seq,5] logits)", "seq,5] logits, float[batch,seq,6] n)").replace(
        "m = MatMul", "n = Neg(h) m = MatMul"
    )
    before, after = sliced(text, {"seq": 4})
    assert np.array_equal(before["n"], after["n"])


def test_a_hidden_state_that_is_an_output_stays_whole():
    text = HEAD.replace("seq,5] logits)", "seq,5] logits, float[batch,seq,6] h)")
    before, after = sliced(text, {"seq": 4})
    assert np.array_equal(before["h"], after["h"])


def test_it_works_on_a_sharded_head():
    changed, _ = check(Shard(5), HEADER + HEAD)
    result = SliceLastToken().run(changed)
    assert result.matches == 1
    gather = next(node for node in changed.graph if node.op_type == "AllGather")
    assert gather.inputs[0].shape[1] == 1


def test_declines_a_graph_without_a_head():
    assert declined(HEAD.replace("logits", "scores")) == "no head: the logits do not come from a linear"
    assert declined(HEAD.replace("Add(m, b)", "Relu(m)")) == "no head: the logits do not come from a linear"


def test_declines_a_head_on_rows():
    assert declined(HEAD.replace("[batch,seq,", "[seq,")) == "the head's input is not [batch, seq, hidden]"


def test_declines_what_has_one_position():
    assert declined(HEAD.replace("seq,", "1,")) == "the head sees one position already"


@pytest.mark.parametrize(
    ("outputs", "body", "value"),
    [
        (", float[batch,seq,5] p", "logits = Add(m, b) p = Softmax<axis=-1>(logits)", "logits"),
        (", float[batch,seq,5] p", "p = Softmax<axis=-1>(m) logits = Add(m, b)", "m"),
        (", float[batch,seq,5] m", "logits = Add(m, b)", "m"),
    ],
)
def test_declines_a_head_that_others_read(outputs, body, value):
    text = HEAD.replace(" logits)", f" logits{outputs})").replace("logits = Add(m, b)", body)
    assert declined(text) == f"{value} is used for more than the logits"


def test_declines_an_operand_with_a_value_per_position():
    text = HEAD.replace("x) =>", "x, float[batch,seq,5] r) =>").replace("Add(m, b)", "Add(m, r)")
    assert declined(text).endswith("after the head reads r, which has a value per position")


@pytest.mark.parametrize("dims", [[3, 5], [1, 3, 5], [2, 3, 5], [3, 1], [1, 1, 1, 5]])
def test_declines_a_constant_with_a_value_per_position(dims):
    kind = f"float[{','.join(map(str, dims))}]"
    text = HEAD.replace("batch,seq", "2,3").replace("float[5] b = {1, 2, 3, 4, 5}", f"{kind} b = random")
    text = text.replace("(float[2,3,5] logits)", "(float[] logits)")
    assert declined(text).endswith(
        f"after the head reads b of shape {dims}, expected [vocab] or one position: [1, vocab], [batch, 1, vocab]"
    )


@pytest.mark.parametrize("dims", [[1, 5], [1, 1, 5], [2, 1, 5], [1, 1], [2, 1, 1]])
def test_a_constant_of_one_position_stays(dims):
    kind = f"float[{','.join(map(str, dims))}]"
    text = HEAD.replace("batch,", "2,").replace("float[5] b = {1, 2, 3, 4, 5}", f"{kind} b = random")
    before, after = sliced(text, {"seq": 4})
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6)


@pytest.mark.parametrize("stated", ["float[batch,seq,5]", "float[]"])
def test_a_graph_that_is_declined_is_left_as_it_is(stated):
    """Also where its output says less than could be inferred."""
    text = HEADER + HEAD.replace("float[batch,seq,5] logits", f"{stated} logits").replace("Add(m, b)", "Relu(m)")
    _, result = check(SliceLastToken(), text)
    model = read_model(text)
    model.graph.outputs[0].shape = onnx_ir.Shape([None, None, 5])
    _, again = check(SliceLastToken(), model)
    assert not result.modified
    assert not again.modified


def test_declines_a_slice_of_positions():
    text = HEAD.replace("logits = Add(m, b)", "[cut] logits = Slice(m, zero, three, axis)")
    text = text.replace(
        "float[5] b = {1, 2, 3, 4, 5}", "int64[1] zero = {0}, int64[1] three = {3}, int64[1] axis = {1}"
    )
    assert declined(text) == "Slice 'cut' picks positions of the logits"


def test_types_that_the_model_does_not_state_are_found():
    model = read_model(HEADER + HEAD)
    assert all(value.shape is None for value in model.graph[0].outputs)
    assert SliceLastToken().run(model).modified
    assert isinstance(model.graph.outputs[0].shape[1], int)
    assert model.graph.outputs[0].dtype == onnx_ir.DataType.FLOAT


def dynamic_head(text=HEAD):
    model = read_model(HEADER + text)
    QuantizeWeights(head=True).run(model)
    assert QuantizeActivations().run(model).modified
    return model


def test_a_head_with_dynamic_activations_quantises_the_last_position_only():
    model = dynamic_head()
    changed, result = check(SliceLastToken(), model, lengths=ONE)
    assert result.matches == 1, result.declines
    feeds = random_feeds(model, {"batch": 2, "seq": 5})
    before, after = Session(model).run(feeds), Session(changed).run(feeds)
    assert after["logits"].shape == (2, 1, 5)
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6)
    rows = next(node for node in changed.graph if node.op_type == "MatMulInteger").inputs[0]
    assert str(rows.shape) == "[batch,1,6]"


def test_the_orders_of_slicing_and_quantising_the_head_give_one_graph():
    sliced_first = read_model(HEADER + HEAD)
    SliceLastToken().run(sliced_first)
    QuantizeWeights(head=True).run(sliced_first)
    QuantizeActivations().run(sliced_first)
    last = dynamic_head()
    SliceLastToken().run(last)
    feeds = random_feeds(last, {"batch": 2, "seq": 5})
    assert np.array_equal(Session(last).run(feeds)["logits"], Session(sliced_first).run(feeds)["logits"])
    assert [node.op_type for node in last.graph] == [node.op_type for node in sliced_first.graph]


def test_declines_rows_that_another_linear_multiplies():
    text = HEAD.replace("seq,5] logits)", "seq,5] logits, float[batch,seq,4] n)").replace(
        "m = MatMul", "n = MatMul(h, v) m = MatMul"
    )
    model = dynamic_head(text.replace("float[5] b", "float[6,4] v = random, float[5] b"))
    _, result = check(SliceLastToken(), model, lengths=ONE)
    (reason,) = result.declines
    assert reason == "h.where is used for more than the logits"
