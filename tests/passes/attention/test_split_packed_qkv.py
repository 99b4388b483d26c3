"""split-packed-qkv on both spellings of a packed projection, [out, in] and [in, out]."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.attention.split_packed_qkv import SplitPackedQkv
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'

GATHERED = """
attention (float[batch,seq,7] x) => (float[batch,seq,4] q, float[batch,seq,4] k, float[batch,seq,4] v)
<float[12,7] w = random, int64[4] shape = {0, 0, 3, 4}, int64[1] zero = {0}, int64[1] back = {-2},
 int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}> {
    t = Transpose<perm=[1,0]>(w)
    p = MatMul(x, t)
    u = Reshape(p, shape)
    a = Unsqueeze(u, zero)
    b = Transpose<perm=[3,1,2,0,4]>(a)
    c = Squeeze(b, back)
    q = Gather<axis=0>(c, i0)
    k = Gather<axis=0>(c, i1)
    v = Gather<axis=0>(c, i2)
}"""

DIVIDED = """
attention (float[batch,7] x) => (float[batch,5] q, float[batch,2] k, float[batch,3] v)
<float[7,10] w = random, int64[3] sizes = {5, 2, 3}> {
    p = MatMul(x, w)
    q, k, v = Split<axis=-1>(p, sizes)
}"""


def in_out(text):
    """The gathered spelling with a weight [in, out]."""
    return text.replace("t = Transpose<perm=[1,0]>(w)", "").replace("(x, t)", "(x, w)").replace("[12,7]", "[7,12]")


def out_in(text):
    """The divided spelling with a weight [out, in]."""
    return text.replace("p = MatMul(x, w)", "t = Transpose<perm=[1,0]>(w) p = MatMul(x, t)").replace("[7,10]", "[10,7]")


def declined(text):
    """The reasons, after asserting that nothing changed."""
    _, result = check(SplitPackedQkv(), HEADER + text)
    assert not result.modified
    return list(result.declines)


def test_split_weight_is_cut_by_columns(check_pass):
    check_pass(
        SplitPackedQkv(),
        """
        <ir_version: 10, opset_import: ["" : 18]>
        attn (float[3,2] x) => (float[3,1] q, float[3,1] k, float[3,2] v)
        <float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}, int64[3] sizes = {1, 1, 2}> {
            qkv = MatMul(x, w)
            q, k, v = Split <axis = -1> (qkv, sizes)
        }""",
        matches=1,
    )


def test_baichuan_spelling_is_cut_by_rows(check_pass):
    check_pass(SplitPackedQkv(), HEADER + GATHERED, matches=1)


@pytest.mark.parametrize("text", [GATHERED, in_out(GATHERED), DIVIDED, out_in(DIVIDED)])
def test_every_spelling_and_layout(text):
    model, _ = check(SplitPackedQkv(), HEADER + text, matches=1)
    assert sorted(model.graph.initializers) == ["w.k", "w.q", "w.v"]
    assert {node.op_type for node in model.graph} <= {"MatMul", "Transpose"}


def test_parts_are_slices_of_the_packed_weight():
    model, _ = check(SplitPackedQkv(), HEADER + DIVIDED)
    parts = [expression_of(model.graph.initializers[f"w.{part}"]) for part in "qkv"]
    assert [(part.along, part.start, part.shape) for part in parts] == [(1, 0, (7, 5)), (1, 5, (7, 2)), (1, 7, (7, 3))]


def test_squeeze_may_count_from_the_front():
    check(SplitPackedQkv(), HEADER + GATHERED.replace("{-2}", "{3}"), matches=1)


def test_a_packed_value_that_is_also_read_otherwise_stays():
    text = GATHERED.replace("float[batch,seq,4] v)", "float[batch,seq,4] v, float[batch,seq,12] r)")
    model, result = check(SplitPackedQkv(), HEADER + text.replace("u = Reshape", "r = Relu(p) u = Reshape"))
    assert result.matches == 1
    assert sorted(model.graph.initializers) == ["w", "w.k", "w.q", "w.v"]


def test_a_packed_value_that_is_a_graph_output_stays():
    text = DIVIDED.replace("float[batch,3] v)", "float[batch,3] v, float[batch,10] p)")
    model, result = check(SplitPackedQkv(), HEADER + text)
    assert result.matches == 1
    assert [value.name for value in model.graph.outputs] == ["q", "k", "v", "p"]


def test_two_projections_of_one_weight():
    text = DIVIDED.replace("x) =>", "x, float[batch,7] z) =>").replace(
        "float[batch,3] v)", "float[batch,3] v, float[batch,5] s)"
    )
    text = text.replace("p = ", "p2 = MatMul(z, w) q2, k2, v2 = Split<axis=-1>(p2, sizes) s = Relu(q2) p = ")
    _, result = check(SplitPackedQkv(), HEADER + text)
    assert result.matches == 2


def test_declines_widths_that_do_not_fill_the_weight():
    """Such a graph cannot run; the pass is not the one to repair it."""
    assert declined(DIVIDED.replace("{5, 2, 3}", "{5, 2, 2}")) == [
        "w has 10 output channels, the pieces take [5, 2, 2]"
    ]


def test_declines_sizes_that_are_computed():
    text = DIVIDED.replace("<float[7,10] w = random, int64[3] sizes = {5, 2, 3}>", "<float[7,10] w = random>")
    text = text.replace("x) =>", "x, int64[3] sizes) =>")
    _, result = check(SplitPackedQkv(), HEADER + text)
    assert list(result.declines) == ["sizes is not a small constant"]


def test_declines_another_squeezed_axis():
    text = (
        GATHERED.replace("{-2}", "{1}").replace("[batch,seq,7] x", "[1,seq,7] x").replace("[batch,seq,4]", "[seq,1,4]")
    )
    assert declined(text) == ["squeezes axis [1], not the one that was unsqueezed"]


def test_declines_a_shape_that_is_not_three_parts():
    text = GATHERED.replace("{0, 0, 3, 4}", "{0, 0, 4, 3}").replace("seq,4]", "seq,3]")
    assert declined(text) == ["u of shape ['batch', 'seq', 4, 3] is not [batch, seq, 3, width]"]


def test_declines_a_computed_weight():
    text = DIVIDED.replace("p = MatMul(x, w)", "n = Neg(w) p = MatMul(x, n)")
    assert declined(text) == ["the weight is computed by Neg; run split-packed-qkv before int8"]


def test_declines_a_weight_that_is_fed():
    text = DIVIDED.replace("float[7,10] w = random, ", "").replace("x) =>", "x, float[7,10] w) =>")
    assert declined(text) == ["w is not a constant weight"]


@pytest.mark.parametrize("text", [GATHERED, DIVIDED])
def test_an_int8_weight_is_split_by_codes_and_scales(text):
    """The pieces are those of a weight that is split first, by name and by value."""
    text = HEADER.replace("18", "21") + text
    quantised, _ = check(QuantizeWeights(), text, tolerance=0.1)
    model, result = check(SplitPackedQkv(), quantised)
    assert result.matches == 1
    other, _ = check(SplitPackedQkv(), text)
    other, _ = check(QuantizeWeights(), other, tolerance=0.1)
    for name in ("w.q.codes", "w.k.codes", "w.v.codes", "w.q.scales", "w.k.scales", "w.v.scales"):
        pair = (model.graph.initializers[name].const_value, other.graph.initializers[name].const_value)
        np.testing.assert_array_equal(*(tensor.numpy() for tensor in pair))


@pytest.mark.parametrize(
    ("attributes", "scales"),
    [("axis=1", "float[7] s"), ("axis=0", "float[1] s"), ("axis=0, block_size=7", "float[2,7] s")],
)
def test_declines_int8_weights_with_other_scales(attributes, scales):
    numbers = ", ".join(map(str, range(-20, 78 if "block" in attributes else 50)))
    text = f"""
    attention (float[batch,7] x) => (float[batch,5] q, float[batch,2] k, float[batch,3] v)
    <int8[10,7] w = {{{numbers}}}, {scales} = random, int64[3] sizes = {{5, 2, 3}}> {{
        d = DequantizeLinear<{attributes}>(w, s)
        t = Transpose<perm=[1,0]>(d)
        p = MatMul(x, t)
        q, k, v = Split<axis=-1>(p, sizes)
    }}"""
    if "block" in attributes:
        text = text.replace("[10,7]", "[14,7]").replace("{5, 2, 3}", "{9, 2, 3}").replace("batch,5", "batch,9")
    _, result = check(SplitPackedQkv(), HEADER.replace("18", "21") + text)
    assert not result.modified
    assert "scale" in next(iter(result.declines))


@pytest.mark.parametrize(("sizes", "outputs"), [("{4, 6}", "q, k"), ("{4, 1, 2, 3}", "q, k, v, w4")])
def test_another_number_of_parts_is_no_match(sizes, outputs):
    """A packed gate and up projection is a Split of two."""
    count = outputs.count(",") + 1
    text = DIVIDED.replace("int64[3] sizes = {5, 2, 3}", f"int64[{count}] sizes = {sizes}").replace(
        "q, k, v =", f"{outputs} ="
    )
    text = text.replace("(float[batch,5] q, float[batch,2] k, float[batch,3] v)", "(float[batch,4] q)")
    assert declined(text) == []
