"""What shard refuses: the message names the operator, the axis and what to do, and nothing was changed."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.errors import PassError, UsageError
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes.sharding.legal_degrees import make_plan
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'

MLP = """
mlp (float[batch,6] x) => (float[batch,5] y) <float[6,12] up = random, float[12,5] down = random> {
    h = MatMul(x, up)
    y = MatMul(h, down)
}"""


def refused(text, item=None, kind=PassError):
    """The message of the error, after asserting that the text did not change."""
    model = read_model(HEADER + text)
    before = print_model(model)
    with pytest.raises(kind) as error:
        (item or Shard(2)).run(model)
    assert print_model(model) == before
    return str(error.value)


def between(body, signature="y"):
    """An MLP with `body` between its linears: from h [batch, 12] to r."""
    return f"""
    g (float[batch,6] x, int64[1] n) => (float[batch,5] {signature})
    <float[6,12] up = random, float[12,5] down = random, int64[1] last = {{-1}}, int64[1] zero = {{0}},
     int64[1] five = {{5}}, int64[2] unequal = {{4, 8}}, int64[2] merged = {{-1, 12}}> {{
        [first] h = MatMul(x, up)
        {body}
        [second] y = MatMul(r, down)
    }}"""


def test_a_degree_that_does_not_divide_lists_the_legal_ones():
    assert refused(MLP, Shard(5), UsageError) == (
        "shard: degree 5 does not divide 12 units of up. Legal degrees: 2, 3, 4, 6, 12; "
        "or pad with zeros: tp{degree=5,pad=true}"
    )


def test_without_a_legal_degree_the_message_says_none():
    text = MLP.replace("y = MatMul(h, down)", "z = MatMul(h, down) r = MatMul(z, w) y = MatMul(r, v)")
    text = text.replace("12,5] down = random", "12,5] down = random, float[5,7] w = random, float[7,5] v = random")
    assert "Legal degrees: none;" in refused(text, Shard(2), UsageError)


@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_below_one_is_refused(degree):
    assert refused(MLP, Shard(degree), UsageError) == f"shard: degree {degree} is not a positive number"


def test_degree_one_changes_nothing():
    model = read_model(HEADER + MLP)
    assert not Shard(1).run(model).modified


def test_another_degree_than_before_is_refused():
    model, _ = check(Shard(3), HEADER + MLP)
    with pytest.raises(UsageError, match="the model is sharded already, degree 3, asked for 2"):
        Shard(2).run(model)
    with pytest.raises(UsageError, match="the model is sharded already, degree 3, asked for 1"):
        Shard(1).run(model)


def test_a_graph_without_a_linear_is_refused():
    assert "found no linear to shard" in refused("g (float[batch,6] x) => (float[batch,6] y) { y = Relu(x) }")


def test_an_operator_without_a_rule_is_named():
    message = refused(between("[mine] r = Celu(h)"))
    assert message == (
        "Celu 'mine': no sharding rule for this operator; its inputs are sharded along axis 1 (12 units). Leave shard "
        "out for this graph, or change this node so that every rank needs its own part of the value only."
    )


def test_an_operator_without_a_rule_is_fine_on_replicated_values():
    text = MLP.replace("h = MatMul(x, up)", "c = Celu(x) h = MatMul(c, up)")
    check(Shard(2), HEADER + text)


@pytest.mark.parametrize("call", ["Relu(h)", "Transpose<perm=[1,0]>(h)", "Reshape(h, h)", "AllReduce(h)", "Concat(h)"])
def test_an_operator_of_another_domain_is_never_taken_for_one_of_onnx(call):
    header = HEADER.replace('"" : ', '"own" : 1, "" : ')
    model = read_model(header + between(f"r = own.{call}"))
    result = model.graph[1].outputs[0]
    result.type, result.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(["batch", 12])
    with pytest.raises(PassError, match="no sharding rule for operators of own; its inputs are sharded along axis 1"):
        Shard(2).run(model)


def test_an_operator_of_onnxruntime_names_the_pass_that_decomposes_it():
    header = HEADER.replace('"" : ', '"com.microsoft" : 1, "" : ')
    with pytest.raises(PassError, match="no sharding rule for operators of com.microsoft; run decompose-contrib first"):
        Shard(2).run(read_model(header + between("r = com.microsoft.QuickGelu(h)")))


def test_the_module_of_the_original_model_is_named():
    model = read_model(HEADER + between("[mine] r = Celu(h)"))
    model.graph[1].metadata_props["passopt.module"] = "model.layers.3.mlp"
    with pytest.raises(PassError, match=r"Celu 'mine' in model\.layers\.3\.mlp: no sharding rule"):
        Shard(2).run(model)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[mine] r = Softmax<axis=-1>(h)", "Softmax 'mine': normalises over axis 1, which is sharded along axis 1"),
        ("[mine] m = ReduceMean(h, last) r = Sub(h, m)", "ReduceMean 'mine': reduces over axis 1, which is sharded"),
        ("[mine] m = ReduceSum(h) r = Sub(h, m)", "ReduceSum 'mine': reduces over axis 1"),
        (
            "[mine] a, b = Split<axis=1>(h, unequal) r = Concat<axis=1>(b, a)",
            "MatMul 'first'|'mine' splits the channels into unequal parts [4, 8]",
        ),
        ("[mine] s = Slice(h, zero, five, last) r = Concat<axis=1>(s, h)", "Slice 'mine': picks elements along axis 1"),
        ("[mine] r = Concat<axis=1>(h, x, x)", "Concat 'mine': joins along axis 1"),
        ("[mine] g = Gather<axis=1>(h, zero) r = Add(h, g)", "Gather 'mine': picks elements along axis 1"),
    ],
)
def test_what_needs_the_whole_axis_is_refused(body, message):
    found = refused(between(body))
    assert all(part in found for part in message.split("|"))


def test_reductions_over_other_axes_are_fine():
    text = between("m = ReduceMean(h, zero) s = Softmax<axis=0>(h) q = Sub(s, m) r = Relu(q)")
    check(Shard(4), HEADER + text, feeds={})


def test_a_product_over_the_sharded_axis_is_reduced():
    text = between("t = Transpose(h) m = MatMul(h, t) w = MatMul(m, h) r = Relu(w)")
    model, _ = check(Shard(4), HEADER + text)
    assert [node.op_type for node in model.graph].count("AllReduce") == 2


def test_unequal_parts_of_a_packed_projection_name_the_pass_to_run():
    text = """
    gqa (float[batch,seq,10] x) => (float[batch,seq,6] q, float[batch,seq,2] k, float[batch,seq,2] v)
    <float[10,10] w = random, int64[3] sizes = {6, 2, 2}> {
        p = MatMul(x, w)
        [cut] q, k, v = Split<axis=-1>(p, sizes)
    }"""
    message = refused(text)
    assert "Split 'cut' splits the channels into unequal parts [6, 2, 2]; run split-packed-qkv" in message
    assert message.startswith("MatMul ")


def test_a_reshape_that_tears_heads_apart_is_refused():
    text = """
    g (float[batch,10] x) => (float[batch,5] y)
    <float[10,12] w = random, int64[3] heads = {0, 3, 4}, int64[3] other = {0, 4, 3}, int64[2] flat = {0,
     12}, float[12,5] o = random> {
        p = MatMul(x, w)
        a = Reshape(p, heads)
        t = Softmax<axis=-1>(a)
        [torn] b = Reshape(t, other)
        s = Softmax<axis=-1>(b)
        f = Reshape(s, flat)
        y = MatMul(f, o)
    }"""
    message = refused(text, Shard(3))
    assert message.startswith("Reshape 'torn': tears apart axis 1")


def test_the_length_of_a_sharded_axis_is_not_given_away():
    text = MLP.replace("(float[batch,5] y)", "(float[batch,5] y, int64[2] s)").replace("y = ", "s = Shape(h) y = ")
    assert refused(text) == "graph output 's' is a shape with lengths of one rank at [1]"


def test_arithmetic_with_a_local_length_is_refused():
    text = MLP.replace("y = MatMul(h, down)", "s = Shape(h) f = Cast<to=1>(s) e = Expand(h, s) y = MatMul(e, down)")
    check(Shard(2), HEADER + text.replace("f = Cast<to=1>(s)", ""))
    text = MLP.replace(
        "y = MatMul(h, down)",
        "s = Shape<start=1, end=2>(h) [mine] f = Cast<to=1>(s) d = Div(h, f) y = MatMul(d, down)",
    )
    reason = "Cast 'mine': computes with the length of a sharded axis, which is no longer an integer. Leave shard out"
    assert refused(text).startswith(reason)


def test_a_model_without_shapes_says_which_value():
    text = MLP.replace("h = MatMul(x, up)", "k = Transpose(x) q = local.mystery(x) h = MatMul(q, up)")
    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>\n'
        + text.replace("random", "{" + ",".join(["1"] * 72) + "}", 1).replace(
            "random", "{" + ",".join(["1"] * 60) + "}"
        )
        + '<opset_import: ["" : 21], domain: "local"> mystery (a) => (b) { b = Relu(a) }'
    )
    with pytest.raises(PassError, match="the shape of q is unknown"):
        Shard(2).run(model)


def test_plan_names_what_blocks_a_degree():
    text = """
    g (int64[batch,seq] input_ids, float[batch,6] x) => (float[batch,seq,6] e, float[batch,5] y)
    <float[10,6] table = random, float[6,12] up = random, float[12,5] down = random> {
        e = Gather(table, input_ids)
        h = MatMul(x, up)
        y = MatMul(h, down)
    }"""
    plan = make_plan(read_model(HEADER + text))
    assert plan.legal_degrees == (2,)
    assert [(group.units, group.example) for group in plan.blockers(3)] == [(10, "table")]
    assert [(group.units, group.tensors) for group in plan.groups] == [(10, 1), (12, 2)]
    assert (plan.all_reduces, plan.all_gathers) == (2, 0)
    message = refused(text, Shard(8), UsageError)
    assert "degree 8 does not divide 10 units of table; 12 units of up. Legal degrees: 2;" in message
