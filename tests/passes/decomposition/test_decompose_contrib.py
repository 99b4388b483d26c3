"""decompose-contrib against onnxruntime's own kernels, at opsets with and without the fused standard operators."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : %d, "com.microsoft" : 1]>\n'
RNG = np.random.default_rng(11)
OPSETS = [13, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (17, 21)), 23]


def decomposed(text, opset=21, matches=1, tolerance=1e-5, **settings):
    """The operators of the result, which holds standard ones only."""
    model, _ = check(DecomposeContrib(), HEADER % opset + text, matches=matches, tolerance=tolerance, **settings)
    assert {node.domain for node in model.graph} == {""}
    assert "com.microsoft" not in model.graph.opset_imports
    return [node.op_type for node in model.graph]


def declined(text, reason, opset=21, **settings):
    _, result = check(DecomposeContrib(), HEADER % opset + text, matches=0, **settings)
    assert [key for key in result.declines if reason in key], result.declines


def ids(*shape, most=7, dtype=np.int32):
    return RNG.integers(0, most, shape).astype(dtype)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# Activations


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("call", ["Gelu(x)", "FastGelu(x)", "FastGelu(x, b)", "BiasGelu(x, b)", "QuickGelu(x)"])
def test_activations(call, opset):
    decomposed(f"g (float[n,3,5] x, float[5] b) => (float[n,3,5] y) {{ y = com.microsoft.{call} }}", opset)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_quick_gelu_with_another_factor(alpha):
    text = f"g (float[n,3] x) => (float[n,3] y) {{ y = com.microsoft.QuickGelu <alpha = {alpha}> (x) }}"
    assert decomposed(text).count("Mul") == (1 if alpha == 1 else 2)


def test_a_chain_of_contrib_operators_is_typed_as_it_goes():
    """What stands between has no type until the operator in front of it is decomposed."""
    text = """g (float[n,3,8] x, float[n,3,8] k, float[8] w) => (float[n,3,8] y) <float[8] b = {1,2,3,4,5,6,7,8}> {
        a = com.microsoft.SkipSimplifiedLayerNormalization(x, k, w)
        c = com.microsoft.BiasGelu(a, b)
        d = Add(c, x)
        e = com.microsoft.QuickGelu(d)
        y = Sqrt(e)
    }"""
    decomposed(text, 18, matches=3, feeds={"w": floats(8)})


# Norms


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("parts", ["", ", b", ", b, c", ", , c"])
@pytest.mark.parametrize("skip", ["n,3,8", pytest.param("1,3,8", marks=pytest.mark.slow), "3,8"])
def test_skip_layer_normalization(opset, parts, skip):
    more = parts.replace(", ,", ', "",')
    text = f"""g (float[n,3,8] x, float[{skip}] k, float[8] w, float[8] b, float[8] c)
        => (float[n,3,8] y, float[n,3,8] s) {{
        y, "", "", s = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, k, w{more}) }}"""
    decomposed(text, opset)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", ["", ", c"])
def test_skip_simplified_layer_normalization(opset, bias):
    text = f"""g (float[n,3,8] x, float[n,3,8] k, float[8] w, float[8] c) => (float[n,3,8] y, float[n,3,8] s) {{
        y, "", "", s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.01> (x, k, w{bias}) }}"""
    decomposed(text, opset)


def test_a_norm_whose_sum_nobody_reads():
    text = """g (float[n,3,8] x, float[n,3,8] k, float[8] w) => (float[n,3,8] y) {
        y = com.microsoft.SkipLayerNormalization(x, k, w) }"""
    assert decomposed(text) == ["Add", "LayerNormalization"]


def test_declines_statistics_that_have_no_standard_form():
    text = """g (float[n,3,8] x, float[n,3,8] k, float[8] w) => (float[n,3,8] y, float[n,3,1] i) {
        y, "", i = com.microsoft.SkipSimplifiedLayerNormalization(x, k, w) }"""
    declined(text, "its output 2 has no standard form")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("axis", ["", "<axis = 1>", "<axis = -2, epsilon = 0.1>"])
def test_simplified_layer_normalization_of_the_default_domain(opset, axis):
    shape = "8" if not axis else "3,8"
    text = f"""g (float[n,3,8] x, float[{shape}] w) => (float[n,3,8] y) {{
        y = SimplifiedLayerNormalization {axis} (x, w) }}"""
    decomposed(text, opset)


@pytest.mark.parametrize("opset", [13, 16])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_layer_normalization_before_it_was_standard(opset, bias):
    text = f"""g (float[n,3,8] x, float[8] w, float[8] b) => (float[n,3,8] y) {{
        y = LayerNormalization <epsilon = 0.01> (x, w{bias}) }}"""
    assert "LayerNormalization" not in decomposed(text, opset)


EMBED = "float[7,8] words, float[6,8] places, float[2,8] kinds, float[8] w, float[8] b"


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    ("call", "outputs"),
    [
        ("(ids, segments, words, places, kinds, w, b, mask)", "y, m"),
        ("(ids, segments, words, places, kinds, w, b)", "y, m"),
        ("(ids, segments, words, places, kinds, w, b, mask, positions)", "y, m, s"),
        ('(ids, "", words, places, "", w, b)', "y, m"),
    ],
)
def test_embed_layer_normalization(opset, call, outputs):
    types = {"y": "float[2,5,8] y", "m": "int32[2] m", "s": "float[2,5,8] s"}
    declared = ", ".join(types[name] for name in outputs.split(", "))
    text = f"""g (int32[2,5] ids, int32[2,5] segments, int32[2,5] mask, int32[2,5] positions, {EMBED}) => ({declared})
        {{ {outputs} = com.microsoft.EmbedLayerNormalization <epsilon = 0.01> {call} }}"""
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    feeds = {"ids": ids(2, 5), "segments": ids(2, 5, most=2), "mask": mask, "positions": ids(2, 5, most=6)}
    decomposed(text, opset, feeds=feeds)


def test_embed_layer_normalization_of_no_positions():
    """Without a mask, each row of the mask index is 0, also where there is no column to count."""
    text = f"""g (int32[b,s] ids, {EMBED}) => (float[b,s,8] y, int32[b] m) {{
        y, m = com.microsoft.EmbedLayerNormalization <epsilon = 0.01> (ids, "", words, places, "", w, b) }}"""
    for batch, steps in ((2, 0), (0, 3), (1, 1), (3, 4)):
        decomposed(text, feeds={"ids": ids(batch, steps)}, lengths={"b": batch, "s": steps})


# Products


TURNS = [
    ("", (2, 3, 4, 5), (2, 3, 5, 6)),
    ("<alpha = 0.5>", (4, 5), (5, 6)),
    ("<transA = 1>", (2, 5, 4), (2, 5, 6)),
    ("<transB = 1, alpha = 2.0>", (2, 4, 5), (6, 5)),
    ("<transA = 1, transB = 1>", (5, 4), (6, 5)),
    ("<transBatchA = 1>", (4, 2, 5), (2, 5, 6)),
    ("<transBatchA = 1, transA = 1>", (5, 2, 4), (2, 5, 6)),
    ("<transBatchA = 1, transBatchB = 1>", (4, 2, 3, 5), (5, 2, 3, 6)),
    ("<transBatchB = 1, transB = 1>", (2, 4, 5), (6, 2, 5)),
    ("<transA = 1>", (5,), (5, 6)),
]


@pytest.mark.parametrize(("call", "left", "right"), TURNS)
@pytest.mark.parametrize("name", ["FusedMatMul", pytest.param("TransposeMatMul", marks=pytest.mark.slow)])
def test_fused_matmul(call, left, right, name):
    if name == "TransposeMatMul" and "Batch" in call:
        pytest.skip("the older operator has no such attribute")
    sides = [",".join(map(str, shape)) for shape in (left, right)]
    result = "float[4,6] y" if len(left) == 2 else f"float[{','.join('pqr'[: max(1, len(left) - 1)])},6] y"
    result = {1: "float[6] y", 2: "float[4,6] y", 3: "float[2,4,6] y", 4: "float[2,3,4,6] y"}[len(left)]
    text = f"g (float[{sides[0]}] a, float[{sides[1]}] b) => ({result}) {{ y = com.microsoft.{name} {call} (a, b) }}"
    decomposed(text)


@pytest.mark.parametrize("bias", ["", ", c"])
@pytest.mark.parametrize(
    "call",
    [
        'activation = "Relu"',
        'activation = "Tanh", transB = 1, alpha = 0.5, beta = 0.25',
        'activation = "LeakyRelu", activation_alpha = 0.3',
        'activation = "Elu", activation_alpha = 0.5',
        'activation = "HardSigmoid", activation_alpha = 0.3, activation_beta = 0.4',
        'activation = "Sigmoid"',
    ],
)
def test_fused_gemm(bias, call):
    weight = "6,5" if "transB" in call else "5,6"
    text = f"""g (float[n,5] a, float[{weight}] b, float[6] c) => (float[n,6] y) {{
        y = com.microsoft.FusedGemm <{call}> (a, b{bias}) }}"""
    decomposed(text)


@pytest.mark.parametrize(
    "call",
    [
        'activation = "Relu"',
        'activation = "LeakyRelu", activation_params = [0.2]',
        'activation = "Clip", activation_params = [-0.5, 0.5]',
        'activation = "HardSigmoid", activation_params = [0.3, 0.6], pads = [1,0,1,0]',
        "strides = [2,1], kernel_shape = [3,2]",
    ],
)
@pytest.mark.parametrize("more", ["", ", b", ", b, z"])
def test_fused_conv(call, more):
    shape = "2,4,6,4" if "pads" in call else "2,4,2,4" if "strides" in call else "2,4,4,4"
    text = f"""g (float[2,3,6,5] x, float[4,3,3,2] w, float[4] b, float[{shape}] z) => (float[{shape}] y) {{
        y = com.microsoft.FusedConv <{call}> (x, w{more}) }}"""
    decomposed(text)


def test_declines_an_activation_without_a_standard_form():
    text = """g (float[n,5] a, float[5,6] b) => (float[n,6] y) {
        y = com.microsoft.FusedGemm <activation = "Swoosh"> (a, b) }"""
    model = read_model(HEADER % 21 + text)
    result = DecomposeContrib().run(model)
    assert list(result.declines) == ["the activation Swoosh with parameters [] has no standard form"]


CODES = {"b": RNG.integers(-100, 100, (5, 6)).astype(np.int8), "z": RNG.integers(-5, 5, 6).astype(np.int8)}


@pytest.mark.parametrize("more", ["", ", z", ', "", c', ", z, c"])
def test_dynamic_quantize_matmul(more):
    text = f"""g (float[n,5] a, int8[5,6] b, float[6] s, int8[6] z, float[6] c) => (float[n,6] y) {{
        y = com.microsoft.DynamicQuantizeMatMul(a, b, s{more}) }}"""
    decomposed(text, feeds=CODES)


@pytest.mark.parametrize("more", ["", ", p", ", p, z", ', "", "", c'])
def test_matmul_integer_to_float(more):
    text = f"""g (int8[n,5] a, int8[5,6] b, float r, float[6] s, int8 p, int8[6] z, float[6] c) => (float[n,6] y) {{
        y = com.microsoft.MatMulIntegerToFloat(a, b, r, s{more}) }}"""
    decomposed(text, feeds=CODES)


def test_smaller_operators():
    text = """g (float[4,5] x, int64 k) => (float[4,1,5] y, float[4,5] u, float[4] r)
        <int32 axis = {1}, float a = {0}, float b = {4}, float c = {1}> {
        y = com.microsoft.ExpandDims(x, axis)
        u = com.microsoft.Trilu <upper = 0> (x, k)
        r = com.microsoft.Range(a, b, c)
    }"""
    decomposed(text, matches=3)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pad_and_gather_nd(mode):
    text = f"""g (float[4,5] x, float v) => (float[7,6] y, float[2,5] z)
        <int64[1,4] p = {{1, 0, 2, 1}}, int32[2,1] i = {{3, 0}}> {{
        y = com.microsoft.Pad <mode = "{mode}"> (x, p{", v" if mode == "constant" else ""})
        z = com.microsoft.GatherND(x, i)
    }}"""
    decomposed(text, matches=2)


def test_a_standard_layer_normalization_is_not_even_tried():
    _, result = check(
        DecomposeContrib(),
        HEADER % 17 + "g (float[n,3] x, float[3] w) => (float[n,3] y) { y = LayerNormalization(x, w) }",
    )
    assert (result.tries, dict(result.declines)) == (0, {})


# Rotary embedding


def angles(rows, half):
    values = RNG.uniform(-np.pi, np.pi, (rows, half)).astype(np.float32)
    return {"c": np.cos(values), "s": np.sin(values)}


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_rotary(interleaved, flat, offset):
    shape = "2,5,24" if flat else "2,3,5,8"
    positions = "1" if offset else "2,5"
    text = f"""g (float[{shape}] x, int64[{positions}] p, float[9,4] c, float[9,4] s) => (float[{shape}] y) {{
        y = com.microsoft.RotaryEmbedding <interleaved = {interleaved}> (x, p, c, s) }}"""
    given = np.array([3]) if offset else ids(2, 5, most=9, dtype=np.int64)
    decomposed(text, feeds={**angles(9, 4), "p": given})


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_of_a_part_of_each_head(interleaved):
    text = f"""g (float[2,5,24] x, int64[2,5] p, float[9,2] c, float[9,2] s) => (float[2,5,24] y) {{
        y = com.microsoft.RotaryEmbedding <num_heads = 3, rotary_embedding_dim = 4, interleaved = {interleaved}>
            (x, p, c, s) }}"""
    decomposed(text, feeds={**angles(9, 2), "p": ids(2, 5, most=9, dtype=np.int64)})


def test_rotary_with_symbolic_lengths():
    text = """g (float[b,n,24] x, int64[b,n] p, float[9,4] c, float[9,4] s) => (float[b,n,24] y) {
        y = com.microsoft.RotaryEmbedding(x, p, c, s) }"""
    for lengths in ({"b": 2, "n": 5}, {"b": 1, "n": 1}):
        decomposed(text, feeds={**angles(9, 4), "p": ids(*lengths.values(), dtype=np.int64)}, lengths=lengths)
