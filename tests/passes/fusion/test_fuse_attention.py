"""fuse-attention: every spelling of attention with and without a cache, all rows compared; what is none stays."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.provenance import MADE_BY
from passopt.passes.fusion.fuse_attention import FuseAttention
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
CONSTANTS = (
    "<float scale = {0.35}, float root = {0.6}, float[1] divisor = {2.9}, float minus = {-0.35}, float zero = {0},"
    "float cap = {1.5}, float over_cap = {0.6666667}, float other_cap = {2.5}, float[6] many = {1, 2, 3, 4, 5, 6},"
    "float low = {-3.4028235e38}, float inf = {-inf}, float billion = {-1e9}, float small = {-50},"
    "int64[1] front = {0}, int64[1] two = {2}, int64[5] threes = {1, 1, 2, 1, 1}, int64[4] wide = {0, 6, -1, 4},"
    "int64[4] deep = {0, 6, -1, 7}>"
)
#: Queries of 3 and of 6 heads; keys and values of different widths; `t` columns.
HEAD = "g (float[b,3,q,4] query, float[b,3,t,4] k, float[b,3,t,7] v, float[b,1,q,t] mask) => (float[] y)"
CACHED = (
    "g (float[b,3,q,4] query, float[b,3,p,4] past_k, float[b,3,q,4] new_k, float[b,3,p,7] past_v,"
    "float[b,3,q,7] new_v, float[b,1,q,t] mask) => (float[] y, float[b,3,t,4] k, float[b,3,t,7] v)"
)
JOIN = "k = Concat <axis = -2> (past_k, new_k) v = Concat <axis = -2> (past_v, new_v)"
TURN = " kt = Transpose <perm = [0, 1, 3, 2]> (k)"
SCORES = TURN + " raw = MatMul(query, kt) scaled = Mul(raw, scale)"
MASKED = SCORES + " masked = Add(scaled, mask)"
END = " shares = Softmax <axis = -1> (masked) y = MatMul(shares, v)"
LOW = np.finfo(np.float32).min


def text(body, head=HEAD, opset=23):
    return f"{HEADER % opset}{head}{CONSTANTS} {{ {body} }}"


def hidden(rows=True, low=LOW, lengths=(2, 4, 9), dtype=np.float32):
    """A causal mask whose first batch hides three columns, and with `rows` whole rows."""
    b, q, t = lengths
    mask = np.where(np.arange(t) > np.arange(q)[:, None] + t - q, low, 0) * np.ones((b, 1, 1, 1))
    mask[0, :, :, :3] = low
    if rows:
        mask[0, :, 1] = low
        mask[1, :, 3] = low
    return mask.astype(dtype)


SIZES = {"b": 2, "q": 4, "p": 5, "t": 9}


def fused(body, head=HEAD, opset=23, matches=1, **settings):
    """(operators, model): numbers agree on all rows, of which some see nothing."""
    settings.setdefault("feeds", {"mask": hidden()} if "1,q,t] mask" in head else {})
    settings.setdefault("lengths", SIZES)
    model, _ = check(FuseAttention(), text(body, head, opset), matches=matches, **settings)
    return [node.op_type for node in model.graph], model


def declined(reason, body, head=HEAD, opset=23):
    """For graphs that may not even run: nothing changes, and the reason is given."""
    result = FuseAttention().run(read_model(text(body, head, opset)))
    assert not result.modified
    assert any(reason in key for key in result.declines), result.declines


def test_attention(check_pass):
    check_pass(FuseAttention(), text(MASKED + END), matches=1, feeds={"mask": hidden()}, lengths=SIZES)


@pytest.mark.parametrize("past", [0, 5])
def test_with_cache(past):
    lengths = {**SIZES, "p": past, "t": 4 + past}
    feeds = {"mask": hidden(lengths=(2, 4, 4 + past))}
    operators, model = fused(JOIN + MASKED + END, CACHED, feeds=feeds, lengths=lengths)
    assert "Concat" not in operators
    assert [value.name for value in model.graph.outputs] == ["y", "k", "v"]
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in attention.inputs[4:]] == ["past_k", "past_v"]


@pytest.mark.parametrize(
    "scores",
    [
        "raw = MatMul(query, kt) scaled = Mul(scale, raw)",
        "raw = MatMul(query, kt) scaled = Div(raw, divisor)",
        "scaled = MatMul(query, kt)",
        "qs = Mul(query, root) ks = Mul(kt, root) scaled = MatMul(qs, ks)",
        "qs = Mul(query, scale) scaled = MatMul(qs, kt)",
        "qs = Mul(query, minus) ks = Mul(minus, kt) scaled = MatMul(qs, ks)",
    ],
)
def test_scales(scores):
    body = f"{TURN} {scores} masked = Add(mask, scaled)"
    operators, model = fused(body + END)
    assert {"Softmax", "MatMul"}.isdisjoint(operators)
    assert model.graph[-1].attributes["scale"].as_float() > 0


@pytest.mark.parametrize("capped", ["x = Div(scaled, cap)", "x = Mul(scaled, over_cap)"])
def test_soft_cap(capped):
    body = f"{SCORES} {capped} h = Tanh(x) c = Mul(cap, h) masked = Add(c, mask)"
    _, model = fused(body + END)
    assert model.graph[-1].attributes["softcap"].as_float() == pytest.approx(1.5)


@pytest.mark.parametrize("low", [LOW, -np.inf, -1e9])
def test_a_floor_under_the_scores(low):
    body = MASKED + " floored = Max(masked, low)" + END.replace("(masked)", "(floored)")
    fused(body, feeds={"mask": hidden(low=low)})


@pytest.mark.parametrize("choice", ["Where(seen, scaled, low)", "Where(unseen, low, scaled)"])
@pytest.mark.parametrize("low", ["low", "billion", "inf"])
def test_a_choice_between_scores_and_a_low_number(choice, low):
    name = "unseen" if "unseen" in choice else "seen"
    head = HEAD.replace("float[b,1,q,t] mask", f"bool[b,1,q,t] {name}")
    given = hidden(rows=low != "inf") == 0  # softmax makes a row of nothing but -inf NaN
    feeds = {name: given if name == "seen" else ~given}
    body = f"{SCORES} masked = {choice.replace('low', low)}"
    fused(body + END, head, feeds=feeds)


def test_a_row_of_nan_becomes_zero():
    body = MASKED + " raw_shares = Softmax(masked) bad = IsNaN(raw_shares) shares = Where(bad, zero, raw_shares)"
    operators, _ = fused(body + " y = MatMul(shares, v)", feeds={"mask": hidden(low=-np.inf)})
    assert operators[-1] == "Attention"


def test_masks_whose_sum_overflows():
    """Twice the lowest number is -inf; a row that hides some columns once, all others twice, sees those hidden once."""
    head = HEAD.replace("mask)", "mask, float[b,1,1,t] padding)")
    padding = np.zeros((2, 1, 1, 9), np.float32)
    padding[0, ..., :3] = LOW
    mask = hidden(rows=False)
    mask[0, 0, 2, 3:] = LOW
    body = f"{SCORES} biased = Add(scaled, padding) masked = Add(biased, mask)"
    fused(body + END, head, feeds={"mask": mask, "padding": padding})


def test_a_mask_of_one_row():
    head = HEAD.replace("b,1,q,t] mask", "b,1,1,t] mask")
    operators, _ = fused(MASKED + END, head, feeds={"mask": hidden(lengths=(2, 1, 9), rows=False)})
    assert "Expand" in operators


@pytest.mark.parametrize("dims", ["q,t", "1,q,t", "3,q,t", "1,3,q,t", "1,1,q,t"])
def test_masks_of_fewer_axes(dims):
    head = HEAD.replace("b,1,q,t] mask", f"{dims}] mask")
    fused(MASKED + END, head, feeds={})


def test_no_mask():
    operators, _ = fused(SCORES.replace("scaled =", "masked =") + END, feeds={})
    assert operators == ["Attention"]


def test_keys_as_they_come_from_a_projection():
    head = HEAD.replace("float[b,3,t,4] k", "float[b,t,3,4] k")
    body = MASKED.replace("perm = [0, 1, 3, 2]", "perm = [0, 2, 3, 1]")
    fused(body + END, head)


SPREAD = """
    ku = Unsqueeze(k, two) kw = Expand(ku, threes) kr = Reshape(kw, wide) kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    vu = Unsqueeze(v, two) vw = Expand(vu, threes) vr = Reshape(vw, deep)"""
SIX = CACHED.replace("b,3,q,4] query", "b,6,q,4] query")


def grouped(body):
    return SPREAD + body.replace(TURN, "").replace("MatMul(shares, v)", "MatMul(shares, vr)")


def test_heads_that_share_keys():
    operators, model = fused(JOIN + grouped(MASKED + END), SIX)
    assert not {"Expand", "Unsqueeze"} & set(operators)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in attention.inputs[1:3]] == ["new_k", "new_v"]
    head = HEAD.replace("b,3,q,4] query", "b,6,q,4] query")
    operators, _ = fused(grouped(MASKED + END), head)
    assert operators[-1] == "Attention"


def test_declines_shared_heads_of_values_of_another_batch():
    body = "ku = Unsqueeze(k, two) kw = Expand(ku, threes) kr = Reshape(kw, wide)"
    body += " vu = Unsqueeze(v, two) vw = Expand(vu, threes) vr = Reshape(vw, deep)"
    body += TURN.replace("(k)", "(kr)") + MASKED.replace(TURN, "") + END.replace(", v)", ", vr)")
    head = HEAD.replace("b,3,q,4] query", "b,6,q,4] query").replace("b,3,t,7] v", "c,3,t,7] v")
    declined("are not known to be of one batch", body, head)
    fused(body, head, matches=0, lengths=SIZES | {"c": 1})


def test_one_key_head_for_all():
    fused(MASKED + END, HEAD.replace("3,t", "1,t"))


@pytest.mark.parametrize("cached", [True, False])
def test_an_exported_attention_takes_in_cache_and_heads(cached):
    spread = SPREAD.replace("kt = Transpose <perm = [0, 1, 3, 2]> (kr)", "")
    call = " y = Attention <scale = 0.35> (query, kr, vr, mask)"
    head = SIX if cached else HEAD.replace("b,3,q,4] query", "b,6,q,4] query")
    operators, model = fused((JOIN if cached else "") + spread + call, head)
    assert operators == ["Attention"]
    assert len(model.graph[-1].outputs) == (3 if cached else 1)


HALF = HEAD.replace("float[", "float16[")


@pytest.mark.parametrize("where", ["before the mask", "before the softmax"])
def test_half_precision_with_its_softmax_in_fp32(where):
    wide = " w = Cast <to = 1> (scaled) masked = Add(w, mask)"
    head = HALF.replace("float16[b,1,q,t]", "float[b,1,q,t]")
    if where == "before the softmax":
        wide, head = " m = Add(scaled, mask) masked = Cast <to = 1> (m)", HALF
    body = SCORES.replace("(raw, scale)", "(raw, half)") + wide
    body += " s = Softmax(masked) shares = Cast <to = 10> (s) y = MatMul(shares, v)"
    source = text(body, head).replace("<float scale", "<float16 half = {13696}, float scale")
    mask = hidden(rows=False, low=-65504 if head is HALF else LOW, dtype=np.float16 if head is HALF else np.float32)
    model, _ = check(FuseAttention(), source, matches=1, feeds={"mask": mask}, lengths=SIZES, tolerance=3e-3)
    assert model.graph[-1].attributes["softmax_precision"].as_int() == 1


# ALiBi

SLOPES = "<float[3,1,1] slopes = {0.25, 0.0625, 0.5}, float[1,3,1] column = {0.25, 0.0625, 0.5}, float[1] start = {0},"


def alibi(body, head=HEAD, **settings):
    source = text(body, head.replace(") =>", ", float[t] places) =>", 1)).replace(
        "<float scale", SLOPES + "float scale"
    )
    feeds = {"mask": hidden(), "places": np.arange(9, dtype=np.float32), **settings.pop("feeds", {})}
    model, _ = check(FuseAttention(), source, matches=1, feeds=feeds, lengths=SIZES, **settings)
    return [node.op_type for node in model.graph], model


BIAS = " bias = Mul(slopes, places)"


def test_alibi():
    operators, model = alibi(
        JOIN + SCORES + BIAS + " biased = Add(scaled, bias) masked = Add(biased, mask)" + END, CACHED
    )
    assert operators[-1] == "AlibiAttention"
    assert [str(value.shape) for value in model.graph[-1].inputs[3:6]] == ["[3,1,1]", "[1,t]", "[b,1,q,t]"]
    assert len(model.functions) == 1


@pytest.mark.parametrize(
    "total",
    [
        "biased = Add(scaled, bias) masked = Add(biased, mask)",
        "biased = Add(mask, scaled) masked = Add(bias, biased)",
        "both = Add(bias, mask) masked = Add(scaled, both)",
        "both = Add(mask, bias) masked = Add(both, scaled)",
        "lead = Unsqueeze(bias, front) both = Add(lead, mask) masked = Add(scaled, both)",
    ],
)
def test_alibi_in_every_order(total):
    _, model = alibi(f"{SCORES}{BIAS} {total}{END}")
    assert model.graph[-1].op_type == "AlibiAttentionNoCache"


def test_alibi_with_positions_of_every_batch():
    head = HEAD.replace("mask)", "mask, float[b,1,t] rows)")
    body = " line = Mul(column, rows) bias = Unsqueeze(line, two)"
    rows = np.maximum(np.arange(9, dtype=np.float32) - np.array([3, 0], np.float32)[:, None], 0)[:, None]
    operators, model = alibi(
        SCORES + body + " b2 = Add(scaled, bias) masked = Add(b2, mask)" + END, head, feeds={"rows": rows}
    )
    assert operators[-1] == "AlibiAttentionNoCache"
    assert str(model.graph[-1].inputs[4].shape) == "[b,t]"


def test_alibi_with_a_floor_and_minus_infinity():
    body = SCORES + BIAS + " both = Add(bias, mask) m = Add(scaled, both) masked = Max(m, low)" + END
    operators, _ = alibi(body, feeds={"mask": hidden(low=-np.inf)})
    assert operators[-1] == "AlibiAttentionNoCache"


def test_alibi_without_a_floor_keeps_minus_infinity():
    """A row that hides some columns by the lowest number and the others by -inf: those do not come back."""
    head = HEAD.replace("mask)", "mask, float[q,t] causal)")
    causal = hidden(rows=False, low=-np.inf)[1, 0]
    body = SCORES + BIAS + " two_masks = Add(causal, mask) both = Add(bias, two_masks) masked = Add(scaled, both)" + END
    operators, _ = alibi(body, head, feeds={"causal": causal, "mask": np.full((2, 1, 4, 9), LOW, np.float32)})
    assert operators[-1] == "Attention"


def test_a_bias_per_head_that_is_no_line_of_positions():
    body = SCORES + " bias = Mul(slopes, start) biased = Add(scaled, bias) masked = Add(biased, mask)" + END
    operators, _ = alibi(body)
    assert operators[-1] == "Attention"
    head = HEAD.replace("mask)", "mask, float[3,1,t] bias)")
    operators, _ = fused(SCORES + " biased = Add(scaled, bias) masked = Add(biased, mask)" + END, head)
    assert operators[-1] == "Attention"


def alibi_declined(reason, body, head=HEAD):
    source = text(body, head.replace(") =>", ", float[t] places) =>", 1)).replace(
        "<float scale", SLOPES + "float scale"
    )
    result = FuseAttention().run(read_model(source))
    assert not result.modified
    assert any(reason in key for key in result.declines), result.declines


def test_declines_alibi_beside_a_mask_per_head():
    head = HEAD.replace("b,1,q,t] mask", "b,3,q,t] mask")
    body = SCORES + BIAS + " biased = Add(scaled, bias) masked = Add(biased, mask)" + END
    alibi_declined("beside the ALiBi bias, mask ['b', 3, 'q', 't'] differs between heads", body, head)


def test_declines_alibi_without_a_mask():
    alibi_declined("has an ALiBi bias and no mask", SCORES + BIAS + " masked = Add(scaled, bias)" + END)


def test_declines_alibi_with_a_soft_cap():
    body = (
        SCORES + BIAS + " x = Div(scaled, cap) h = Tanh(x) c = Mul(cap, h) both = Add(bias, mask) masked = Add(c, both)"
    )
    alibi_declined("caps the scores and adds an ALiBi bias", body + END)


# What others read


def test_scores_and_shares_that_others_read_stay():
    head = CACHED.replace("(float[] y,", "(float[b,3,q,t] masked, float[] z, float[] y,")
    operators, model = fused(JOIN + MASKED + END + " z = Neg(shares)", head)
    assert {"Attention", "Softmax", "Neg"} <= set(operators)
    assert [value.name for value in model.graph.outputs] == ["masked", "z", "y", "k", "v"]


def test_keys_on_which_the_mask_depends_are_joined_before():
    """The grown cache is an output of the operator, so that none of its inputs can depend on it."""
    head = CACHED.replace("float[b,1,q,t] mask", "float[b,1,q,1] gate")
    body = (
        JOIN + SCORES + " sums = ReduceSum <keepdims = 1> (kt, ones) m = Mul(sums, gate) masked = Add(scaled, m)" + END
    )
    source = text(body, head).replace("<float scale", "<int64[2] ones = {1, 2}, float scale")
    model, _ = check(FuseAttention(), source, matches=1, lengths=SIZES)
    operators = [node.op_type for node in model.graph]
    assert operators.count("Concat") == 2
    assert operators[-1] == "Attention"
    assert len([value for value in model.graph[-1].inputs if value is not None]) == 4


def test_provenance_names_the_pass():
    _, model = fused(MASKED + END)
    assert "fuse-attention" in model.graph[-1].metadata_props[MADE_BY]


# Declines


def test_declines_an_older_opset():
    declined("needs opset 23", MASKED + END, opset=21)


@pytest.mark.parametrize(
    ("scores", "scale"),
    [("scaled = Mul(raw, minus)", "-0.35"), ("scaled = Mul(raw, zero)", "0;"), ("scaled = Div(raw, zero)", "inf")],
)
def test_declines_scales_that_the_operator_refuses(scores, scale):
    body = f"{TURN} raw = MatMul(query, kt) {scores} masked = Add(scaled, mask)"
    declined(f"the scores are scaled by {scale}", body + END)


@pytest.mark.parametrize(
    ("capped", "reason"),
    [
        ("x = Div(scaled, cap) h = Tanh(x) c = Mul(h, other_cap)", "divides the scores by 1.5, and multiplies"),
        ("x = Div(scaled, zero) h = Tanh(x) c = Mul(h, zero)", "divides the scores by 0,"),
        ("x = Mul(scaled, zero) h = Tanh(x) c = Mul(h, zero)", "divides the scores by inf"),
    ],
)
def test_declines_uneven_soft_caps(capped, reason):
    declined(reason, f"{SCORES} {capped} masked = Add(c, mask)" + END)


def test_declines_a_low_number_that_masks_nothing():
    head = HEAD.replace("float[b,1,q,t] mask", "bool[b,1,q,t] seen")
    declined("low scores are -50.0", SCORES + " masked = Where(seen, scaled, small)" + END, head)
    declined("floor scores are -50.0", SCORES + " m = Add(scaled, mask) masked = Max(m, small)" + END)


def test_declines_a_softmax_over_rows():
    declined("the softmax runs over axis 2", MASKED + END.replace("axis = -1", "axis = 2"))


def test_declines_three_axes():
    head = "g (float[b,q,4] query, float[b,t,4] k, float[b,t,7] v, float[q,t] mask) => (float[] y)"
    body = "k4 = Unsqueeze(k, one) kt4 = Transpose <perm = [0, 1, 3, 2]> (k4)" + " raw = MatMul(query, kt4)"
    body += " masked = Add(raw, mask)" + END
    source = text(body, head).replace("<float scale", "<int64[1] one = {1}, float scale")
    result = FuseAttention().run(read_model(source))
    assert any("the query query ['b', 'q', 4] does not have four axes" in key for key in result.declines)


@pytest.mark.parametrize("dims", ["b,1,q,1", "t", "1", "b,1,1,1", "q,1"])
def test_a_mask_without_columns_or_rows(dims):
    """A mask of one column adds the same to all scores, so it may hold anything."""
    fused(MASKED + END, HEAD.replace("b,1,q,t] mask", f"{dims}] mask"), feeds={})


@pytest.mark.parametrize(
    ("b", "q", "t", "r", "c"), [(2, 4, 9, 4, 9), (2, 4, 9, 1, 9), (2, 4, 9, 4, 1), (1, 1, 1, 1, 1)]
)
def test_a_mask_with_lengths_of_its_own(b, q, t, r, c):
    """The lengths of the mask may be 1 or those of the scores: both are right, whatever they are called."""
    head = HEAD.replace("b,1,q,t] mask", "b,1,r,c] mask").replace("float[] y", "float[b,3,q,7] y")
    fused(MASKED + END, head, feeds={}, lengths={"b": b, "q": q, "t": t, "r": r, "c": c})


def test_a_mask_that_makes_rows_of_one_query():
    head = HEAD.replace("b,1,q,t] mask", "b,1,r,t] mask")
    for q, r in ((1, 5), (4, 4), (4, 1)):
        fused(MASKED + END, head, feeds={}, lengths={"b": 2, "q": q, "t": 9, "r": r})


@pytest.mark.parametrize("dims", ["a,1,q,t", "b,h,q,t", "5,1,q,t"])
def test_declines_a_mask_that_may_make_batches_or_heads(dims):
    head = HEAD.replace("b,1,q,t] mask", f"{dims}] mask").replace("float[b,3,q,4] query", "float[b,n,q,4] query")
    head = head.replace("float[b,3,t,4] k", "float[b,n,t,4] k").replace("float[b,3,t,7] v", "float[b,n,t,7] v")
    declined("may make more batches or heads", MASKED + END, head)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("b,3,q,4] query", "1,3,q,4] query", "are not known to be of one batch"),
        ("b,3,t,4] k", "b,3,1,4] k", "are not known to be of one length"),
        ("b,3,t,4] k", "b,1,t,4] k", "are not known to be of one batch"),
        ("b,3,q,4] query", "b,1,q,4] query", "broadcast from queries"),
        ("b,3,q,4] query", "b,3,1,4] query", "broadcast from queries"),
        ("b,1,q,t] mask", "b,3,1,q,t] mask", "broadcast from queries"),
    ],
)
def test_declines_what_broadcasts(old, new, reason):
    declined(reason, MASKED + END, HEAD.replace(old, new))


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"b,3,t,4] k": "c,3,t,4] k", "b,3,t,7] v": "c,3,t,7] v"}, {"c": 1}),
        ({"b,3,t,4] k": "c,3,t,4] k", "b,3,t,7] v": "c,3,t,7] v"}, {"b": 1, "c": 2}),
        ({"b,3,t,7] v": "c,3,t,7] v"}, {"c": 1}),
        ({"b,3,t,4] k": "c,3,t,4] k"}, {"c": 1}),
        ({"b,3,t,4] k": "?,3,t,4] k", "b,3,t,7] v": "?,3,t,7] v"}, {}),
        ({"b,3,t,4] k": "b,?,t,4] k", "b,3,t,7] v": "b,?,t,7] v", "b,3,q,4] query": "b,?,q,4] query"}, {}),
        ({"b,3,t,4] k": "b,h,t,4] k", "b,3,t,7] v": "b,h,t,7] v"}, {"h": 1}),
        ({"b,3,t,7] v": "b,h,t,7] v"}, {"h": 1}),
        ({"b,3,t,4] k": "b,3,r,4] k"}, {"r": 1}),
    ],
)
def test_declines_symbols_that_need_not_be_equal(changes, lengths):
    """A length with a name of its own may be 1, which products broadcast; so nothing is fused, and the graph runs."""
    head = HEAD
    for old, new in changes.items():
        head = head.replace(old, new)
    if "?" in head:
        declined("are not known to be of one batch", MASKED + END, head)
        return
    fused(MASKED + END, head, matches=0, lengths=SIZES | lengths, feeds={})


PROJECT = "{n}p = MatMul(states, w{n}) {n}r = Reshape({n}p, zeros) {n} = Transpose <perm = [0, 2, 1, 3]> ({n}r) "


@pytest.mark.parametrize("name", ["?", "positions"])
@pytest.mark.parametrize("others", ["states", "more"])
def test_lengths_without_names_are_equal_if_they_come_from_one_value(name, others):
    """Keys and values of the same states are of one batch and length, whatever the states are multiplied with."""
    body = "".join(PROJECT.format(n=n) for n in "kv").replace("(states, wv)", f"({others}, wv)")
    head = f"g (float[?,3,q,4] query, float[?,{name},5] states, float[?,?,5] more) => (float[] y)"
    head = head.replace("?", "b", 1).replace("[?", "[b") if name == "positions" else head
    source = text(body + SCORES.replace("scaled =", "masked =") + END, head).replace(
        "<float scale", "<float[5,12] wk = random, float[5,12] wv = random, int64[4] zeros = {0, 0, 3, 4}, float scale"
    )
    result = FuseAttention().run(read_model(source))
    assert result.matches == (1 if (name, others) == ("positions", "states") else 0), result.declines


def test_declines_caches_of_two_lengths():
    """The new values may make up for a shorter cache, which the operator does not take: the cache stays outside."""
    head = CACHED.replace("b,3,p,7] past_v", "b,3,r,7] past_v").replace("b,3,q,7] new_v", "b,3,s,7] new_v")
    operators, _ = fused(JOIN + MASKED + END, head, lengths=SIZES | {"r": 3, "s": 6})
    assert operators[:2] == ["Concat", "Concat"]
    result = FuseAttention().run(read_model(text(JOIN + MASKED + END, CACHED.replace("p,7] past_v", "r,7] past_v"))))
    assert any("perhaps of other lengths" in key for key in result.declines), result.declines


def test_declines_heads_that_are_repeated_over_a_batch_too():
    """The Expand that repeats heads may also make several batches of one, to which the queries are then broadcast."""
    head = HEAD.replace("b,3,q,4] query", "b,6,q,4] query").replace("g (", "g (float[n] like, ")
    body = """
        length = Shape(like) to = Concat <axis = 0> (length, ones)
        ku = Unsqueeze(k, two) kw = Expand(ku, to) kr = Reshape(kw, wide)
        vu = Unsqueeze(v, two) vw = Expand(vu, to) vr = Reshape(vw, deep)"""
    body += TURN.replace("(k)", "(kr)") + MASKED.replace(TURN, "") + END.replace(", v)", ", vr)")
    source = text(body, head).replace("<float scale", "<int64[4] ones = {1, 2, 1, 1}, float scale")
    for lengths in ({"n": 2, "b": 1}, {"n": 1, "b": 2}):
        _, result = check(FuseAttention(), source, matches=0, lengths=SIZES | lengths, feeds={"mask": hidden()[:1]})
        assert any("may have other axes than the repeated heads" in key for key in result.declines), result.declines


def test_declines_caches_along_another_axis():
    head = HEAD.replace(
        "float[b,3,t,4] k, float[b,3,t,7] v",
        "float[b,1,t,4] pk, float[b,2,t,4] nk, float[b,1,t,7] pv, float[b,2,t,7] nv",
    )
    body = "k = Concat <axis = 1> (pk, nk) v = Concat <axis = 1> (pv, nv)"
    operators, model = fused(body + MASKED + END, head)
    assert operators.count("Concat") == 2
    assert len(model.graph[-1].outputs) == 1


def test_declines_heads_repeated_on_one_side():
    body = "ku = Unsqueeze(k, two) kw = Expand(ku, threes) kr = Reshape(kw, wide)" + TURN.replace("(k)", "(kr)")
    body += MASKED.replace(TURN, "") + END
    head = HEAD.replace("b,3,q,4] query", "b,6,q,4] query").replace("b,3,t,7] v", "b,6,t,7] v")
    declined("only one of keys and values is repeated", body, head)


def test_declines_heads_in_another_order():
    """As a tile: head i reads key head i % 3."""
    tiled = grouped(MASKED + END).replace("two)", "one)").replace("threes", "tile")
    head = HEAD.replace("b,3,q,4] query", "b,6,q,4] query")
    source = text(tiled, head).replace(
        "<float scale", "<int64[1] one = {1}, int64[5] tile = {1, 2, 1, 1, 1}, float scale"
    )
    model, _ = check(FuseAttention(), source, matches=1, feeds={"mask": hidden()}, lengths=SIZES)
    assert "Expand" in [node.op_type for node in model.graph]


def test_declines_scales_per_channel():
    body = f"{TURN} raw = MatMul(query, kt) scaled = Mul(raw, many) masked = Add(scaled, mask)"
    result = FuseAttention().run(read_model(text(body + END, HEAD.replace("t]", "6]").replace("3,t", "3,6"))))
    assert not result.modified


@pytest.mark.parametrize("choice", ["Where(seen, biased, low)", "Where(unseen, low, biased)"])
@pytest.mark.parametrize("value", [-np.inf, LOW, -1e4])
@pytest.mark.parametrize("added", [False, True])
def test_a_number_in_place_of_scores_forgets_what_was_added_to_them(choice, value, added):
    """A row of which every seen column is -inf is the mean of the hidden ones: a sum would make these -inf too."""
    name = "unseen" if "unseen" in choice else "seen"
    head = HEAD.replace("mask)", f"mask, bool[1,1,q,t] {name}, float[b,1,1,t] padding)")
    padding = np.where(np.arange(9) < 6, np.float32(value), np.float32(0)) * np.ones((2, 1, 1, 1), np.float32)
    seen = np.tril(np.ones((4, 9), bool), 5)[None, None]
    seen[0, 0, 1, :] = False
    feeds = {"mask": np.linspace(-1, 1, 72, dtype=np.float32).reshape(2, 1, 4, 9), "padding": padding}
    feeds[name] = seen if name == "seen" else ~seen
    body = f"{SCORES} biased = Add(scaled, padding) chosen = {choice} masked = Add(chosen, mask)"
    if not added:
        body = body.replace(" masked = Add(chosen, mask)", "").replace("chosen =", "masked =")
        head = head.replace("float[b,1,q,t] mask, ", "")
        del feeds["mask"]
    fused(body + END, head, feeds=feeds)


def test_declines_a_low_number_beside_a_bias_that_may_hide():
    body = f"{SCORES} biased = Add(scaled, mask) masked = Where(seen, biased, billion)"
    declined("which hidden_rows=any accepts", body + END, HEAD.replace("mask)", "mask, bool[1,1,q,t] seen)"))


def test_rows_that_see_something_by_constants_are_fused_with_any_low_number():
    head = HEAD.replace("float[b,1,q,t] mask", "float[b,1,1,1] unused").replace("q,4]", "3,4]").replace("t,", "3,")
    tri = "bool[1,1,3,3] tri = {1, 0, 0, 1, 1, 0, 1, 1, 1}, float[3] far = {0, -10000, 0}, float low4 = {-10000}"
    body = SCORES + " chosen = Where(tri, scaled, low4) masked = Add(chosen, far)" + END
    body = body.replace("y = ", "z = Neg(unused) y0 = ") + " y = Add(y0, z)"
    model, _ = check(FuseAttention(), text(body, head).replace("<float scale", f"<{tri}, float scale"), matches=1)
    assert "Softmax" not in [node.op_type for node in model.graph]
