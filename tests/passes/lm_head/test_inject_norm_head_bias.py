"""inject-norm-head-bias: zeros [vocab] after the head, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.weights.lazy_weight import expression_of
from passopt.ir.weights.literals import Fill
from passopt.passes.lm_head.inject_norm_head_bias import InjectNormHeadBias
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
HEAD = """
g (float[batch,seq,6] x) => (float[batch,seq,9] logits) <float[9,6] w = random> {
    t = Transpose<perm=[1,0]>(w)
    logits = MatMul(x, t)
}"""


def test_head_gets_a_bias_of_zeros(check_pass):
    model, _ = check_pass(InjectNormHeadBias(), HEADER + HEAD, matches=1)
    bias = model.graph.initializers["lm_head.bias"]
    assert np.array_equal(bias.const_value.numpy(), np.zeros(9, np.float32))


def test_bias_takes_the_dtype_of_the_weight():
    model, _ = check(InjectNormHeadBias(), HEADER + HEAD.replace("float[", "float16["))
    assert model.graph.initializers["lm_head.bias"].const_value.numpy().dtype == np.float16


def test_bias_of_a_large_vocabulary_holds_no_numbers():
    text = (
        HEAD.replace(" <float[9,6] w = random>", "")
        .replace("x)", "x, float[125696,6] w)")
        .replace("seq,9", "seq,125696")
    )
    model, _ = check(InjectNormHeadBias(), HEADER + text)
    assert expression_of(model.graph.initializers["lm_head.bias"]) == Fill(onnx_ir.DataType.FLOAT, (125696,), 0.0)


def test_a_shared_weight_is_read_by_both():
    text = HEAD.replace("float[batch,seq,9] logits)", "float[batch,seq,9] logits, float[batch,seq,9] other)")
    text = text.replace("logits = ", "n = Neg(x) other = MatMul(n, t) logits = ")
    model, result = check(InjectNormHeadBias(), HEADER + text)
    assert result.matches == 1
    assert list(result.declines) == ["not the head: its output is not the logits"]
    assert list(model.graph.initializers) == ["w", "lm_head.bias"]


def test_logits_that_are_read_inside_have_the_bias():
    text = HEAD.replace("float[batch,seq,9] logits)", "float[batch,seq,9] logits, float[batch,seq,9] p)")
    model, result = check(InjectNormHeadBias(), HEADER + text.replace("\n}", " p = Softmax<axis=-1>(logits)\n}"))
    assert result.matches == 1
    assert [value.name for value in model.graph.outputs] == ["logits", "p"]


@pytest.mark.parametrize(
    "text",
    [
        HEAD.replace("logits", "scores"),
        HEAD.replace("logits = MatMul(x, t)", "m = MatMul(x, t) logits = Relu(m)"),
    ],
)
def test_declines_what_is_not_the_head(text):
    _, result = check(InjectNormHeadBias(), HEADER + text)
    assert list(result.declines) == ["not the head: its output is not the logits"]


def test_declines_an_unknown_vocabulary():
    text = (
        HEAD.replace(" <float[9,6] w = random>", "").replace("x)", "x, float[vocab,6] w)").replace("seq,9", "seq,vocab")
    )
    _, result = check(InjectNormHeadBias(), HEADER + text)
    assert list(result.declines) == ["the vocabulary of w is unknown"]


def test_a_weight_that_was_transposed_before_is_no_match():
    text = HEAD.replace("t = Transpose<perm=[1,0]>(w)", "").replace("(x, t)", "(x, w)").replace("[9,6]", "[6,9]")
    _, result = check(InjectNormHeadBias(), HEADER + text)
    assert (result.modified, result.declines) == (False, {})
