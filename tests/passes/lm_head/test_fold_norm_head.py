"""fold-norm-head: every spelling of the normalisation, and nothing that only looks like it."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.weights.expressions import NormalizeRows
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.lm_head.fold_norm_head import FoldNormHead
from passopt.testing.checking import check

OPSET = '<ir_version: 10, opset_import: ["" : {}]>\n'
CONSTANTS = "int64[1] axes = {1}, float eps = {1e-12}, int64[2] shape = {4, 6}"


def head(body, kind="float", opset=21, constants=CONSTANTS, outputs=""):
    """A head of 4 tokens and 6 channels whose weight `w` is normalised to `h` by `body`."""
    return OPSET.format(opset) + (
        f"g ({kind}[batch,6] x) => ({kind}[batch,4] logits{outputs}) <{kind}[4,6] w = random, {constants}> "
        f"{{ {body} t = Transpose<perm=[1,0]>(h) logits = MatMul(x, t) }}"
    )


NORM = "n = ReduceL2(w, axes) c = Clip(n, eps) e = Expand(c, shape) h = Div(w, e)"
ISLAND = (
    "f = Cast<to=1>(w) n = ReduceL2(f, axes) c = Clip(n, eps) e = Expand(c, shape) d = Div(f, e) h = Cast<to=10>(d)"
)


def folded(text, **settings):
    """The expression of the only weight left, after every check of `check`."""
    model, result = check(FoldNormHead(), text, **settings)
    assert result.matches == 1, result.declines
    assert [node.op_type for node in model.graph][-2:] == ["Transpose", "MatMul"]
    return expression_of(model.graph.initializers["w.normalized"]), model


def declined(text):
    _, result = check(FoldNormHead(), text)
    assert not result.modified
    return list(result.declines)


def test_normalisation_moves_into_the_weight(check_pass):
    check_pass(FoldNormHead(), head(NORM), matches=1)


@pytest.mark.parametrize(
    "body",
    [
        NORM,
        NORM.replace("Clip(n, eps)", "Max(n, eps)"),
        NORM.replace("Clip(n, eps)", "Max(eps, n)"),
        NORM.replace("e = Expand(c, shape) ", "").replace("Div(w, e)", "Div(w, c)"),
        NORM.replace("e = Expand(c, shape) ", "").replace("Div(w, e)", "Div(w, c)").replace("Clip", "Max"),
        NORM.replace("ReduceL2(w, axes)", "ReduceL2<keepdims=1>(w, axes)"),
    ],
)
def test_every_spelling_in_fp32(body):
    expression, model = folded(head(body))
    assert isinstance(expression, NormalizeRows)
    assert expression.epsilon == pytest.approx(1e-12)
    assert len(model.graph) == 2


def test_axes_count_from_the_back_too():
    folded(head(NORM, constants=CONSTANTS.replace("{1}", "{-1}", 1)))


def test_axes_as_an_attribute_before_opset_18():
    folded(head(NORM.replace("ReduceL2(w, axes)", "ReduceL2<axes=[1]>(w)"), opset=17))


def test_fp16_weight_normalised_in_fp32():
    expression, model = folded(head(ISLAND, "float16"), tolerance=2e-3)
    assert expression.dtype == onnx_ir.DataType.FLOAT16
    assert len(model.graph) == 2


def test_an_epsilon_that_fp16_rounds_to_zero_is_torchs_own():
    body = NORM
    constants = CONSTANTS.replace("float eps = {1e-12}", "float16 eps = {0}")
    expression, _ = folded(head(body, "float16", constants=constants), tolerance=1e-2)
    assert expression.epsilon == 1e-12


def test_a_large_floor_is_kept():
    expression, _ = folded(head(NORM, constants=CONSTANTS.replace("1e-12", "2.5")))
    assert expression.epsilon == 2.5


def test_the_weight_stays_for_its_other_user():
    text = head(NORM, outputs=", float[batch,4] plain")
    text = text.replace("logits = MatMul", "q = Transpose<perm=[1,0]>(w) plain = MatMul(x, q) logits = MatMul")
    model, result = check(FoldNormHead(), text)
    assert result.matches == 1
    assert sorted(model.graph.initializers) == ["w", "w.normalized"]


def test_a_normalised_weight_that_is_a_graph_output_keeps_its_name():
    model, result = check(FoldNormHead(), head(NORM, outputs=", float[4,6] h"))
    assert result.matches == 1
    assert [value.name for value in model.graph.outputs] == ["logits", "h"]


@pytest.mark.parametrize(
    ("constants", "reason"),
    [
        (CONSTANTS.replace("axes = {1}", "axes = {0}"), "w is normalised over axes [0], not over its rows"),
        (
            CONSTANTS.replace("[1] axes = {1}", "[2] axes = {0, 1}"),
            "w is normalised over axes [0, 1], not over its rows",
        ),
    ],
)
def test_declines_columns_and_the_whole_weight(constants, reason):
    assert declined(head(NORM, constants=constants)) == [reason]


def test_declines_a_floor_that_is_computed():
    text = head(NORM.replace("n = ", "r = ReduceMax<keepdims=0>(x) n = ").replace("Clip(n, eps)", "Max(n, r)"))
    assert declined(text) == ["r is not a small constant"]


def test_declines_a_floor_per_row():
    constants = CONSTANTS.replace("float eps = {1e-12}", "float[1,4,1] eps = {0.1, 100, 0.1, 100}")
    text = head(NORM.replace("Clip(n, eps)", "Max(n, eps)"), constants=constants)
    text = text.replace("e = Expand(c, shape) h = Div(w, e)", "d = Div(w, c) h = Squeeze(d)")
    assert declined(text) == ["w has a floor of shape [1, 4, 1], expected one number"]


def test_declines_a_result_of_another_dtype():
    text = head(ISLAND.replace("to=10", "to=11"), "float16").replace(
        "t = Transpose<perm=[1,0]>(h)", "b = Cast<to=10>(h) t = Transpose<perm=[1,0]>(b)"
    )
    assert declined(text) == ["w is normalised as DOUBLE, the weight is FLOAT16"]


def test_a_norm_without_keepdims_is_not_that_of_rows():
    """On a square weight the quotient is that of columns, and nothing but the attribute shows it."""
    text = head(NORM, opset=17).replace("[4,6]", "[6,6]").replace("{4, 6}", "{6, 6}").replace("[batch,4]", "[batch,6]")
    for spelling in ("ReduceL2<axes=[1], keepdims=0>(w)", "ReduceL2<keepdims=0>(w, axes)"):
        version = text if "axes=[1]" in spelling else text.replace('"" : 17', '"" : 21')
        _, result = check(FoldNormHead(), version.replace("ReduceL2(w, axes)", spelling))
        assert not result.modified


def test_a_norm_over_all_axes_is_no_norm_head():
    assert declined(head(NORM.replace("ReduceL2(w, axes)", "ReduceL2(w)"))) == []


@pytest.mark.parametrize("weight", ["Neg", "Relu"])
def test_a_computed_weight_is_no_match(weight):
    body = f"v = {weight}(w) " + NORM.replace("(w,", "(v,")
    assert declined(head(body)) == []


def test_a_weight_that_the_caller_feeds_is_no_match():
    text = head(NORM).replace("x) =>", "x, float[4,6] w) =>", 1)
    assert declined(text) == []


def test_rows_of_zeros_stay_zeros():
    rows = ", ".join(["0"] * 6 + [str(index + 1) for index in range(18)])
    text = head(NORM).replace("w = random", f"w = {{{rows}}}")
    _, model = folded(text)
    array = model.graph.initializers["w.normalized"].const_value.numpy()
    assert not array[0].any()
    assert np.allclose((array[1:] ** 2).sum(axis=1), 1)
