"""Where shard once gave wrong numbers without a word: it refuses by name, or gives the right ones."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import PassError, UsageError
from passopt.ir.serialization.text import print_model
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
CODES = ", ".join(str(code - 20) for code in range(48))


def refused(text, item=None):
    """The message of the PassError, after asserting that the text did not change."""
    model = text if isinstance(text, onnx_ir.Model) else read_model(HEADER + text)
    before = print_model(model)
    with pytest.raises(PassError) as error:
        (item or Shard(2)).run(model)
    assert print_model(model) == before
    return str(error.value)


def linear(body, result="float[batch,3,6] y", inputs="", constants=""):
    """A column-parallel linear, h [batch, 3, 8], and `body`, which may end in a row-parallel one of `down`."""
    return f"""
    g (float[batch,3,6] x {inputs}) => ({result})
    <float[6,8] up = random, float[8,6] down = random, int64[1] zero = {{0}}, int64[1] two = {{2}} {constants}> {{
        h = MatMul(x, up)
        {body}
    }}"""


# Products of two sharded operands.


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose<perm=[0,2,1]>(h) [mine] y = MatMul(t, h)",
        "k = MatMul(x, up) t = Transpose<perm=[0,2,1]>(k) [mine] kv = MatMul(t, h) y = MatMul(h, kv)",
    ],
)
def test_a_product_that_is_sharded_along_two_axes_is_refused(body):
    found = refused(linear(body, "float[batch,8,8] y" if "kv" not in body else "float[batch,3,8] y"))
    assert found.startswith("MatMul 'mine': its result would be sharded along two axes")


def test_a_product_with_a_vector_is_refused():
    assert "'mine': expected operands of at least two axes" in refused(
        linear("[mine] y = MatMul(h, v)", "float[batch,3] y", inputs=", float[8] v")
    )


def test_one_replicated_operand_is_fine():
    check(Shard(4), HEADER + linear("y = MatMul(m, h)", "float[batch,5,8] y", inputs=", float[5,3] m"))


MULTI_QUERY = """
attention (float[batch,seq,12] x) => (float[batch,seq,12] y)
<float[12,16] wq = random, float[12,4] wk = random, float[12,4] wv = random, float[16,12] wo = random,
 int64[4] heads = {0, 0, 4, 4}, int64[4] one = {0, 0, 1, 4}, int64[3] flat = {0, 0, 16}> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    qh = Reshape(q, heads)
    kh = Reshape(k, one)
    vh = Reshape(v, one)
    qt = Transpose<perm=[0,2,1,3]>(qh)
    kt = Transpose<perm=[0,2,3,1]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    [mine] scores = MatMul(qt, kt)
    probs = Softmax<axis=-1>(scores)
    mixed = MatMul(probs, vt)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    joined = Reshape(back, flat)
    y = MatMul(joined, wo)
}"""


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_one_kv_head_for_all_queries_is_on_every_rank(degree):
    model, _ = check(Shard(degree, pad=True), HEADER + MULTI_QUERY)
    assert str(model.graph.initializers["wk"].shape) == "[12,4]"
    assert str(model.graph.initializers["wq"].shape) == f"[12,{-(-4 // degree) * 4}]"


def test_one_channel_that_broadcasts_over_sharded_ones_is_on_every_rank():
    text = linear("g = MatMul(x, gate) [mine] m = Mul(h, g) y = MatMul(m, down)", constants=", float[6,1] gate=random")
    model, _ = check(Shard(2, pad=True), HEADER + text)
    assert str(model.graph.initializers["gate"].shape) == "[6,1]"


# Lengths of one rank.


def test_a_replicated_value_expanded_to_a_local_length_is_sharded():
    text = linear(
        "s = Shape(h) k = Expand(q, s) y = MatMul(h, down)", "float[batch,3,8] k, float[batch,3,6] y", ", float[1] q"
    )
    model, _ = check(Shard(4), HEADER + text)
    assert [node.op_type for node in model.graph].count("AllGather") == 1


@pytest.mark.parametrize(
    ("body", "inputs", "message"),
    [
        ("s = Shape(h) [mine] k = Expand(q, s) m = Mul(k, h)", ", float[8] q", "q is replicated, but must be sharded"),
        ("s = Shape(h) [mine] k = Expand(q, s) m = ReduceSum(k, two)", ", float[1] q", "reduces over axis 2"),
        ("s = Shape<start=2>(h) t = Concat<axis=0>(s, two) [mine] a, b = Split<axis=2>(q, t) m = Relu(h)",
         ", float[batch,3,10] q", "Split 'mine': computes with the length of a sharded axis"),
        ("s = Shape<start=2>(h) [mine] k = Gather(table, s) m = Mul(h, k)", "", "Gather 'mine': computes with the"),
        ("s = Shape<start=2>(h) [mine] b = Cast<to=9>(s) c = Cast<to=1>(b) m = Mul(h, c)", "",
         "Cast 'mine': computes with the length of a sharded axis, which is no longer an integer"),
    ],
)  # fmt: skip
def test_lengths_of_one_rank_are_refused_where_the_whole_length_matters(body, inputs, message):
    table = ", float[16] table = random"
    assert message in refused(linear(f"{body} y = MatMul(m, down)", inputs=inputs, constants=table))


def test_squeeze_without_axes_is_refused_where_one_rank_may_hold_one_element():
    text = linear("[mine] s = Squeeze(r) y = MatMul(s, down)", "float[3,6] y").replace("h = ", "r = ")
    assert refused(text.replace("[batch,", "[1,")).startswith("Squeeze 'mine': expected axes, found none")
    check(Shard(2), HEADER + text.replace("Squeeze(r)", "Squeeze(r, zero)").replace("float[batch,3", "float[1,3"))


def test_a_slice_with_steps_is_not_the_whole_axis():
    text = linear(
        "[mine] s = Slice(h, zero, far, two, two) y = Relu(s)", "float[batch,3,4] y", constants=", int64[1] far = {8}"
    )
    assert refused(text).startswith("Slice 'mine': picks elements along axis 2")


# Subgraphs.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("Relu(h)", "reads h: expected a replicated value, found sharded along axis 2 (8 units)"),
        ("MatMul(x, up)", "reads up: expected a replicated value, found a weight that is sharded elsewhere"),
    ],
)
def test_a_subgraph_that_reads_what_is_sharded_is_refused(body, message):
    branches = f"then_branch = a () => (float[batch,3,8] t) {{ t = {body} }}, "
    branches += "else_branch = b () => (float[batch,3,8] e) { c = Concat<axis=2>(x, x) e = Slice(c, zero, eight, two) }"
    text = linear(
        f"[mine] z = If(c) <{branches}> y = MatMul(z, down)", inputs=", bool c", constants=", int64[1] eight = {8}"
    )
    assert refused(text) == f"If 'mine': a subgraph {message}"


# Padding.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("e = Sigmoid(h) t = Transpose<perm=[0,2,1]>(e) [mine] y = MatMul(e, t)",
         "expected a weight on one side of the padded axis, found the activations e and t"),
        ("[at] w = Max(down, half) e = Exp(h) [mine] y = MatMul(e, w)",
         "expected the padding of w to be zero, found finite, made by Max 'at'"),
        ("[at] w = Clip(down, half) [mine] y = MatMul(h, w)",
         "expected the padding of w to be zero, found finite, made by Clip 'at'"),
        ("a = Abs(h) s = Sqrt(a) [at] d = Div(h, s) r = Relu(d) [mine] y = MatMul(r, down)",
         "expected the padding of r to be finite, found unknown, made by Div 'at'"),
        ("[at] r = Reciprocal(h) [mine] y = MatMul(r, down)", "found unknown, made by Reciprocal 'at'"),
        ("[at] r = Pow(h, minus) [mine] y = MatMul(r, down)", "found unknown, made by Pow 'at'"),
        ("[at] r = Mod<fmod=1>(h, half) [mine] y = MatMul(r, down)", "found unknown, made by Mod 'at'"),
    ],
)  # fmt: skip
def test_padding_that_could_reach_a_sum_is_refused(body, message):
    result = "float[batch,3,3] y" if "t = " in body else "float[batch,3,6] y"
    text = linear(body, result, constants=", float half = {0.5}, float minus = {-2}")
    found = refused(text, Shard(3, pad=True))
    assert found.startswith("MatMul 'mine': cannot be padded: ")
    assert message in found
    Shard(4, pad=True).run(read_model(HEADER + text))  # nothing is padded: nothing to refuse


def test_a_scalar_zero_point_makes_padded_weights_nonzero():
    text = f"""
    g (float[batch,6] x) => (float[batch,6] y)
    <float[6,8] up = random, int8[8,6] codes = {{{CODES}}}, float scale = {{0.1}}, int8 zero = {{7}}> {{
        h = MatMul(x, up)
        e = Exp(h)
        [at] d = DequantizeLinear(codes, scale, zero)
        [mine] y = MatMul(e, d)
    }}"""
    assert "'mine': cannot be padded: expected the padding of d to be zero, found finite" in refused(
        text, Shard(3, True)
    )
    check(Shard(3, pad=True), HEADER + text.replace(", zero)", ")"))


@pytest.mark.parametrize(
    "body",
    [
        "e = Sigmoid(h) r = Mul(e, h)",
        "c = Cos(h) e = Exp(h) r = Max(c, e)",
        "d = Div(h, half) b = Add(d, half) r = Softmax<axis=1>(b)",
        "r = Div(h, norm)",
        "p = Pow(h, half) q = Equal(h, p) r = Where(q, half, h)",
    ],
)
def test_padding_that_stays_finite_is_fine(body):
    text = linear(f"{body} y = MatMul(r, down)", inputs=", float[batch,3,1] norm", constants=", float half = {2}")
    check(Shard(3, pad=True), HEADER + text)


def test_a_padded_output_may_hold_anything_because_it_is_cut_off():
    check(Shard(3, pad=True), HEADER + linear("r = Reciprocal(h)", "float[batch,3,8] r"), tolerance=1e-3)


# Inputs and outputs.


def test_an_output_named_like_a_cache_is_refused_where_there_is_none():
    text = linear("present.h = Relu(h)", "float[batch,3,8] present.h").replace("present.h", '"present.h"')
    assert refused(text) == (
        "graph output 'present.h': expected it to be replicated, as its past is, found sharded along axis 2 (8 units)"
    )


def test_a_replicated_cache_of_a_sharded_past_is_refused():
    model = tiny_decoder(DecoderSpec(heads=6, head_dim=4, layers=1))
    mask = next(value for node in model.graph for value in node.outputs if value.name == "scores_bias")
    mask.shape = onnx_ir.Shape(["batch", 6, "seq", "past+seq"])
    output = next(value for value in model.graph.outputs if value.name == "present.0.key")
    position = model.graph.outputs.index(output)
    ids = next(value for value in model.graph.inputs if value.name == "attention_mask")
    node = onnx_ir.node("Cast", [ids], {"to": 1})
    model.graph.append(node)
    output.name, node.outputs[0].name = "inner.0.key", "present.0.key"
    node.outputs[0].type, node.outputs[0].shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), ids.shape
    model.graph.outputs[position] = node.outputs[0]
    with pytest.raises(
        PassError, match=r"'present\.0\.key': expected it to be sharded along axis 1 \(6 units\).*found r"
    ):
        Shard(2).run(model)


LOOK_UP = """
lm (int64[batch,seq] input_ids, int64[batch,seq] sorts) => (float[batch,seq,10] y)
<float[10,6] table = random, int64[10] order = {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, float[4] few = random,
 float[6,10] head = random, int64[1] last = {-1}> {
    x = Gather(table, input_ids)
    y = MatMul(x, head)
}"""


def test_int32_token_ids():
    feeds = {"input_ids": np.array([[0, 9, 4], [5, 1, 7]], np.int32)}
    model, _ = check(Shard(5), HEADER + LOOK_UP.replace("int64[batch", "int32[batch"), feeds=feeds)
    assert model.graph.initializers["vocab.start"].dtype == onnx_ir.DataType.INT32


@pytest.mark.parametrize(
    "body",
    [
        "k = Gather(order, input_ids) f = Cast<to=1>(k) u = Unsqueeze(f, last) x = Mul(u, t)",
        "k = Gather(few, sorts) u = Unsqueeze(k, last) x = Mul(u, t)",
    ],
)
def test_tables_that_are_no_embeddings_stay_whole(body):
    text = LOOK_UP.replace("x = Gather(table, input_ids)", f"t = Gather(table, input_ids) {body}")
    feeds = {"input_ids": np.array([[0, 9, 4]]), "sorts": np.array([[3, 1, 2]])}
    model, _ = check(Shard(5), HEADER + text, feeds=feeds)
    assert [node.op_type for node in model.graph].count("AllReduce") == 1


def test_a_quantised_table_cast_to_truth_values_is_completed_first():
    text = LOOK_UP.replace("float[10,6] table = random", "int8[10,6] table = {" + ", ".join("01" * 30) + "}")
    text = text.replace(
        "x = Gather(table, input_ids)", "t = Gather(table, input_ids) b = Cast<to=9>(t) n = Not(b) x = Cast<to=1>(n)"
    )
    check(Shard(5), HEADER + text, feeds={"input_ids": np.array([[0, 9, 4]])})


@pytest.mark.parametrize(("axis", "scales", "degree"), [(1, "6,2", 4), (0, "3,8", 5)])
def test_blocks_of_scales_are_never_torn(axis, scales, degree):
    block = 8 // 2 if axis == 1 else 6 // 3
    text = f"""
    g (float[batch,6] x) => (float[batch,8] y) <int8[6,8] codes = {{{CODES}}}, float[{scales}] s = random> {{
        w = DequantizeLinear<axis={axis}, block_size={block}>(codes, s)
        y = MatMul(x, w)
    }}"""
    with pytest.raises(UsageError, match=f"degree {degree}"):
        Shard(degree).run(read_model(HEADER + text))
    check(Shard(2), HEADER + text)
