"""shard on the spellings of other decoders, as exporters write them: one layer each, with its cache."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.decoder import KV_HEADS
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.attention.split_packed_qkv import SplitPackedQkv
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.legal_degrees import make_plan
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check, read_model

DEGREES = pytest.mark.parametrize(("degree", "pad"), [(2, False), (3, True), (4, True), (5, True)])

#: Lengths as exporters compute them; `both` is batch · heads, of 6 heads of 4 channels.
LENGTHS = """
    batch = Shape<start=0, end=1>(input_ids)
    seq = Shape<start=1, end=2>(input_ids)
    total = Shape<start=1, end=2>(attention_mask)
    scalar = Squeeze(batch)
    product = Mul(scalar, i6)
    both = Reshape(product, one_back)"""


def decoder(body, constants, kv_heads, inputs="", declared=None):
    """Around `body`, which makes `mixed` [batch, heads, seq, 4] of `n` [batch, seq, 10]; and the present cache."""
    cache = f"float[batch,{kv_heads},past,4]", f'float[batch,{kv_heads},"past+seq",4]'
    model = read_model(f"""<ir_version: 10, opset_import: ["" : 18]>
    decoder (int64[batch,seq] input_ids, int64[batch,"past+seq"] attention_mask {inputs},
             {cache[0]} "past.0.key", {cache[0]} "past.0.value")
        => (float[batch,seq,26] logits, {cache[1]} "present.0.key", {cache[1]} "present.0.value")
    <float[26,10] table = random, float[10] g = random, float[10] b = random, int64[1] one_back = {{-1}},
     int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}, int64 i6 = {{6}}, int64[1] v1 = {{1}}, int64[1] v2 = {{2}},
     int64[1] v3 = {{3}}, int64[1] v4 = {{4}}, int64[1] v6 = {{6}}, int64[1] v24 = {{24}},
     float half = {{0.5}} {constants}> {{
        {LENGTHS}
        x = Gather<axis=0>(table, input_ids)
        n = LayerNormalization<axis=-1>(x, g, b)
        {body}
        head = Transpose<perm=[1,0]>(table)
        logits = MatMul(y, head)
    }}""")
    for node in model.graph:
        for value in node.outputs:
            if value.name in (declared or {}):
                value.shape = onnx_ir.Shape(declared[value.name])
    return model


LLAMA = """
    q = MatMul(n, wq)
    k0 = MatMul(n, wk)
    v0 = MatMul(n, wv)
    k = Add(k0, bk)
    v = Add(bv, v0)
    heads = Concat<axis=0>(batch, seq, one_back, v4)
    qh = Reshape(q, heads)
    kh = Reshape(k, heads)
    vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,1,3]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    "present.0.key" = Concat<axis=-2>("past.0.key", kt)
    "present.0.value" = Concat<axis=-2>("past.0.value", vt)
    repeated = Concat<axis=0>(batch, v2, v3, total, v4)
    each = Concat<axis=0>(batch, v6, total, v4)
    k5 = Unsqueeze("present.0.key", v2)
    v5 = Unsqueeze("present.0.value", v2)
    ke = Expand(k5, repeated)
    ve = Expand(v5, repeated)
    kr = Reshape(ke, each)
    vr = Reshape(ve, each)
    turned = Transpose<perm=[0,1,3,2]>(kr)
    scores = MatMul(qt, turned)
    scaled = Mul(scores, half)
    masked = Add(scaled, mask)
    probs = Softmax<axis=-1>(masked)
    mixed = MatMul(probs, vr)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Concat<axis=0>(batch, seq, one_back)
    flat = Reshape(back, joined)
    o = MatMul(flat, wo)
    y = Add(x, o)"""
LLAMA_WEIGHTS = """, float[10,24] wq = random, float[10,8] wk = random, float[10,8] wv = random, float[8] bk = random,
    float[8] bv = random, float[24,10] wo = random"""
MASK = ', float[batch,1,seq,"past+seq"] mask'
BLOOM = """
    p = MatMul(n, w)
    pb = Add(p, bw)
    split = Concat<axis=0>(batch, seq, v6, v3, v4)
    u = Reshape(pb, split)
    q = Gather<axis=3>(u, i0)
    k = Gather<axis=3>(u, i1)
    v = Gather<axis=3>(u, i2)
    qt = Transpose<perm=[0,2,1,3]>(q)
    kt = Transpose<perm=[0,2,1,3]>(k)
    vt = Transpose<perm=[0,2,1,3]>(v)
    "present.0.key" = Concat<axis=-2>("past.0.key", kt)
    "present.0.value" = Concat<axis=-2>("past.0.value", vt)
    counted = CumSum(attention_mask, last)
    places = Sub(counted, i1)
    real = Mul(places, attention_mask)
    row = Unsqueeze(real, v1)
    columns = Cast<to=1>(row)
    biased = Mul(slopes, columns)
    bias_shape = Concat<axis=0>(both, v1, total)
    alibi = Reshape(biased, bias_shape)
    q_shape = Concat<axis=0>(both, seq, v4)
    kv_shape = Concat<axis=0>(both, one_back, v4)
    q3 = Reshape(qt, q_shape)
    k3 = Reshape("present.0.key", kv_shape)
    v3d = Reshape("present.0.value", kv_shape)
    turned = Transpose<perm=[0,2,1]>(k3)
    scores = MatMul(q3, turned)
    scaled = Mul(scores, half)
    sum = Add(scaled, alibi)
    four = Concat<axis=0>(batch, v6, seq, one_back)
    scores4 = Reshape(sum, four)
    masked = Add(scores4, mask)
    probs = Softmax<axis=-1>(masked)
    three = Concat<axis=0>(both, seq, one_back)
    probs3 = Reshape(probs, three)
    mixed3 = MatMul(probs3, v3d)
    out = Concat<axis=0>(batch, v6, seq, v4)
    mixed = Reshape(mixed3, out)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Concat<axis=0>(batch, seq, v24)
    flat = Reshape(back, joined)
    o0 = MatMul(flat, wo)
    o = Add(o0, bo)
    y = Add(x, o)"""
BLOOM_WEIGHTS = """, float[10,72] w = random, float[72] bw = random, float[24,10] wo = random, float[10] bo = random,
    int64 last = {-1}, float[6,1] slopes = {0.1, 0.2, 0.4, 0.7, 1.1, 1.6}"""
BLOOM_SHAPES = {"alibi": ["6*batch", 1, "past+seq"], "q3": ["6*batch", "seq", 4], "k3": ["6*batch", "past+seq", 4],
                "v3d": ["6*batch", "past+seq", 4], "probs3": ["6*batch", "seq", "past+seq"]}  # fmt: skip
GPT2 = """
    rows = Concat<axis=0>(one_back, v10)
    n2 = Reshape(n, rows)
    p2 = Gemm(n2, w, bw)
    wide = Concat<axis=0>(batch, seq, v72)
    p = Reshape(p2, wide)
    q, k, v = Split<axis=2, num_outputs=3>(p)
    heads = Concat<axis=0>(batch, seq, v6, v4)
    qh = Reshape(q, heads)
    kh = Reshape(k, heads)
    vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,1,3]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    "present.0.key" = Concat<axis=-2>("past.0.key", kt)
    "present.0.value" = Concat<axis=-2>("past.0.value", vt)
    turned = Transpose<perm=[0,1,3,2]>("present.0.key")
    scores = MatMul(qt, turned)
    probs = Softmax<axis=-1>(scores)
    mixed = MatMul(probs, "present.0.value")
    back = Transpose<perm=[0,2,1,3]>(mixed)
    rows24 = Concat<axis=0>(one_back, v24)
    flat = Reshape(back, rows24)
    o2 = Gemm(flat, wo, bo)
    full = Concat<axis=0>(batch, seq, v10)
    o = Reshape(o2, full)
    y = Add(x, o)"""
GPT2_WEIGHTS = """, float[10,72] w = random, float[72] bw = random, float[24,10] wo = random, float[10] bo = random,
    int64[1] v10 = {10}, int64[1] v72 = {72}"""
GPT2_SHAPES = {"n2": ["batch*seq", 10], "p2": ["batch*seq", 72], "flat": ["batch*seq", 24], "o2": ["batch*seq", 10]}
FALCON = """
    p = MatMul(n, w)
    groups = Concat<axis=0>(batch, seq, v2, v5, v4)
    u = Reshape(p, groups)
    q3 = Slice(u, v0, v3, v3)
    turned5 = Transpose<perm=[3,0,1,2,4]>(u)
    k1 = GatherND(turned5, third)
    v1d = GatherND(turned5, fourth)
    k5 = Transpose<perm=[1,2,3,0,4]>(k1)
    v5d = Transpose<perm=[1,2,3,0,4]>(v1d)
    repeated = Concat<axis=0>(batch, seq, v2, v3, v4)
    ke = Expand(k5, repeated)
    ve = Expand(v5d, repeated)
    heads = Concat<axis=0>(batch, seq, v6, v4)
    qh = Reshape(q3, heads)
    kh = Reshape(ke, heads)
    vh = Reshape(ve, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,1,3]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    "present.0.key" = Concat<axis=-2>("past.0.key", kt)
    "present.0.value" = Concat<axis=-2>("past.0.value", vt)
    turned = Transpose<perm=[0,1,3,2]>("present.0.key")
    scores = MatMul(qt, turned)
    probs = Softmax<axis=-1>(scores)
    mixed = MatMul(probs, "present.0.value")
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Concat<axis=0>(batch, seq, v24)
    flat = Reshape(back, joined)
    o = MatMul(flat, wo)
    y = Add(x, o)"""
FALCON_WEIGHTS = """, float[10,40] w = random, float[24,10] wo = random, int64[1] v5 = {5}, int64[1] v0 = {0},
    int64[1,1] third = {3}, int64[1,1] fourth = {4}"""

MULTI_QUERY = LLAMA.replace("repeated = Concat<axis=0>(batch, v2, v3, total, v4)",
                            "repeated = Concat<axis=0>(batch, v1, v6, total, v4)")  # fmt: skip
MULTI_QUERY_WEIGHTS = LLAMA_WEIGHTS.replace("[10,8]", "[10,4]").replace("float[8]", "float[4]")

FAMILIES = {
    "multi-query": lambda: decoder(MULTI_QUERY, MULTI_QUERY_WEIGHTS, 1, MASK),
    "llama": lambda: decoder(LLAMA, LLAMA_WEIGHTS, 2, MASK),
    "bloom": lambda: decoder(BLOOM, BLOOM_WEIGHTS, 6, MASK, BLOOM_SHAPES),
    "gpt2": lambda: decoder(GPT2, GPT2_WEIGHTS, 6, declared=GPT2_SHAPES),
    "falcon": lambda: decoder(FALCON, FALCON_WEIGHTS, 6),
}


def collectives(model):
    return collections.Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")


def local_shapes(model, *names):
    return [list(expression_of(model.graph.initializers[name]).shape) for name in names]


@DEGREES
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_ranks_give_the_numbers_of_the_unsplit_model(family, degree, pad):
    feeds = {"input_ids": np.array([[25, 3, 9], [0, 7, 13]]), "attention_mask": np.array([[0] * 2 + [1] * 6] * 2)}
    model, _ = check(Shard(degree, pad), FAMILIES[family](), feeds=feeds)
    assert collectives(model) == {"AllReduce": 2, "AllGather": 1}
    assert model.metadata_props[KV_HEADS] == {"llama": "2", "multi-query": "1"}.get(family, "6")


def test_queries_are_divided_by_key_value_heads_before_they_are_expanded():
    model, _ = check(Shard(2), FAMILIES["llama"]())
    assert local_shapes(model, "wq", "wk", "bk", "wo", "table") == [[10, 12], [10, 4], [4], [12, 10], [13, 10]]
    assert [name for name in model.graph.initializers if name.startswith("table")] == ["table"]


def test_a_single_key_value_head_is_on_every_rank():
    model, _ = check(Shard(2), FAMILIES["multi-query"]())
    assert local_shapes(model, "wq", "wk", "wv", "bk", "wo") == [[10, 12], [10, 4], [10, 4], [4], [12, 10]]
    assert str(next(value.shape for value in model.graph.inputs if value.name == "past.0.key")) == "[batch,1,past,4]"


def test_interleaved_heads_are_divided_with_their_biases_and_slopes():
    model, _ = check(Shard(2), FAMILIES["bloom"]())
    assert local_shapes(model, "w", "bw", "wo", "bo", "slopes") == [[10, 36], [36], [12, 10], [10], [3, 1]]
    assert [expression_of(model.graph.initializers[name]).segments for name in ("w", "bw", "slopes")] == [1, 1, 1]
    shapes = {value.name: str(value.shape) for node in model.graph for value in node.outputs}
    assert shapes["alibi"] == "[3*batch,1,past+seq]"


def test_a_packed_gemm_has_three_segments_behind_flattened_rows():
    model, _ = check(Shard(3), without_vocabulary(FAMILIES["gpt2"]()))
    assert local_shapes(model, "w", "bw", "wo", "bo") == [[10, 24], [24], [8, 10], [10]]
    assert [expression_of(model.graph.initializers[name]).segments for name in ("w", "bw")] == [3, 3]


def without_vocabulary(model):
    """26 tokens are no multiple of 3: take 27."""
    values = np.random.default_rng(5).standard_normal((27, 10)).astype(np.float32)
    for value in (model.graph.initializers["table"],):
        value.const_value = onnx_ir.tensor(values, name="table")
        value.shape = onnx_ir.Shape([27, 10])
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and 26 in value.shape.dims:
                value.shape = onnx_ir.Shape([27 if dim == 26 else dim for dim in value.shape.dims])
    return model


def test_copies_of_a_key_are_divided_like_the_key():
    """A cache of one key per query head, of two key-value heads."""
    model, _ = check(Shard(2), FAMILIES["falcon"]())
    assert local_shapes(model, "w", "wo") == [[10, 20], [12, 10]]
    past = next(value for value in model.graph.inputs if value.name == "past.0.key")
    assert past.shape[1] == 3
    assert make_plan(FAMILIES["falcon"]()).legal_degrees == (2,)


@pytest.mark.parametrize(("family", "linears"), [("llama", 4), ("bloom", 2), ("gpt2", 2), ("falcon", 2)])
def test_int8_finds_every_linear(family, linears):
    model = FAMILIES[family]()
    model.graph.opset_imports[""] = 21
    changed, result = check(QuantizeWeights(), model, tolerance=0.2)
    assert result.matches == linears
    codes = [value for name, value in changed.graph.initializers.items() if name.endswith(".codes")]
    assert len(codes) == linears
    check(Shard(2), changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_and_shard_commute(family):
    model = FAMILIES[family]()
    model.graph.opset_imports[""] = 21
    FoldConstants().run(model)
    one, split = model.clone(), model.clone()
    QuantizeWeights().run(one)
    Shard(3, pad=True).run(one)
    Shard(3, pad=True).run(split)
    QuantizeWeights().run(split)
    digests = [{name: expression_of(v).digest() for name, v in m.graph.initializers.items()} for m in (one, split)]
    assert {name: d for name, d in digests[0].items() if "." in name} == {
        name: d for name, d in digests[1].items() if "." in name
    }


# Packed projections of unequal parts.


SLICED = """<ir_version: 10, opset_import: ["" : 18]>
    attention (float[batch,seq,10] x) => (float[batch,seq,10] y)
    <float[10,40] w = random, float[24,10] wo = random, int64[1] v0 = {0}, int64[1] v24 = {24}, int64[1] v32 = {32},
     int64[1] end = {9223372036854775807}, int64[1] axis = {2}, int64[4] heads = {0, 0, -1, 4}, int64[1] v1 = {1},
     int64[5] repeated = {1, 1, 1, 3, 1}, int64[1] v3 = {3}, int64[4] six = {0, 0, 6, 4}, int64[3] flat = {0, 0, 24}> {
        p = MatMul(x, w)
        q = Slice(p, v0, v24, axis, v1)
        k = Slice(p, v24, v32, axis, v1)
        v = Slice(p, v32, end, axis, v1)
        qh = Reshape(q, heads)
        kh = Reshape(k, heads)
        vh = Reshape(v, heads)
        k5 = Unsqueeze(kh, v3)
        v5 = Unsqueeze(vh, v3)
        ke = Expand(k5, repeated)
        ve = Expand(v5, repeated)
        k6 = Reshape(ke, six)
        v6 = Reshape(ve, six)
        m = Mul(qh, k6)
        a = Add(m, v6)
        f = Reshape(a, flat)
        y = MatMul(f, wo)
    }"""


def test_slices_of_a_packed_projection_are_split_first():
    with pytest.raises(PassError, match="parts of a packed projection, run split-packed-qkv before"):
        Shard(2).run(read_model(SLICED))
    model, _ = check(SplitPackedQkv(), SLICED, matches=1)
    changed, _ = check(Shard(2), model)
    assert local_shapes(changed, "w.q", "w.k", "w.v") == [[10, 12], [10, 4], [10, 4]]
    check(Shard(3, pad=True), model)


def test_heads_of_one_matrix_for_queries_and_keys_are_refused():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    attention (float[batch,seq,10] x) => (float[batch,seq,6,4] y)
    <float[10,32] w = random, int64[1] v0 = {0}, int64[1] v6 = {6}, int64[1] v7 = {7}, int64[1] axis = {2},
     int64[4] heads = {0, 0, 8, 4}> {
        [mine] p = MatMul(x, w)
        h = Reshape(p, heads)
        [cut] q = Slice(h, v0, v6, axis)
        k = Slice(h, v6, v7, axis)
        y = Mul(q, k)
    }"""
    with pytest.raises(
        PassError, match="'mine': Slice 'cut' takes some of 8 parts of its output, expected equal heads"
    ):
        Shard(2).run(read_model(text))


# A cache that nobody reads yet.


@pytest.mark.parametrize(("degree", "pad"), [(2, False), (4, True)])
def test_a_prefill_graph_leaves_its_cache_on_the_ranks(degree, pad):
    text = """<ir_version: 10, opset_import: ["" : 18]>
    prefill (float[batch,seq,10] x) => (float[batch,seq,10] y, float[batch,6,seq,4] "present.0.key")
    <float[10,24] w = random, float[24,10] wo = random, int64[4] heads = {0, 0, 6, 4}, int64[3] flat = {0, 0, 24}> {
        p = MatMul(x, w)
        h = Reshape(p, heads)
        "present.0.key" = Transpose<perm=[0,2,1,3]>(h)
        r = Relu("present.0.key")
        t = Transpose<perm=[0,2,1,3]>(r)
        f = Reshape(t, flat)
        y = MatMul(f, wo)
    }"""
    model, _ = check(Shard(degree, pad), text)
    assert collectives(model) == {"AllReduce": 1}
    assert model.metadata_props[KV_HEADS] == "6"
    assert model.graph.outputs[1].shape[1] == -(-6 // degree)


GATED = """<ir_version: 10, opset_import: ["" : 18]>
    mlp (float[batch,seq,10] x) => (float[batch,seq,10] y)
    <float[10,36] w = random, float[36] b = random, float[{down},10] wo = random, int64[1] v0 = {{0}},
     int64[1] v12 = {{12}}, int64[1] v18 = {{18}}, int64[1] v24 = {{24}}, int64[1] v36 = {{36}},
     int64[1] back = {{-12}}, int64[1] end = {{9223372036854775807}}, int64[1] axis = {{2}}, int64[1] last = {{-1}}> {{
        p = MatMul(x, w)
        pb = Add(p, b)
        {body}
        [mine] y = MatMul(h, wo)
    }}"""
TWO = "g = Slice(pb, v0, v18, axis) u = Slice(pb, v18, end, last) s = Sigmoid(g) h = Mul(s, u)"
THREE = "a = Slice(pb, v0, v12, axis) c = Slice(pb, v12, v24, axis) d = Slice(pb, back, v36, axis) h = Sum(a, c, d)"


@pytest.mark.parametrize(("body", "segments"), [(TWO, 2), (THREE, 3)])
@pytest.mark.parametrize(("degree", "pad"), [(2, False), (5, True)])
def test_equal_slices_are_segments(body, segments, degree, pad):
    model, _ = check(Shard(degree, pad), GATED.format(body=body, down=36 // segments))
    weights = [expression_of(model.graph.initializers[name]) for name in ("w", "b")]
    assert [(weight.segments, weight.shape[-1]) for weight in weights] == [
        (segments, segments * -(-36 // segments // degree))
    ] * 2


@pytest.mark.parametrize("start", ["v0", "v12"])
def test_slices_that_are_no_partition_are_refused(start):
    body = f"g = Slice(pb, {start}, v18, axis) u = Slice(pb, v18, end, last) h = Concat<axis=2>(g, u)"
    down = 36 if start == "v0" else 24
    with pytest.raises(PassError, match="picks elements along axis 2|joins along axis 2"):
        Shard(2).run(read_model(GATED.format(body=body, down=down)))
