"""shard: the ranks joined give the numbers of the unsplit graph, with the collectives that were to be expected."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir
import pytest

from passopt.ir.graph.decoder import DEGREE, KV_HEADS
from passopt.ir.graph.verifier import verify_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'

MLP = """
mlp (float[batch,6] x) => (float[batch,5] y)
<float[8,6] up = random, float[8,6] gate = random, float[8] b1 = {1,2,3,4,5,6,7,8}, float[5,8] down = random,
 float[5] b2 = {1,2,3,4,5}> {
    up_t = Transpose<perm=[1,0]>(up)
    gate_t = Transpose<perm=[1,0]>(gate)
    down_t = Transpose<perm=[1,0]>(down)
    u = MatMul(x, up_t)
    ub = Add(u, b1)
    g = MatMul(x, gate_t)
    s = Sigmoid(g)
    h = Mul(ub, s)
    d = MatMul(h, down_t)
    y = Add(d, b2)
}"""

PACKED = """
attention (float[batch,seq,10] x) => (float[batch,seq,7] y)
<float[36,10] w = random, float[12,7] o = random, int64[4] shape = {0, 0, 3, 12}, int64[1] zero = {0},
 int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}, int64[4] heads = {0, 0, 4, 3}, int64[3] flat = {0, 0, 12},
  int64[1] back = {-2}> {
    t = Transpose<perm=[1,0]>(w)
    p = MatMul(x, t)
    u = Reshape(p, shape)
    a = Unsqueeze(u, zero)
    b = Transpose<perm=[3,1,2,0,4]>(a)
    c = Squeeze(b, back)
    q = Gather<axis=0>(c, i0)
    k = Gather<axis=0>(c, i1)
    v = Gather<axis=0>(c, i2)
    qh = Reshape(q, heads)
    kh = Reshape(k, heads)
    vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,3,1]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    scores = MatMul(qt, kt)
    probs = Softmax<axis=-1>(scores)
    mixed = MatMul(probs, vt)
    back1 = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Reshape(back1, flat)
    y = MatMul(joined, o)
}"""

INTERLEAVED = """
attention (float[batch,seq,10] x) => (float[batch,seq,7] y)
<float[10,36] w = random, float[12,7] o = random, int64[5] shape = {0, 0, 4, 3, 3}, int64[3] parts = {1, 1, 1},
 int64[1] three = {3}, int64[3] flat = {0, 0, 12}> {
    p = MatMul(x, w)
    u = Reshape(p, shape)
    q5, k5, v5 = Split<axis=3>(u, parts)
    q = Squeeze(q5, three)
    k = Squeeze(k5, three)
    v = Squeeze(v5, three)
    qt = Transpose<perm=[0,2,1,3]>(q)
    kt = Transpose<perm=[0,2,3,1]>(k)
    vt = Transpose<perm=[0,2,1,3]>(v)
    scores = MatMul(qt, kt)
    probs = Softmax<axis=-1>(scores)
    mixed = MatMul(probs, vt)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Reshape(back, flat)
    y = MatMul(joined, o)
}"""

LANGUAGE_MODEL = """
lm (int64[batch,seq] input_ids) => (float[batch,seq,10] logits)
<float[10,6] table = random, float[10,6] head = random> {
    x = Gather<axis=0>(table, input_ids)
    r = Relu(x)
    t = Transpose<perm=[1,0]>(head)
    logits = MatMul(r, t)
}"""

TOKENS = {"input_ids": np.array([[0, 9, 4, 5], [3, 7, 1, 8]])}


def sharded(text, degree=2, *, pad=False, **settings):
    """(model, number of each collective, expression texts by weight) after every check of `check`."""
    model, _ = check(Shard(degree, pad), HEADER + text, **settings)
    counts = collections.Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")
    weights = {name: expression_of(value) for name, value in model.graph.initializers.items()}
    return model, counts, {name: weight for name, weight in weights.items() if weight.depends_on_rank}


def layout(weight):
    return weight.along, weight.segments, weight.degree


def test_mlp_is_column_then_row_parallel(check_pass):
    model, _ = check_pass(Shard(2), HEADER + MLP)
    assert model.metadata_props[DEGREE] == "2"


def test_bias_of_a_column_parallel_linear_is_split_and_of_a_row_parallel_one_is_not():
    _, counts, weights = sharded(MLP, 4)
    assert counts == {"AllReduce": 1}
    assert {name: layout(weight) for name, weight in weights.items()} == {
        "up": (0, 1, 4),
        "gate": (0, 1, 4),
        "b1": (0, 1, 4),
        "down": (1, 1, 4),
    }


def test_packed_projection_has_three_segments():
    _, counts, weights = sharded(PACKED)
    assert counts == {"AllReduce": 1}
    assert layout(weights["w"]) == (0, 3, 2)
    assert layout(weights["o"]) == (0, 1, 2)


def test_interleaved_projection_is_split_by_heads():
    _, counts, weights = sharded(INTERLEAVED, 4)
    assert counts == {"AllReduce": 1}
    assert layout(weights["w"]) == (1, 1, 4)


def test_packed_projection_of_a_split():
    text = """
    attention (float[batch,seq,10] x) => (float[batch,seq,7] y)
    <float[10,36] w = random, float[12,7] o = random, int64[3] sizes = {12, 12, 12}> {
        p = MatMul(x, w)
        q, k, v = Split<axis=-1>(p, sizes)
        qk = Mul(q, k)
        qkv = Add(qk, v)
        y = MatMul(qkv, o)
    }"""
    _, _, weights = sharded(text, 3)
    assert layout(weights["w"]) == (1, 3, 3)


@pytest.mark.parametrize("degree", [3, 8])
def test_padding_makes_any_degree_possible(degree):
    _, _, weights = sharded(MLP, degree, pad=True)
    assert weights["up"].operand.shape == (-(-8 // degree) * degree, 6)
    _, counts, weights = sharded(PACKED, degree, pad=True)
    assert counts == {"AllReduce": 1}
    heads = -(-4 // degree) * degree
    assert weights["w"].operand.shape == (3 * heads * 3, 10)


def test_embedding_is_split_by_rows_and_logits_are_gathered():
    _, counts, weights = sharded(LANGUAGE_MODEL, 5, feeds=TOKENS)
    assert counts == {"AllReduce": 1, "AllGather": 1}
    assert {name: layout(weights[name]) for name in ("table", "head")} == {"table": (0, 1, 5), "head": (0, 1, 5)}


def test_padded_vocabulary_is_cut_off_again():
    model, counts, _ = sharded(LANGUAGE_MODEL, 3, pad=True, feeds=TOKENS)
    assert counts == {"AllReduce": 1, "AllGather": 1}
    assert model.graph.outputs[0].shape[2] == 10


def test_tied_embedding_and_head_are_one_weight():
    text = LANGUAGE_MODEL.replace(", float[10,6] head = random", "").replace("(head)", "(table)")
    model, _, weights = sharded(text, 2, feeds=TOKENS)
    assert [name for name, weight in weights.items() if weight.shape == (5, 6)] == ["table"]
    assert list(model.graph.initializers).count("table") == 1


def test_two_tables_of_equal_length_and_different_ids():
    text = """
    lm (int64[batch,seq] input_ids, int64[batch,seq] kinds) => (float[batch,seq,5] y)
    <float[4,6] words = random, float[4,6] sorts = random, float[6,10] w1 = random, float[10,5] w2 = random> {
        a = Gather(words, input_ids)
        b = Gather(sorts, kinds)
        x = Add(a, b)
        h = MatMul(x, w1)
        y = MatMul(h, w2)
    }"""
    feeds = {"input_ids": np.array([[0, 3, 1, 2]]), "kinds": np.array([[3, 1, 0, 2]])}
    _, counts, _ = sharded(text, feeds=feeds)
    assert counts == {"AllReduce": 3}


def int8(text, **options):
    """The text's model, quantised."""
    return check(QuantizeWeights(**options), HEADER + text, tolerance=0.2, feeds=TOKENS)[0]


def test_quantised_embedding_and_head():
    model = int8(LANGUAGE_MODEL, embedding=True, head=True)
    changed, _ = check(Shard(2), model, feeds=TOKENS)
    collectives = [node.op_type for node in changed.graph if node.domain]
    assert collectives == ["AllReduce", "AllGather"]
    assert expression_of(changed.graph.initializers["table.scales"]).shape == (5,)


def test_rows_of_a_quantised_table_are_completed_for_a_graph_output():
    text = "lm (int64[batch,seq] input_ids, float[batch,6] x) => (float[batch,seq,6] y, float[batch,4] z)"
    text += "<float[10,6] table = random, float[6,8] w1 = random, float[8,4] w2 = random>"
    text += "{ y = Gather<axis=0>(table, input_ids) h = MatMul(x, w1) z = MatMul(h, w2) }"
    changed, _ = check(Shard(5, pad=True), int8(text, embedding=True), feeds=TOKENS)
    assert [node.op_type for node in changed.graph if node.domain] == ["AllReduce", "AllReduce"]


@pytest.mark.parametrize(("degree", "pad"), [(4, False), (3, True)])
@pytest.mark.parametrize("along", ["in_out", "out_in"])
def test_int8_then_shard_gives_the_codes_of_shard_then_int8(along, degree, pad):
    text = MLP if along == "out_in" else MLP.replace("8,6", "6,8").replace("5,8", "8,5")
    if along == "in_out":
        for name in ("up", "gate", "down"):
            text = text.replace(f"{name}_t = Transpose<perm=[1,0]>({name})", "").replace(f"{name}_t", name)
    one, _ = check(Shard(degree, pad), check(QuantizeWeights(), HEADER + text, tolerance=0.2)[0])
    split, _ = check(Shard(degree, pad), HEADER + text)
    QuantizeWeights().run(split)
    assert [node.op_type for node in one.graph] == [node.op_type for node in split.graph]
    digests = [
        {name: expression_of(value).digest() for name, value in model.graph.initializers.items()}
        for model in (one, split)
    ]
    assert digests[0] == digests[1]
    for rank in range(degree):
        with Evaluator(rank) as evaluator:
            for name in ("up.codes", "up.scales", "down.codes", "down.scales"):
                arrays = [evaluator.array(expression_of(model.graph.initializers[name])) for model in (one, split)]
                assert arrays[0].tobytes() == arrays[1].tobytes()


def test_a_sharded_output_that_is_used_inside_is_gathered_for_the_caller_only():
    text = """
    g (float[batch,6] x) => (float[batch,10] logits, float[batch,5] y)
    <float[6,10] w1 = random, float[10,5] w2 = random> {
        logits = MatMul(x, w1)
        r = Relu(logits)
        y = MatMul(r, w2)
    }"""
    _, counts, _ = sharded(text)
    assert counts == {"AllReduce": 1, "AllGather": 1}


def test_a_partial_output_that_is_used_inside_is_reduced_once():
    text = """
    g (float[batch,6] x) => (float[batch,5] y, float[batch,5] z)
    <float[6,10] w1 = random, float[10,5] w2 = random> { h = MatMul(x, w1) y = MatMul(h, w2) z = Relu(y) }"""
    _, counts, _ = sharded(text)
    assert counts == {"AllReduce": 1}


def test_a_constant_with_both_kinds_of_use_is_cloned():
    text = """
    g (float[batch,6] x, float[batch,8] other) => (float[batch,5] y, float[batch,8] z)
    <float[6,8] w1 = random, float[8] c = {1,2,3,4,5,6,7,8}, float[8,5] w2 = random> {
        h = MatMul(x, w1)
        a = Add(h, c)
        y = MatMul(a, w2)
        z = Mul(other, c)
    }"""
    model, _, weights = sharded(text)
    assert weights["c.shard"].operand.shape == (8,)
    assert expression_of(model.graph.initializers["c"]).shape == (8,)


def test_one_constant_in_two_sharded_places_stays_one():
    text = """
    g (float[batch,6] x) => (float[batch,5] y)
    <float[6,8] w1 = random, float[8] c = {1,2,3,4,5,6,7,8}, float[8,5] w2 = random> {
        h = MatMul(x, w1)
        a = Add(h, c)
        m = Mul(a, c)
        y = MatMul(m, w2)
    }"""
    model, _, _ = sharded(text)
    assert sorted(model.graph.initializers) == ["c", "w1", "w2"]


def test_a_constant_node_is_split_like_an_initializer():
    text = """
    g (float[batch,6] x) => (float[batch,5] y) <float[6,4] w1 = random, float[4,5] w2 = random> {
        b = Constant<value = float[4] {1, 2, 3, 4}>()
        h = MatMul(x, w1)
        a = Add(h, b)
        y = MatMul(a, w2)
    }"""
    model, _, weights = sharded(text, 4)
    assert weights["b"].shape == (1,)
    assert "Constant" not in [node.op_type for node in model.graph]


def test_a_sharded_weight_that_is_a_graph_output_is_cloned():
    text = MLP.replace("(float[batch,5] y)", "(float[batch,5] y, float[8,6] up)")
    model, _, weights = sharded(text)
    assert "up.shard" in weights
    assert model.graph.outputs[1].name == "up"


def decoder(**sizes):
    """With the shape of the mask stated, as exporters do; nothing infers that it has as many rows as tokens."""
    model = tiny_decoder(DecoderSpec(heads=6, head_dim=4, **sizes))
    mask = next(value for node in model.graph for value in node.outputs if value.name == "scores_bias")
    mask.shape = onnx_ir.Shape(["batch", 6, "seq", "past+seq"])
    return model


@pytest.mark.parametrize("degree", [2])
def test_a_decoder_with_cache_and_slopes(degree):
    model, _ = check(Shard(degree), decoder())
    counts = collections.Counter(node.op_type for node in model.graph if node.domain)
    assert counts == {"AllReduce": 2 * 2 + 1, "AllGather": 1}  # the table of positions stays whole
    past = next(value for value in model.graph.inputs if value.name == "past.0.key")
    assert past.shape[1] == 6 // degree
    assert model.metadata_props[KV_HEADS] == "6"
    slopes = expression_of(model.graph.initializers["alibi.slopes"])
    assert (layout(slopes), slopes.shape) == ((0, 1, degree), (6 // degree, 1, 1))


@pytest.mark.parametrize("degree", [4, 5])
def test_a_padded_decoder(degree):
    model, _ = check(Shard(degree, pad=True), decoder(layers=1))
    assert model.metadata_props[KV_HEADS] == "6"
    slopes = expression_of(model.graph.initializers["alibi.slopes"])
    parts = [Evaluator(rank).array(slopes).reshape(-1) for rank in range(degree)]
    whole = expression_of(decoder(layers=1).graph.initializers["alibi.slopes"])
    expected = Evaluator().array(whole).reshape(-1)
    assert np.array_equal(np.concatenate(parts)[:6], expected)
    assert not np.concatenate(parts)[6:].any()


def test_a_quantised_decoder():
    check(Shard(2), decoder(layers=1, quantized=True))


def test_collectives_are_numbered_in_order():
    model, _ = check(Shard(2), decoder())
    numbered = [node for node in model.graph if node.domain]
    assert [node.metadata_props["passopt.collective"] for node in numbered] == [str(i) for i in range(len(numbered))]
    assert len({node.name for node in numbered}) == len(numbered)


def test_fp16_is_reduced_in_fp16():
    text = MLP.replace("float[", "float16[").replace("{1,2,3,4,5,6,7,8}", "{0,1,2,3,4,5,6,7}")
    model, counts, _ = sharded(text, tolerance=2e-2)
    assert counts == {"AllReduce": 1}
    assert "Cast" not in [node.op_type for node in model.graph]


def test_bf16_is_reduced_in_fp32():
    """onnxruntime cannot run it, so only the structure is looked at."""
    model = decoder(layers=1, dtype=DataType.BFLOAT16)
    Shard(2).run(model)
    verify_model(model)
    for node in model.graph:
        if node.op_type == "AllReduce":
            before, (after,) = node.inputs[0].producer(), node.outputs[0].consumers()
            assert (before.op_type, before.attributes["to"].value) == ("Cast", DataType.FLOAT)
            assert (after.op_type, after.attributes["to"].value) == ("Cast", DataType.BFLOAT16)
            assert after.outputs[0].dtype == DataType.BFLOAT16
        if node.op_type == "AllGather":
            assert node.inputs[0].dtype == DataType.BFLOAT16


def test_shapes_of_values_are_those_of_one_rank():
    model, _, _ = sharded(PACKED)
    shapes = {value.name: str(value.shape) for node in model.graph for value in node.outputs}
    assert shapes["p"] == "[batch,seq,18]"
    assert shapes["qt"] == "[batch,2,seq,3]"
    assert shapes["y"] == "[batch,seq,7]"
