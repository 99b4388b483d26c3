"""shard over fused operators: heads are the unit in every layout, and joined ranks give the same numbers."""

from __future__ import annotations

import collections

import onnx_ir
import pytest

from passopt.ir.errors import PassoptError
from passopt.ir.graph.decoder import KV_HEADS
from passopt.ir.graph.functions import local_function
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.legal_degrees import make_plan
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 11, opset_import: ["" : 23, "passopt" : 1]>\n'
SLOPES = {3: "0.1, 0.2, 0.4", 4: "0.1, 0.2, 0.4, 0.7", 6: "0.1, 0.2, 0.4, 0.7, 1.1, 1.6"}

ROTARY = """
    qn = RMSNormalization(qt, qg)
    kn = RMSNormalization(kt, kg)
    qr = RotaryEmbedding(qn, cos, sin, position_ids)
    kr = RotaryEmbedding(kn, cos, sin, position_ids)
    [mine] mixed, "present.0.key", "present.0.value" =
        Attention<scale = 0.4, softcap = 5.0>(qr, kr, vt, mask, "past.0.key", "past.0.value")"""
ALIBI = """
    [mine] mixed, "present.0.key", "present.0.value" =
        passopt.AlibiAttention<scale = 0.4>(qt, kt, vt, slopes, columns, mask, "past.0.key", "past.0.value")"""


def decoder(attention, heads=6, kv_heads=2):
    """One layer with a cache; a head has 4 channels."""
    q, kv = heads * 4, kv_heads * 4
    cache = f"float[batch,{kv_heads},past,4]", f'float[batch,{kv_heads},"past+seq",4]'
    return read_model(f"""{HEADER}
    decoder (int64[batch,seq] input_ids, int64[batch,seq] position_ids, float[batch,1,seq,"past+seq"] mask,
             float[batch,"past+seq"] columns, {cache[0]} "past.0.key", {cache[0]} "past.0.value")
        => (float[batch,seq,24] logits, {cache[1]} "present.0.key", {cache[1]} "present.0.value")
    <float[24,10] table = random, float[24,10] head = random, float[10] g = random, float[4] qg = random,
     float[4] kg = random, float[{q},10] wq = random, float[{kv},10] wk = random, float[10,{kv}] wv = random,
     float[{kv}] bv = random, float[10,{q}] wo = random, float[10] bo = random, float[16,2] cos = random,
     float[16,2] sin = random, float[{heads},1,1] slopes = {{{SLOPES[heads]}}}, int64[4] q_shape = {{0, 0, {heads}, 4}},
     int64[4] kv_shape = {{0, 0, {kv_heads}, 4}}, int64[3] flat = {{0, 0, {q}}}> {{
        x = Gather(table, input_ids)
        n = RMSNormalization(x, g)
        wq_t = Transpose<perm=[1,0]>(wq)
        wk_t = Transpose<perm=[1,0]>(wk)
        wo_t = Transpose<perm=[1,0]>(wo)
        head_t = Transpose<perm=[1,0]>(head)
        q = MatMul(n, wq_t)
        k = MatMul(n, wk_t)
        vm = MatMul(n, wv)
        v = Add(vm, bv)
        qh = Reshape(q, q_shape)
        kh = Reshape(k, kv_shape)
        vh = Reshape(v, kv_shape)
        qt = Transpose<perm=[0,2,1,3]>(qh)
        kt = Transpose<perm=[0,2,1,3]>(kh)
        vt = Transpose<perm=[0,2,1,3]>(vh)
        {attention}
        back = Transpose<perm=[0,2,1,3]>(mixed)
        joined = Reshape(back, flat)
        o = MatMul(joined, wo_t)
        ob = Add(o, bo)
        y = Add(x, ob)
        [head] logits = MatMul(y, head_t)
    }}""")


def with_functions(model):
    """With the definitions of the local functions that it calls."""
    for node in model.graph:
        function = local_function(node.op_type, 23) if node.domain == "passopt" else None
        if function is not None:
            model.functions[function.identifier()] = function
    return model


def collectives(model):
    return collections.Counter(node.op_type for node in model.graph if node.domain == "com.microsoft")


def local_shapes(model, *names):
    return [list(expression_of(model.graph.initializers[name]).shape) for name in names]


def refused(model, item):
    before = print_model(model)
    with pytest.raises(PassoptError) as error:
        item.run(model)
    assert print_model(model) == before
    return str(error.value)


def test_grouped_queries_follow_their_key_value_head():
    model, _ = check(Shard(2), decoder(ROTARY))
    assert collectives(model) == {"AllReduce": 2, "AllGather": 1}
    assert local_shapes(model, "wq", "wk", "wv", "bv", "wo") == [[12, 10], [4, 10], [10, 4], [4], [10, 12]]
    assert local_shapes(model, "qg", "kg", "bo") == [[4], [4], [10]]
    shapes = {value.name: str(value.shape) for node in model.graph for value in node.outputs}
    assert shapes["mixed"] == "[batch,3,seq,4]"
    assert shapes["present.0.key"] == "[batch,1,past+seq,4]"


@pytest.mark.parametrize(("degree", "heads", "kv_heads"), [(3, 6, 2), (5, 4, 2), (2, 3, 3), (4, 6, 3)])
@pytest.mark.parametrize("attention", [ROTARY, ALIBI])
def test_padding_adds_whole_groups(attention, degree, heads, kv_heads):
    model, _ = check(Shard(degree, pad=True), with_functions(decoder(attention, heads, kv_heads)))
    groups = -(-kv_heads // degree)
    assert local_shapes(model, "wq", "wk") == [[groups * heads // kv_heads * 4, 10], [groups * 4, 10]]
    assert model.metadata_props[KV_HEADS] == str(kv_heads)


@pytest.mark.parametrize("degree", [2, 3, 6])
def test_one_kv_head_is_on_every_rank(degree):
    model, _ = check(Shard(degree), decoder(ROTARY, 6, 1))
    assert local_shapes(model, "wq", "wk", "wv") == [[24 // degree, 10], [4, 10], [10, 4]]
    assert str(next(value.shape for value in model.graph.inputs if value.name == "past.0.key")) == "[batch,1,past,4]"


def test_slopes_are_those_of_all_heads():
    model, _ = check(Shard(2), with_functions(decoder(ALIBI, 6, 2)))
    slopes = expression_of(model.graph.initializers["slopes"])
    parts = [Evaluator(rank).array(slopes).reshape(-1).tolist() for rank in range(2)]
    assert parts == [pytest.approx([0.1, 0.2, 0.4]), pytest.approx([0.7, 1.1, 1.6])]


def test_slopes_of_padding_are_zero():
    model, _ = check(Shard(2, pad=True), with_functions(decoder(ALIBI, 3, 3)))
    slopes = expression_of(model.graph.initializers["slopes"])
    assert Evaluator(1).array(slopes).reshape(-1).tolist() == [pytest.approx(0.4), 0]


@pytest.mark.parametrize("attention", [ROTARY, ALIBI])
@pytest.mark.parametrize(("degree", "pad"), [(2, False), (3, True)])
def test_int8_and_shard_commute_on_the_fused_graph(attention, degree, pad):
    model = with_functions(decoder(attention))
    one, _ = check(Shard(degree, pad), check(QuantizeWeights(), model, tolerance=0.2)[0])
    split, _ = check(Shard(degree, pad), model)
    QuantizeWeights().run(split)
    assert [node.op_type for node in one.graph] == [node.op_type for node in split.graph]
    digests = [{name: expression_of(v).digest() for name, v in m.graph.initializers.items()} for m in (one, split)]
    assert digests[0] == digests[1]
    assert {"wq.codes", "wk.codes", "wv.codes", "wo.codes"} <= set(digests[0])


def test_the_plan_of_a_fused_graph_counts_groups():
    plan = make_plan(decoder(ROTARY))
    assert (plan.legal_degrees, plan.all_reduces, plan.all_gathers) == ((2,), 2, 1)
    assert {group.units for group in plan.groups} == {2, 24}


def test_a_degree_beyond_the_groups_is_refused():
    message = refused(decoder(ROTARY), Shard(3))
    assert "degree 3 does not divide 2 units of wq" in message
    assert "Legal degrees: 2" in message


# Operators one by one.


def between(body, constants="", inputs="", result="float[batch,seq,10] y"):
    """A column-parallel q, [batch, seq, 24], and a row-parallel linear of r."""
    return f"""{HEADER}
    g (float[batch,seq,10] x {inputs}) => ({result})
    <float[10,24] wq = random, float[10,8] wk = random, float[10,8] wv = random, float[24,10] wo = random,
     int64[4] heads = {{0, 0, 6, 4}}, int64[3] flat = {{0, 0, 24}} {constants}> {{
        q = MatMul(x, wq)
        {body}
        y = MatMul(r, wo)
    }}"""


FLAT = """
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    qr = RotaryEmbedding<num_heads = 6>(q, cos, sin)
    kr = RotaryEmbedding<num_heads = 2>(k, cos, sin)
    r = Attention<q_num_heads = 6, kv_num_heads = 2, is_causal = 1>(qr, kr, v{mask})"""
TABLES = ", float[batch,seq,2] cos, float[batch,seq,2] sin"


@pytest.mark.parametrize(("degree", "pad"), [(2, False), (3, True)])
def test_flat_heads_shrink_their_attributes(degree, pad):
    model, _ = check(Shard(degree, pad), between(FLAT.format(mask=""), inputs=TABLES))
    counts = {
        (node.op_type, name): attribute.as_int()
        for node in model.graph
        for name, attribute in node.attributes.items()
        if name.endswith("num_heads")
    }
    assert counts == {
        ("RotaryEmbedding", "num_heads"): 1,
        ("Attention", "q_num_heads"): 3,
        ("Attention", "kv_num_heads"): 1,
    }


def test_a_mask_per_head_is_sharded_with_them():
    text = between(FLAT.format(mask=", bias"), ", float[6,3,3] bias = random", inputs=TABLES)
    model, _ = check(Shard(2), text, lengths={"seq": 3})
    assert local_shapes(model, "bias") == [[3, 3, 3]]


@pytest.mark.parametrize("mask", ["float[seq,seq] mask", "float[batch,1,seq,seq] mask", "bool[batch,1,seq,seq] mask"])
def test_a_mask_for_all_heads_stays_whole(mask):
    check(Shard(2), between(FLAT.format(mask=", mask"), inputs=f"{TABLES}, {mask}"))


HEADS = (
    "qh = Reshape(q, heads) t = Transpose<perm=[0,2,1,3]>(qh) {} b = Transpose<perm=[0,2,1,3]>(z) r = Reshape(b, flat)"
)


@pytest.mark.parametrize(
    "norm",
    [
        "z = RMSNormalization(t, weight)",
        "z = LayerNormalization(t, weight, bias)",
        "z = RMSNormalization<axis=-1>(t, per_head)",
        "z = RotaryEmbedding(t, cos, sin)",
    ],
)
def test_what_works_on_each_head_alone(norm):
    constants = ", float[4] weight = random, float[4] bias = random, float[6,1,4] per_head = random"
    model, _ = check(Shard(3), between(HEADS.format(norm), constants, TABLES))
    assert collectives(model) == {"AllReduce": 1}
    for name, shape in (("weight", [4]), ("per_head", [2, 1, 4])):
        if name in model.graph.initializers and name in norm:
            assert local_shapes(model, name) == [shape]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[mine] r = RMSNormalization(q, wide)", "'mine': normalises over axes from 2 on, of which 2 is sharded"),
        ("[mine] r = LayerNormalization<axis=1>(q, wide)", "'mine': normalises over axes from 1 on"),
        (HEADS.format("[mine] z = RMSNormalization<axis=1>(t, whole)"), "'mine': normalises over axes from 1 on"),
        (HEADS.format("u = Transpose<perm=[0,2,1,3]>(t) [mine] w = RotaryEmbedding(u, cos, sin) "
                      "z = Transpose<perm=[0,2,1,3]>(w)"), "'mine': turns whole heads by their positions"),
        (HEADS.format("u = Transpose<perm=[0,2,1,3]>(t) [mine] w = Attention(u, u, u) "
                      "z = Transpose<perm=[0,2,1,3]>(w)"), "'mine': expected input 0 to be sharded by heads"),
        ("[mine] r = RotaryEmbedding<num_heads = 3>(q, cos4, sin4)", None),
        (HEADS.format("[mine] z = RotaryEmbedding(t, c, c)").replace("qh =", "c = Slice(q, zero, two, last) qh ="),
         "Slice"),
    ],
)  # fmt: skip
def test_what_mixes_heads_is_refused(body, message):
    constants = ", float[24] wide = random, float[6,3,4] whole = random, int64[1] zero = {0}, int64[1] two = {2}"
    constants += ", int64[1] last = {2}"
    tables = TABLES + ", float[batch,seq,4] cos4, float[batch,seq,4] sin4"
    text = between(body, constants, tables)
    if message is None:
        model, _ = check(Shard(3), text)  # three heads of eight channels: a rank has one
        assert model.graph.node("mine").attributes["num_heads"].as_int() == 1
        return
    assert message in refused(read_model(text.replace("seq", "3")), Shard(3))


# Gemm.


@pytest.mark.parametrize(("degree", "pad"), [(4, False), (3, True)])
@pytest.mark.parametrize("beta", ["", ", beta = 0.5"])
@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_adds_its_bias_once(turned, beta, degree, pad):
    up, down = ("8,6", "5,8") if turned else ("6,8", "8,5")
    text = f"""{HEADER}
    g (float[batch,6] x) => (float[batch,5] y)
    <float[{up}] up = random, float[8] b1 = random, float[{down}] down = random, float[5] b2 = random> {{
        h = Gemm<transB = {turned}, alpha = 0.7 {beta}>(x, up, b1)
        r = Tanh(h)
        y = Gemm<transB = {turned} {beta}>(r, down, b2)
    }}"""
    model, _ = check(Shard(degree, pad), text)
    assert collectives(model) == {"AllReduce": 1}
    length = -(-8 // degree)
    assert local_shapes(model, "up", "b1", "down", "b2") == [
        [length, 6] if turned else [6, length],
        [length],
        [5, length] if turned else [length, 5],
        [5],
    ]


def test_a_gemm_whose_rows_are_sharded_keeps_its_weight():
    text = f"""{HEADER}
    g (float[4,6] x) => (float[8,5] y) <float[6,8] up = random, float[4,5] w = random, float[5] b = random> {{
        h = MatMul(x, up)
        t = Transpose<perm=[1,0]>(h)
        y = Gemm(t, w, b)
    }}"""
    model, _ = check(Shard(2), text)
    assert local_shapes(model, "up", "w", "b") == [[6, 4], [4, 5], [5]]


def test_a_gemm_of_two_computed_matrices_is_refused():
    text = f"""{HEADER}
    g (float[4,6] x, float[8,5] w) => (float[4,5] y) <float[6,8] up = random> {{
        h = MatMul(x, up)
        [mine] y = Gemm(h, w)
    }}"""
    assert "Gemm 'mine': expected a constant weight, found w" in refused(read_model(text), Shard(2))


# Shapes.


def test_a_target_of_batch_times_heads_becomes_local():
    body = """
        bs = Shape<start=0, end=1>(x)
        six = Constant<value_ints=[6]>()
        both = Mul(bs, six)
        rest = Shape<start=1, end=2>(x)
        four = Constant<value_ints=[4]>()
        qh = Reshape(q, heads)
        t = Transpose<perm=[0,2,1,3]>(qh)
        target = Concat<axis=0>(both, rest, four)
        m = Reshape(t, target)
        mt = Transpose<perm=[0,2,1]>(m)
        scores = MatMul(m, mt)
        z3 = MatMul(scores, m)
        one = Shape<start=0, end=1>(x)
        target4 = Concat<axis=0>(one, six, rest, four)
        z = Reshape(z3, target4)
        b = Transpose<perm=[0,2,1,3]>(z)
        r = Reshape(b, flat)"""
    model = read_model(between(body))
    merged = next(value for node in model.graph for value in node.outputs if value.name == "m")
    merged.shape = onnx_ir.Shape(["6*batch", "seq", 4])  # as exporters state it
    changed, _ = check(Shard(3), model)
    shapes = {value.name: str(value.shape) for node in changed.graph for value in node.outputs}
    assert shapes["m"] == "[2*batch,seq,4]"
