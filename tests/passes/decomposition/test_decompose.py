"""The decompositions against onnxruntime's fused kernels, at opset 23 and lowered to 18."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.functions import local_function
from passopt.passes.decomposition.decompose_activations import DecomposeActivations
from passopt.passes.decomposition.decompose_attention import DecomposeAttention
from passopt.passes.decomposition.decompose_rms_norm import DecomposeRmsNorm
from passopt.passes.decomposition.decompose_rotary import DecomposeRotary
from passopt.passes.fusion.fuse_attention import FuseAttention
from passopt.passes.fusion.fuse_rms_norm import FuseRmsNorm
from passopt.passes.fusion.fuse_rotary import FuseRotary
from passopt.passes.opset.legalize import Legalize
from passopt.testing.checking import check, compare_numbers, read_model

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
FUSED = {"RMSNormalization", "RotaryEmbedding", "Attention", "Gelu", "Swish"}


def decomposed(item, text, opset=23, lower=True, **settings):
    """Operators of the result; its numbers are those of the fused kernel, at this opset and at 18."""
    original = read_model(HEADER % opset + text) if isinstance(text, str) else text
    model, _ = check(item, original, matches=1, **settings)
    operators = [node.op_type for node in model.graph]
    assert not FUSED & set(operators)
    if lower:
        Legalize(opset=18).run(model)
        compare_numbers(original, model, settings.get("tolerance", 1e-5), settings.get("feeds") or {}, {})
    return operators


def declined(item, text, reason, opset=23):
    _, result = check(item, HEADER % opset + text, matches=0)
    assert [key for key in result.declines if reason in key], result.declines


# RMSNormalization


def test_rms_norm(check_pass):
    check_pass(
        DecomposeRmsNorm(),
        HEADER % 23
        + """g (float[2,3,5] x, float[5] w) => (float[2,3,5] y) { y = RMSNormalization <epsilon = 0.001> (x, w) }""",
        matches=1,
    )


@pytest.mark.parametrize(("axis", "weight"), [(1, "3,5"), (-2, "3,5"), (0, "2,3,5"), (2, "5"), (-1, "1"), (1, "1,5")])
def test_rms_norm_over_several_axes(axis, weight):
    text = (
        f"g (float[2,3,5] x, float[{weight}] w) => (float[2,3,5] y) {{ y = RMSNormalization <axis = {axis}> (x, w) }}"
    )
    decomposed(DecomposeRmsNorm(), text)


def test_rms_norm_in_half_precision_sums_in_fp32():
    text = "g (float16[2,3,5] x, float16[5] w) => (float16[2,3,5] y) { y = RMSNormalization(x, w) }"
    x = np.random.default_rng(0).standard_normal((2, 3, 5)) * 300  # squares overflow in fp16
    operators = decomposed(DecomposeRmsNorm(), text, feeds={"x": x.astype(np.float16)}, tolerance=2e-3)
    assert operators.count("Cast") == 2


def test_declines_rms_norm_of_unknown_rank():
    model = read_model(
        HEADER % 23 + "g (float[2,3] x, int64[2] s, float[3] w) => (float[2,3] y) { h = Reshape(x, s)"
        " y = RMSNormalization <axis = 1> (h, w) }"
    )
    model.graph[0].outputs[0].shape = None
    model.graph[0].inputs[1].shape = None
    result = DecomposeRmsNorm().run(model)
    assert (result.modified, list(result.declines)) == (
        False,
        ["normalises from axis 1 on, and the number of axes of h is unknown"],
    )


# Gelu, Swish


@pytest.mark.parametrize("call", ["Gelu", 'Gelu <approximate = "tanh">', "Swish", "Swish <alpha = 1.5>"])
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_activations(call, kind):
    text = f"g ({kind}[2,3,5] x) => ({kind}[2,3,5] y) {{ y = {call} (x) }}"
    decomposed(DecomposeActivations(), text, 24, tolerance=1e-5 if kind == "float" else 3e-3)


# RotaryEmbedding


def angles(*shape):
    values = np.random.default_rng(7).uniform(-np.pi, np.pi, shape).astype(np.float32)
    return {"c": np.cos(values), "s": np.sin(values)}


IDS = {"p": np.array([[4, 0, 6, 2, 1], [3, 3, 0, 5, 6]], np.int64)}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_rotary(interleaved, part, flat, ids):
    half = (part or 6) // 2
    shape, heads = ("2,5,18", ", num_heads = 3") if flat else ("2,3,5,6", "")
    cache = f"7,{half}" if ids else f"2,5,{half}"
    more, given = (", int64[2,5] p", ", p") if ids else ("", "")
    text = f"g (float[{shape}] x, float[{cache}] c, float[{cache}] s{more}) => (float[{shape}] y) {{ y = "
    text += f"RotaryEmbedding <interleaved = {interleaved}, rotary_embedding_dim = {part}{heads}> (x, c, s{given}) }}"
    feeds = {**angles(*map(int, cache.split(","))), **IDS}
    decomposed(DecomposeRotary(), text, feeds=feeds)


def test_rotary_with_symbolic_lengths():
    text = """g (float[b,3,n,6] x, float[7,3] c, float[7,3] s, int64[b,n] p) => (float[b,3,n,6] y) {
        y = RotaryEmbedding(x, c, s, p) }"""
    decomposed(DecomposeRotary(), text)


def test_a_table_that_is_a_weight_is_doubled_once(check_pass):
    check_pass(
        DecomposeRotary(),
        HEADER % 23
        + """g (float[b,3,n,6] x, float[b,1,n,6] z, int64[b,n] p) => (float[b,3,n,6] y, float[b,1,n,6] w)
        <float[7,3] c = random, float[7,3] s = random> {
            y = RotaryEmbedding(x, c, s, p)
            w = RotaryEmbedding(z, c, s, p)
        }""",
        matches=2,
    )


def test_declines_rotary_of_unknown_width():
    text = "g (float[2,3,5,d] x, float[7,3] c, float[7,3] s, int64[2,5] p) => (float[2,3,5,d] y) {"
    model = read_model(HEADER % 23 + text + " y = RotaryEmbedding(x, c, s, p) }")
    result = DecomposeRotary().run(model)
    assert list(result.declines) == ["the number of channels of x is unknown"]


# Attention


def attention(inputs, call, outputs="float[2,3,4,5] y"):
    return f"g ({inputs}) => ({outputs}) {{ {call} }}"


QKV = "float[2,3,4,6] q, float[2,3,7,6] k, float[2,3,7,5] v"
MASK = np.random.default_rng(3).standard_normal((2, 3, 4, 7)).astype(np.float32)
#: Row 1 of batch 1 sees nothing, row 0 of batch 0 everything.
SEEN = np.random.default_rng(5).integers(0, 2, (2, 1, 4, 7)).astype(bool)
SEEN[1, 0, 1], SEEN[0, 0, 0], SEEN[:, :, 2, 3], SEEN[:, :, 3, 0], SEEN[1, 0, 0, 2] = False, True, True, True, True


@pytest.mark.parametrize("attributes", ["", "<scale = 0.7>", "<softcap = 1.5>", "<scale = 0.3, softcap = 2.0>"])
def test_attention(attributes):
    text = attention(QKV, f"y = Attention {attributes} (q, k, v)")
    operators = decomposed(DecomposeAttention(), text)
    assert "IsNaN" not in operators


def test_attention_in_text(check_pass):
    check_pass(
        DecomposeAttention(),
        HEADER % 23
        + """g (float[b,6,n,4] q, float[b,3,n,4] k, float[b,3,n,4] v, bool[b,1,n,"n+p"] m,
               float[b,3,p,4] pk, float[b,3,p,4] pv)
           => (float[b,6,n,4] y, float[b,3,"n+p",4] nk, float[b,3,"n+p",4] nv) {
            y, nk, nv = Attention <scale = 0.25> (q, k, v, m, pk, pv)
        }""",
        matches=1,
        feeds={"m": np.tril(np.ones((2, 1, 3, 8), bool), 5)},
    )


@pytest.mark.parametrize("shape", ["4,7", "3,4,7", "1,1,4,7", "2,1,4,7", "2,3,4,7"])
def test_float_masks(shape):
    mask = MASK[tuple(slice(0, n) for n in [*([1] * (4 - shape.count(",") - 1)), *map(int, shape.split(","))])]
    text = attention(f"{QKV}, float[{shape}] m", "y = Attention (q, k, v, m)")
    decomposed(DecomposeAttention(), text, feeds={"m": mask.reshape(*map(int, shape.split(",")))})


@pytest.mark.parametrize("causal", [0, 1])
def test_bool_masks_with_a_row_that_sees_nothing(causal):
    text = attention(f"{QKV}, bool[2,1,4,7] m", f"y = Attention <is_causal = {causal}> (q, k, v, m)")
    operators = decomposed(DecomposeAttention(), text, feeds={"m": SEEN})
    assert "IsNaN" in operators


def test_infinite_float_masks():
    mask = np.where(SEEN, MASK[:, :1], -np.inf).astype(np.float32)
    text = attention(f"{QKV}, float[2,1,4,7] m", "y = Attention (q, k, v, m)")
    decomposed(DecomposeAttention(), text, feeds={"m": mask})


def test_causal_order_with_a_float_mask():
    text = attention(f"{QKV}, float[2,3,4,7] m", "y = Attention <is_causal = 1> (q, k, v, m)")
    decomposed(DecomposeAttention(), text, feeds={"m": MASK})


@pytest.mark.parametrize("heads", [(6, 3), (6, 1), (3, 3)])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [0, 3])
def test_cache_and_shared_heads(heads, causal, past):
    q, kv = heads
    total = past + 4
    text = attention(
        f"float[2,{q},4,6] q, float[2,{kv},4,6] k, float[2,{kv},4,5] v, float[4,{total}] m, "
        f"float[2,{kv},{past},6] pk, float[2,{kv},{past},5] pv",
        f"y, nk, nv = Attention <is_causal = {causal}> (q, k, v, m, pk, pv)",
        f"float[2,{q},4,5] y, float[2,{kv},{total},6] nk, float[2,{kv},{total},5] nv",
    )
    decomposed(DecomposeAttention(), text, feeds={"m": MASK[0, 0, :, :total]})


def test_cache_of_symbolic_lengths_in_causal_order():
    text = attention(
        "float[b,6,n,4] q, float[b,2,n,4] k, float[b,2,n,4] v, float[b,2,p,4] pk, float[b,2,p,4] pv",
        "y, nk, nv = Attention <is_causal = 1> (q, k, v, , pk, pv)",
        'float[b,6,n,4] y, float[b,2,"n+p",4] nk, float[b,2,"n+p",4] nv',
    )
    for lengths in ({"n": 5, "p": 3}, {"n": 1, "p": 4}, {"n": 4, "p": 0}):
        check(DecomposeAttention(), HEADER % 23 + text, matches=1, lengths=lengths)


@pytest.mark.parametrize("causal", [0, 1])
def test_three_axes_with_head_counts(causal):
    text = attention(
        "float[2,4,18] q, float[2,7,6] k, float[2,7,5] v, bool[2,1,4,7] m",
        f"y = Attention <q_num_heads = 3, kv_num_heads = 1, is_causal = {causal}> (q, k, v, m)",
        "float[2,4,15] y",
    )
    decomposed(DecomposeAttention(), text, feeds={"m": SEEN})


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_as_an_output(mode):
    call = f"y, , , s = Attention <softcap = 1.5, qk_matmul_output_mode = {mode}> (q, k, v, m)"
    text = attention(f"{QKV}, float[2,3,4,7] m", call, "float[2,3,4,5] y, float[2,3,4,7] s")
    decomposed(DecomposeAttention(), text, feeds={"m": MASK})


@pytest.mark.parametrize("precision", ["", "<softmax_precision = 1>"])
def test_half_precision(precision):
    text = attention(
        "float16[2,3,4,6] q, float16[2,3,7,6] k, float16[2,3,7,5] v, float16[4,7] m",
        f"y = Attention {precision} (q, k, v, m)",
        "float16[2,3,4,5] y",
    )
    operators = decomposed(DecomposeAttention(), text, feeds={"m": MASK[0, 0].astype(np.float16)}, tolerance=3e-3)
    assert operators.count("Cast") == (2 if precision else 0)


def test_a_mask_shorter_than_the_keys_hides_the_rest():
    """onnxruntime's kernel refuses such masks, so the numbers come from the whole mask."""
    long = attention(f"{QKV}, float[4,7] m", "y = Attention (q, k, v, m)")
    short = attention(f"{QKV}, float[4,5] m", "y = Attention (q, k, v, m)")
    model = read_model(HEADER % 23 + short)
    assert DecomposeAttention().run(model).matches == 1
    mask = MASK[0, 0].copy()
    mask[:, 5:] = -np.inf
    from passopt.targets.onnxruntime.session import Session
    from passopt.testing.checking import random_feeds

    feeds = random_feeds(model, {})
    expected = Session(read_model(HEADER % 23 + long)).run({**feeds, "m": mask})["y"]
    found = Session(model).run({**feeds, "m": mask[:, :5]})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [0, 1])
def test_keys_that_are_not_filled_yet(causal):
    text = attention(
        "float[2,3,4,6] q, float[2,3,7,6] k, float[2,3,7,5] v, int64[2] n",
        f"y = Attention <is_causal = {causal}> (q, k, v, , , , n)",
    )
    decomposed(DecomposeAttention(), text, 24, lower=False, feeds={"n": np.array([7, 5], np.int64)})


def test_windows_follow_the_reference():
    """Windows came with opset 25; the reference is onnx's own."""
    import onnx
    import onnx.reference
    import onnx_ir

    from passopt.targets.onnxruntime.session import Session
    from passopt.testing.checking import random_feeds

    for attributes in ("left_window_size = 2", "left_window_size = 1, right_window_size = 1", "right_window_size = 0"):
        text = attention(QKV, f"y = Attention <{attributes}> (q, k, v)")
        model = read_model(HEADER % 25 + text)
        feeds = random_feeds(model, {})
        (expected,) = onnx.reference.ReferenceEvaluator(onnx_ir.to_proto(model)).run(None, feeds)
        assert DecomposeAttention().run(model).matches == 1
        np.testing.assert_allclose(Session(model).run(feeds)["y"], expected, rtol=1e-5, atol=1e-6)


def test_declines_unknown_head_counts():
    text = attention("float[b,h,n,6] q, float[b,2,n,6] k", "y = Attention (q, k, k)", "float[b,h,n,6] y")
    declined(DecomposeAttention(), text, "axis 1 of q ['b', 'h', 'n', 6] has no known length")


def test_declines_a_mask_that_may_be_shorter():
    text = attention(
        "float[b,2,n,6] q, float[b,2,n,6] k, float[n,5] m", "y = Attention (q, k, k, m)", "float[b,2,n,6] y"
    )
    declined(DecomposeAttention(), text, "the mask m has 5 columns, and whether there are more keys is unknown")


def test_declines_a_negative_scale():
    declined(DecomposeAttention(), attention(QKV, "y = Attention <scale = -1.0> (q, k, v)"), "scales the scores by -1")


# ALiBi


def alibi(kind, cached=True):
    heads = "3" if kind == "float" else "6"
    inputs = f"{kind}[b,{heads},n,4] q, {kind}[b,3,n,4] k, {kind}[b,3,n,4] v"
    slopes = f"<float[{heads},1,1] a = {{{', '.join(str(0.5**head) for head in range(int(heads)))}}}>"
    rest = f'float[1,"n+p"] c, float[b,1,n,"n+p"] m, {kind}[b,3,p,4] pk, {kind}[b,3,p,4] pv'
    if not cached:
        text = f"g ({inputs}, float[1,n] c, float[b,1,n,n] m) => ({kind}[b,{heads},n,4] y) {slopes} {{"
        text += " y = passopt.AlibiAttentionNoCache <scale = 0.25> (q, k, v, a, c, m) }"
    else:
        grown = f'{kind}[b,3,"n+p",4]'
        text = f"g ({inputs}, {rest}) => ({kind}[b,{heads},n,4] y, {grown} nk, {grown} nv) {slopes} {{"
        text += " y, nk, nv = passopt.AlibiAttention <scale = 0.25> (q, k, v, a, c, m, pk, pv) }"
    model = read_model('<ir_version: 10, opset_import: ["" : 23, "passopt" : 1]>\n' + text)
    function = local_function("AlibiAttention" if cached else "AlibiAttentionNoCache", 23)
    model.functions[function.identifier()] = function
    return model


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("cached", [True, False])
def test_alibi(kind, cached):
    total = 8 if cached else 3
    mask = np.triu(np.full((3, total), -np.inf, np.float32), total - 2) * np.ones((2, 1, 1, 1), np.float32)
    mask = np.nan_to_num(mask, nan=0.0, neginf=-np.inf)
    mask[1, 0, 2] = np.finfo(np.float32).min
    model = alibi(kind, cached)
    feeds = {"m": mask, "c": np.arange(total, dtype=np.float32)[None]}
    operators = decomposed(DecomposeAttention(), model, feeds=feeds, tolerance=1e-5 if kind == "float" else 2e-3)
    assert "IsNaN" not in operators
    assert ("Cast" in operators) == (kind == "float16")


def test_functions_that_nobody_calls_any_more_go():
    model = alibi("float")
    DecomposeAttention().run(model)
    assert not model.functions
    Legalize(opset=18).run(model)


# There and back


def fused_again(item, fuse, text, **settings):
    """Decomposed and fused, a graph has its operator back, and its numbers."""
    original = read_model(HEADER % 23 + text) if isinstance(text, str) else text
    model, _ = check(item, original, matches=1, **settings)
    fused, _ = check(fuse, model, matches=1, **{**settings, "tolerance": None})
    compare_numbers(original, fused, settings.get("tolerance") or 1e-5, settings.get("feeds") or {}, {})
    wanted = next(node.op_type for node in original.graph)
    assert [node.op_type for node in fused.graph].count(wanted) == 1
    return [node.op_type for node in fused.graph]


def test_rms_norm_there_and_back():
    text = "g (float[2,3,5] x, float[5] w) => (float[2,3,5] y) { y = RMSNormalization <epsilon = 0.001> (x, w) }"
    assert fused_again(DecomposeRmsNorm(), FuseRmsNorm(), text) == ["RMSNormalization"]


def test_half_precision_rms_norm_there_and_back():
    text = "g (float16[2,3,5] x, float16[5] w) => (float16[2,3,5] y) { y = RMSNormalization <epsilon = 0.001> (x, w) }"
    assert fused_again(DecomposeRmsNorm(), FuseRmsNorm(), text, tolerance=2e-3) == ["RMSNormalization"]


@pytest.mark.parametrize("table", ["weight", "input"])
def test_rotary_there_and_back(table):
    tables = "<float[7,3] c = random, float[7,3] s = random>"
    inputs = "" if table == "weight" else ", float[7,3] c, float[7,3] s"
    text = f"g (float[b,3,n,6] x, int64[b,n] p{inputs}) => (float[b,3,n,6] y) {tables if table == 'weight' else ''}"
    operators = fused_again(DecomposeRotary(), FuseRotary(), text + " { y = RotaryEmbedding(x, c, s, p) }")
    assert operators == ["Gather", "Gather", "RotaryEmbedding"]  # of the graph alone, p may hold -1, for the last row


CACHED = "float[2,6,4,6] q, float[2,3,4,6] k, float[2,3,4,6] v, float[4,7] m, float[2,3,3,6] pk, float[2,3,3,6] pv"


@pytest.mark.parametrize(
    ("inputs", "call", "outputs"),
    [
        (f"{QKV}, float[4,7] m", "y = Attention <scale = 0.7> (q, k, v, m)", "float[2,3,4,5] y"),
        (f"{QKV}, float[4,7] m", "y = Attention <softcap = 1.5> (q, k, v, m)", "float[2,3,4,5] y"),
        (
            CACHED,
            "y, nk, nv = Attention (q, k, v, m, pk, pv)",
            "float[2,6,4,6] y, float[2,3,7,6] nk, float[2,3,7,6] nv",
        ),
    ],
)
def test_attention_there_and_back(inputs, call, outputs):
    text = attention(inputs, call, outputs)
    operators = fused_again(DecomposeAttention(), FuseAttention(), text, feeds={"m": MASK[0, 0]})
    assert not {"MatMul", "Softmax", "Expand"} & set(operators)


def test_alibi_there_and_back():
    feeds = {"c": np.arange(8, dtype=np.float32)[None]}
    operators = fused_again(DecomposeAttention(), FuseAttention(), alibi("float"), feeds=feeds)
    assert not {"MatMul", "Softmax"} & set(operators)
