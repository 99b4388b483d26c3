"""decompose-contrib against onnxruntime's attention kernels: masks of every kind, caches, packed inputs, groups."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.relative_error import operator_error
from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : %d, "com.microsoft" : 1]>\n'
RNG = np.random.default_rng(12)
#: Batch, positions of this step and of the past, heads, channels per head.
B, S, P, H, D = 2, 3, 4, 2, 6
SLOW_FALSE = pytest.param(False, marks=pytest.mark.slow)
T = S + P


def decomposed(text, opset=18, tolerance=1e-5, **settings):
    model, _ = check(DecomposeContrib(), HEADER % opset + text, matches=1, tolerance=tolerance, **settings)
    assert {node.domain for node in model.graph} == {""}
    return model


def declined(text, reason):
    result = DecomposeContrib().run(read_model(HEADER % 18 + text))
    assert not result.matches
    assert [key for key in result.declines if reason in key], result.declines


def mask(*shape):
    found = RNG.integers(0, 2, shape).astype(np.int32)
    found[..., 0] = 1
    return found


# Attention: one packed projection

#: By the kind of the mask: its type, and its numbers for `columns` columns.
MASKS = {
    "none": ("", lambda columns: None),
    "columns": ("int32[2,{t}] m", lambda columns: mask(B, columns)),
    "hidden rows": ("int32[2,{t}] m", lambda columns: mask(B, columns) * np.array([[1], [0]], np.int32)),
    "scores": ("int32[2,3,{t}] m", lambda columns: mask(B, S, columns)),
    "ends": ("int32[2] m", lambda columns: np.array([columns - 1, 2], np.int32)),
    "ends and starts": ("int32[4] m", lambda columns: np.array([columns, columns - 1, 1, 0], np.int32)),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [False, True])
def test_attention(kind, causal, past):
    """A row that sees nothing has scores near -10000, where fp32 knows steps of 0.001: these limit what is equal."""
    columns = T if past else S
    declared, numbers = MASKS[kind]
    inputs = f"float[2,3,7] x, float[2,2,2,{P},6] past, float[2,2,3,{S}] extra"
    inputs += ", " + declared.format(t=columns) if declared else ""
    text = f"""g ({inputs}) => (float[2,3,12] y, float[2,2,2,{columns},6] present)
        <float[7,36] w = random, float[36] b = random> {{
        y, present = com.microsoft.Attention <num_heads = 2, unidirectional = {causal}>
            (x, w, b, {"m" if declared else '""'}, {"past" if past else '"", extra'}) }}"""
    feeds = {"m": numbers(columns)} if declared else {}
    decomposed(text, feeds=feeds, tolerance=1e-3 if kind == "hidden rows" else 1e-5)


@pytest.mark.parametrize("call", ["scale = 0.7", "qkv_hidden_sizes = [12, 12, 8]", "mask_filter_value = -3.0"])
def test_attention_with_other_sizes(call):
    widths = (32, 8) if "sizes" in call else (36, 12)
    text = f"""g (float[2,3,7] x, int32[2,3] m) => (float[2,3,{widths[1]}] y)
        <float[7,{widths[0]}] w = random, float[{widths[0]}] b = random> {{
        y = com.microsoft.Attention <num_heads = 2, {call}> (x, w, b, m) }}"""
    decomposed(text, feeds={"m": mask(2, 3)})


def test_attention_over_symbolic_lengths():
    text = """g (float[b,s,7] x, int32[b,s] m) => (float[b,s,12] y) <float[7,36] w = random, float[36] c = random> {
        y = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, c, m) }"""
    for batch, steps in ((2, 5), (1, 1), (3, 2)):
        decomposed(text, lengths={"b": batch, "s": steps}, feeds={"m": mask(batch, steps)})


def test_declines_a_mask_whose_meaning_depends_on_the_batch():
    text = """g (float[b,s,7] x, int32[n] m) => (float[b,s,12] y) <float[7,36] w = random, float[36] c = random> {
        y = com.microsoft.Attention <num_heads = 2> (x, w, c, m) }"""
    declined(text, "has the mask m of shape ['n'], whose meaning is not known for sure")


@pytest.mark.parametrize("call", ["do_rotary = 1", "past_present_share_buffer = 1", "rotary_embedding_dim = 32"])
def test_declines_attention_that_does_more(call):
    text = f"""g (float[b,s,7] x) => (float[b,s,12] y) <float[7,36] w = random, float[36] c = random> {{
        y = com.microsoft.Attention <num_heads = 2, {call}> (x, w, c) }}"""
    declined(text, call.split()[0])


# MultiHeadAttention


@pytest.mark.parametrize("kind", ["none", "columns", "scores"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("bias", [True, SLOW_FALSE])
def test_multi_head_attention(kind, causal, past, bias):
    columns = T if past else S
    declared, numbers = MASKS[kind]
    inputs = "float[2,3,12] q, float[2,3,12] k, float[2,3,12] v, float[36] b, "
    inputs += f"float[2,2,{P},6] pk, float[2,2,{P},6] pv, float[1,2,3,{columns}] extra"
    inputs += ", " + declared.format(t=columns) if declared else ""
    given = ["q", "k", "v", "b" if bias else '""', "m" if declared else '""', "extra", *(["pk", "pv"] if past else [])]
    text = f"""g ({inputs}) => (float[2,3,12] y, float[2,2,{columns},6] nk, float[2,2,{columns},6] nv) {{
        y, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = {causal}>
            ({", ".join(given)}) }}"""
    decomposed(text, feeds={"m": numbers(columns)} if declared else {})


@pytest.mark.parametrize(
    ("inputs", "call"),
    [
        ("float[2,3,12] q, float[2,5,12] k, float[2,5,12] v", "(q, k, v)"),
        ("float[2,3,12] q, float[2,2,5,6] k, float[2,2,5,6] v", "(q, k, v)"),
    ],
)
def test_multi_head_attention_of_other_inputs(inputs, call):
    text = f"""g ({inputs}) => (float[2,3,12] y) {{
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.3> {call} }}"""
    decomposed(text)


@pytest.mark.parametrize("inputs", ["{0},12] k, float[{0},12", "2,2,5,6] k, float[2,2,5,6"])
@pytest.mark.parametrize("keys", ["2,5", "2,t", "2,?"])
def test_declines_causal_order_between_unequal_lengths(inputs, keys):
    """The kernel lets the last query see all keys then, and the others only those up to their own place."""
    text = f"""g (float[2,3,12] q, float[{inputs.format(keys)}] v) => (float[2,3,12] y) {{
        y = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1> (q, k, v) }}"""
    declined(text, "keys of this step, which may be others")


def test_causal_order_over_symbolic_lengths():
    text = """g (float[b,s,12] q, float[b,s,12] k, float[b,s,12] v, float[b,2,p,6] pk, float[b,2,p,6] pv)
        => (float[b,s,12] y, float[b,2,n,6] nk, float[b,2,n,6] nv) {
        y, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 2, unidirectional = 1>
            (q, k, v, "", "", "", pk, pv) }"""
    for batch, steps, past in ((2, 3, 4), (1, 1, 5), (3, 2, 1)):
        decomposed(text, lengths={"b": batch, "s": steps, "p": past, "n": steps + past})


@pytest.mark.parametrize(("packed", "columns"), [("qkv", 3), ("kv", 5)])
def test_multi_head_attention_of_packed_inputs(packed, columns):
    """The CPU kernel does not take packed inputs, so its result for the same numbers apart is compared."""
    count = len(packed)
    name = packed[0]
    inputs = f"float[2,{columns},2,{count},6] {name}"
    inputs = inputs if count == 3 else f"float[2,3,12] q, {inputs}"
    call = "y = com.microsoft.MultiHeadAttention <num_heads = 2> "
    changed = read_model(
        HEADER % 18 + f"g ({inputs}) => (float[2,3,12] y) {{ {call} ({'q' if count == 3 else 'q, k'}) }}"
    )
    result = DecomposeContrib().run(changed)
    assert result.matches == 1
    apart = "float[2,3,12] q, float[2,C,12] k, float[2,C,12] v".replace("C", str(columns))
    original = read_model(HEADER % 18 + f"g ({apart}) => (float[2,3,12] y) {{ {call} (q, k, v) }}")
    values = {part: RNG.standard_normal((2, columns, 2, 6)).astype(np.float32) for part in packed}
    feeds = {name: np.stack(list(values.values()), axis=3)}
    if count == 2:
        feeds["q"] = RNG.standard_normal((2, 3, 12)).astype(np.float32)
    flat = {part: value.reshape(2, columns, 12) for part, value in values.items()}
    expected = Session(original).run({**feeds, **flat} if count == 2 else flat)["y"]
    assert operator_error(expected, Session(changed).run(feeds)["y"]) < 1e-6


def test_multi_head_attention_over_symbolic_lengths():
    text = """g (float[b,s,12] q, float[b,t,12] k, float[b,t,12] v, int32[b,t] m) => (float[b,s,12] y) {
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, "", m) }"""
    for lengths in ({"b": 2, "s": 3, "t": 5}, {"b": 1, "s": 1, "t": 4}):
        decomposed(text, lengths=lengths, feeds={"m": mask(lengths["b"], lengths["t"])})


# GroupQueryAttention

QKV = "float[{b},{s},64] q, float[{b},{s},32] k, float[{b},{s},32] v"


def grouped(call="", *, batch=1, steps=3, past=4, filled=None, packed=False, bias=False, rotary=False, opset=18):
    """4 heads in 2 groups of 16 channels; `filled` are the columns of each row after the step."""
    filled = filled or [steps + past] * batch
    total = max(filled)
    inputs = "float[{b},{s},128] q" if packed else QKV
    inputs = inputs.format(b=batch, s=steps)
    inputs += f", int32[{batch}] n, int32 total, float[1,4,{steps},{total}] extra, float[16,8] c, float[16,8] s"
    present = max(past, total)
    if past:
        inputs += f", float[{batch},2,{past},16] pk, float[{batch},2,{past},16] pv"
    given = ["q", *(['""'] * 2 if packed else ["k", "v"]), *(["pk", "pv"] if past else ['""'] * 2), "n", "total"]
    given += ["c", "s"] if rotary else ['""', '""'] if bias else []
    given += ['""', "extra"] if bias else []
    angles = RNG.uniform(-np.pi, np.pi, (16, 8)).astype(np.float32)
    feeds = {
        "n": np.array(filled, np.int32) - 1,
        "total": np.array(total, np.int32),
        "c": np.cos(angles),
        "s": np.sin(angles),
    }
    text = f"""g ({inputs}) => (float[{batch},{steps},64] y, float[{batch},2,{present},16] nk,
        float[{batch},2,{present},16] nv) {{
        y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2{call}> ({", ".join(given)}) }}"""
    return decomposed(text, opset, feeds=feeds)


@pytest.mark.parametrize("packed", [True, SLOW_FALSE])
@pytest.mark.parametrize("bias", [True, SLOW_FALSE])
@pytest.mark.parametrize("rotary", ["", ", do_rotary = 1", ", do_rotary = 1, rotary_interleaved = 1"])
@pytest.mark.parametrize(("steps", "past"), [(3, 0), (1, 4), (3, 4)])
def test_group_query_attention(packed, bias, rotary, steps, past):
    grouped(rotary, steps=steps, past=past, packed=packed, bias=bias, rotary=bool(rotary))


@pytest.mark.parametrize("call", [", scale = 0.3", ", softcap = 2.0", ", local_window_size = 2"])
@pytest.mark.parametrize(("steps", "past"), [(3, 0), (1, 4)])
def test_group_query_attention_with_other_scores(call, steps, past):
    grouped(call, steps=steps, past=past)


@pytest.mark.parametrize("window", ["", ", local_window_size = 2"])
@pytest.mark.parametrize("rotary", [True, SLOW_FALSE])
@pytest.mark.parametrize(
    ("steps", "past", "filled"),
    [(1, 4, [5, 3]), (1, 9, [5, 3]), (1, 9, [9, 1]), (3, 0, [3, 2]), (5, 0, [2, 5])],
)
def test_group_query_attention_of_rows_that_are_filled_to_different_ends(steps, past, filled, rotary, window):
    call = ", do_rotary = 1" if rotary else ""
    grouped(call + window, batch=2, steps=steps, past=past, filled=filled, rotary=rotary)


@pytest.mark.parametrize(
    "call", ["smooth_softmax = 1", "causal = 0", 'k_quant_type = "PER_TENSOR"', "qk_output = 1", "unheard_of = 1"]
)
def test_declines_grouped_attention_that_does_more(call):
    text = f"""g (float[1,3,24] q, float[1,3,12] k, float[1,3,12] v, int32[1] n, int32 t) => (float[1,3,24] y) {{
        y = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, {call}> (q, k, v, "", "", n, t) }}"""
    declined(text, call.split()[0])


def test_declines_grouped_attention_with_a_sink():
    text = """g (float[1,3,24] q, float[1,3,12] k, float[1,3,12] v, int32[1] n, int32 t, float[4] sink)
        => (float[1,3,24] y) { y = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
        (q, k, v, "", "", n, t, "", "", "", "", sink) }"""
    declined(text, "reads sink, for which there is no standard form")
