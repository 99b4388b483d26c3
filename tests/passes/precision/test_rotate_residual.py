"""rotate-residual: the same function in every spelling of a stream, and an error at everything that is not known."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.decoder import ROTATION
from passopt.ir.serialization.text import print_model
from passopt.ir.weights import rotation
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.precision.rotate_residual import RotateResidual
from passopt.testing.checking import check, compare_numbers, read_model
from passopt.verification.rewrites.check import NumericCheck

WEIGHTS = """float[9,12] embed = random, float[12] g0 = random, float[7,12] up = random, float[7,12] gate = random,
    float[7,12] down = random, float[12] b = random, float[12] gf = random, float[9,12] head = random,
    float[5,12] table = random, float two = {2.0}, float[1] zero = {0.0}, float[12,12] square = random"""
START = "x0 = Gather(embed, ids)"
NORM = "n0 = RMSNormalization(x0, g0)"
READERS = "gt = Transpose<perm=[1,0]>(gate) ut = Transpose<perm=[1,0]>(up) g = MatMul(n0, gt) u = MatMul(n0, ut)"
MLP = "s = Sigmoid(g) h = Mul(s, u)"
WRITER = "d = MatMul(h, down) x1 = Add(x0, d)"
END = "nf = RMSNormalization(x1, gf)"
HEAD = "ht = Transpose<perm=[1,0]>(head) logits = MatMul(nf, ht)"
PARTS = {"start": START, "norm": NORM, "readers": READERS, "mlp": MLP, "writer": WRITER, "end": END, "head": HEAD}


def text(outputs="", inputs="", **parts):
    """A decoder layer without attention, of 12 channels, some parts of which are spelled otherwise."""
    assert parts.keys() <= PARTS.keys()
    body = " ".join({**PARTS, **parts}.values())
    return (
        f'<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]> '
        f"g (int64[batch,seq] ids{inputs}) => (float[batch,seq,9] logits{outputs}) <{WEIGHTS}> {{ {body} }}"
    )


def rotated(source, **settings):
    model, result = check(RotateResidual(), source, **settings)
    assert result.modified
    return model


def test_embedding_norms_and_linears_turn_together(check_pass):
    check_pass(RotateResidual(), text(), matches=7)


SPELLINGS = {
    "a bias of a sum": {"writer": "d = MatMul(h, down) e = Add(d, b) x1 = Add(e, x0)"},
    "a difference": {"writer": "d = MatMul(h, down) x1 = Sub(x0, d)"},
    "a product with a number": {"start": "e = Gather(embed, ids) x0 = Mul(two, e)"},
    "a quotient by a number": {"start": "e = Gather(embed, ids) x0 = Div(e, two)"},
    "a product with a number per position": {
        "writer": "m = MatMul(h, down) last = Constant<value_ints=[-1]>() r = ReduceSum(h, last) d = Mul(r, m) "
        "x1 = Add(x0, d)"
    },
    "a mask of rows": {
        "start": "e = Gather(embed, ids) last = Constant<value_ints=[-1]>() one = Constant<value_int=1>() "
        "w = Greater(ids, one) m = Unsqueeze(w, last) x0 = Where(m, e, zero)"
    },
    "two embeddings": {
        "start": "e = Gather(embed, ids) four = Constant<value_int=4>() i = Min(ids, four) p = Gather(table, i) "
        "x0 = Add(e, p)"
    },
    "identities and casts": {
        "start": "e = Gather(embed, ids) f = Cast<to=1>(e) x0 = Identity(f)",
        "end": "c = RMSNormalization(x1, gf) nf = Identity(c)",
    },
    "a reader without a norm": {"norm": "n0 = Identity(x0)"},
    "a linear of the stream to itself": {"writer": "d = MatMul(x0, square) x1 = Add(x0, d) o = Identity(u)"},
    "a shared norm": {"end": "nf = RMSNormalization(x1, g0)"},
    "an embedding that is the head": {"head": "ht = Transpose<perm=[1,0]>(embed) logits = MatMul(nf, ht)"},
    "a weight of two linears": {"readers": "gt = Transpose<perm=[1,0]>(gate) g = MatMul(n0, gt) u = MatMul(n0, gt)"},
    "the lengths of the stream": {"norm": "s0 = Shape(x0) z = RMSNormalization(x0, g0) n0 = Identity(z)"},
}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_spellings_of_a_stream(spelling):
    rotated(text(**SPELLINGS[spelling]))


def test_gemms_with_and_without_a_bias():
    parts = {"writer": "d = Gemm(h, down, b) x1 = Add(x0, d)", "head": "logits = Gemm<transB=1>(nf, head)"}
    model = rotated(text(**parts).replace("batch,", ""))
    assert {"down.rotated", "b.rotated", "head.rotated"} <= set(model.graph.initializers)


def test_positions_may_be_picked():
    ends = "from = Constant<value_ints=[-1]>() to = Constant<value_ints=[9223372036854775807]>() "
    ends += "axis = Constant<value_ints=[1]>() "
    for end in (
        "v = Slice(x1, from, to, axis) nf = RMSNormalization(v, gf)",
        "v = RMSNormalization(x1, gf) nf = Slice(v, from, to, axis)",
    ):
        source = text(end=ends + end).replace("float[batch,seq,9] logits", "float[batch,1,9] logits")
        rotated(source)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rotated_in_fp32_and_rounded_once(dtype):
    source = text().replace("float[", f"{dtype}[").replace("float two = {2.0}", f"{dtype} two = {{2}}")
    source = source.replace("zero = {0.0}", "zero = {0}")
    model = read_model(source)
    RotateResidual().run(model)
    weight = expression_of(model.graph.initializers["up.rotated"])
    assert weight.text().startswith("cast(rotate(scale(cast(") or dtype == "float16"
    assert weight.dtype == model.graph.initializers["embed.rotated"].dtype
    if dtype == "float16":
        compare_numbers(read_model(source), model, 5e-3, {}, {})


def test_a_tied_table_becomes_two_weights():
    model = rotated(text(**SPELLINGS["an embedding that is the head"]))
    assert {"embed.rotated", "embed.rotated.2"} <= set(model.graph.initializers)
    assert "embed" not in model.graph.initializers


def test_a_shared_weight_stays_one():
    model = rotated(text(**SPELLINGS["a weight of two linears"]))
    assert [name for name in model.graph.initializers if name.startswith("gate")] == ["gate.rotated"]


def test_no_channel_stands_out_afterwards():
    model = read_model(text())
    table = expression_of(model.graph.initializers["embed"])
    RotateResidual().run(model)
    with Evaluator() as evaluator:
        before, after = (
            evaluator.array(weight) for weight in (table, expression_of(model.graph.initializers["embed.rotated"]))
        )
    assert np.allclose((before**2).sum(axis=1), (after**2).sum(axis=1), rtol=1e-5)
    assert not np.allclose(before, after, atol=0.1)


def test_values_of_the_stream_get_other_names():
    """They hold other numbers, and the numeric check identifies values by their names."""
    model = rotated(text())
    names = {value.name for node in model.graph for value in node.outputs}
    assert {"x0.rotated", "n0.rotated", "d.rotated", "x1.rotated", "nf.rotated", "g", "u", "h", "logits"} <= names
    assert not {"x0", "n0", "x1", "nf"} & names


def test_numeric_checks_hold_at_every_reader():
    model, numeric = read_model(text()), NumericCheck()
    run_passes(model, [RotateResidual()], instruments=[numeric])
    assert numeric.summaries[0].sites == 3
    assert not numeric.summaries[0].unchecked


def test_a_second_seed_is_refused():
    model = read_model(text())
    RotateResidual(seed=4).run(model)
    assert model.metadata_props[ROTATION] == "4"
    assert "seed=4" in expression_of(model.graph.initializers["embed.rotated"]).text()
    with pytest.raises(UsageError, match="rotated already, by seed 4, asked for 0"):
        RotateResidual().run(model)


REFUSED = {
    "other_norms": (
        {"end": "nf = LayerNormalization(x1, gf)"},
        "the head reads LayerNormalization .*, expected an RMSNormalization; LayerNormalization subtracts",
    ),
    "norms_in_parts": (
        {"norm": "q = Mul(x0, x0) r = ReduceMean(q) t = Sqrt(r) n0 = Div(x0, t)"},
        "Mul .* reads x0, the stream, expected an RMSNormalization, a linear or a sum; run the pipeline fuse",
    ),
    "no_norm": (
        {"end": "nf = Relu(x1)"},
        "the head reads Relu .*, expected an RMSNormalization; run the pipeline fuse",
    ),
    "other_readers": ({"norm": "n0 = Relu(x0)"}, "Relu .* reads x0, the stream, expected"),
    "readers_behind_a_norm": (
        {"norm": "m0 = RMSNormalization(x0, g0) n0 = Relu(m0)"},
        "Relu .* reads m0, RMSNormalization .* of the stream, expected a linear",
    ),
    "products_with_a_vector": ({"start": "e = Gather(embed, ids) x0 = Mul(e, b)"}, "Mul .* makes x0 of the stream"),
    "norms_behind_a_writer": (
        {"writer": "m = MatMul(h, down) d = RMSNormalization(m, b) x1 = Add(x0, d)"},
        "is added to the stream: its weight cannot be folded",
    ),
    "norms_of_norms": ({"norm": "m0 = RMSNormalization(x0, g0) n0 = RMSNormalization(m0, b)"}, "expected a linear"),
    "sums_behind_a_norm": ({"norm": "m0 = RMSNormalization(x0, g0) n0 = Add(m0, b)"}, "whose weight cannot be folded"),
    "an_output": ({"outputs": ", float[batch,seq,12] x1"}, "x1 is an output of the graph"),
    "an_input": (
        {"inputs": ", float[batch,seq,12] y", "start": "e = Gather(embed, ids) x0 = Add(e, y)"},
        "y holds the stream and is an input of the graph",
    ),
    "a_computed_scale": (
        {"norm": "q = Mul(g0, two) n0 = RMSNormalization(x0, q)"},
        r"has q \[12\], expected a constant \[12\]; run fold-constants first",
    ),
    "a_computed_weight": (
        {"head": "q = Mul(head, two) ht = Transpose<perm=[1,0]>(q) logits = MatMul(nf, ht)"},
        "its weight is computed by Mul .*; run fold-constants first",
    ),
    "a_normalised_head": (
        {"head": "l = ReduceL2(head) q = Div(head, l) ht = Transpose<perm=[1,0]>(q) logits = MatMul(nf, ht)"},
        "its weight is computed by Div .*; run fold-norm-head first",
    ),
    "a_sum_with_a_number": (
        {"start": "e = Gather(embed, ids) x0 = Add(e, two)"},
        "Add .* makes x0 of the stream, .*; it adds neither parts of the stream nor a constant of its width",
    ),
    "a_sum_with_something_narrow": (
        {"writer": "last = Constant<value_ints=[-1]>() r = ReduceSum(h, last) x1 = Add(x0, r)"},
        r"r has the shape .*, 1\] and the dtype FLOAT, expected floats with 12 channels on the last axis",
    ),
    "slices_of_channels": (
        {
            "norm": "m0 = RMSNormalization(x0, g0) a = Constant<value_ints=[0]>() z = Constant<value_ints=[12]>() "
            "c = Constant<value_ints=[-1]>() n0 = Slice(m0, a, z, c)"
        },
        "Slice .* reads m0",
    ),
    "other_axes": ({"norm": "n0 = RMSNormalization<axis=1>(x0, g0)"}, "normalises from axis 1 on, expected the last"),
    "a_product_of_two_values": (
        {
            "writer": "d = MatMul(h, down) t = Transpose<perm=[0,2,1]>(x0) p = MatMul(x0, t) "
            "l = Constant<value_ints=[-1]>() r = ReduceSum(p, l) k = Mul(d, r) x1 = Add(x0, k)"
        },
        "reads x0, the stream",
    ),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_refuses(what):
    parts, message = REFUSED[what]
    model = read_model(text(**parts))
    before = print_model(model)
    with pytest.raises(PassError, match=message):
        RotateResidual().run(model)
    assert print_model(model) == before


def test_refuses_quantised_weights():
    model = read_model(text())
    QuantizeWeights().run(model)
    with pytest.raises(PassError, match=r"has the quantised weight (gate|up|down)\.codes; rotate before int8"):
        RotateResidual().run(model)
    run_passes(model := read_model(text()), resolve("rotate,int8{activations=dynamic}").passes)
    assert sum(node.op_type == "MatMulInteger" for node in model.graph) == 3


def test_refuses_graphs_without_a_head():
    model = read_model(text().replace("logits", "y"))
    with pytest.raises(PassError, match="found no head: the output logits does not come from a linear"):
        RotateResidual().run(model)


def test_refuses_a_body_that_reads_the_stream():
    branch = "(float[batch,seq,12] o) {{ o = {}(x0) }}"
    branches = f"then_branch = a () => {branch.format('Relu')}, else_branch = c () => {branch.format('Abs')}"
    model = read_model(
        text(norm=f"f = Constant<value_int=1>() t = Cast<to=9>(f) n0 = If<{branches}>(t) k = RMSNormalization(x0, g0)")
    )
    with pytest.raises(PassError, match="reads x0 inside of a body; inline it first"):
        RotateResidual().run(model)


def test_refuses_widths_without_a_fast_rotation(monkeypatch):
    monkeypatch.setattr(rotation, "LARGEST_FACTOR", 1)
    with pytest.raises(PassError, match="the stream has no fast rotation: 12 has the odd factor 3"):
        RotateResidual().run(read_model(text()))


@pytest.mark.parametrize("degree", [2, 4])
def test_shards_are_the_same_in_both_orders(degree):
    """Codes, too: each rank writes equal bytes whether it was sharded before or after."""
    weights = []
    for order in (
        "rotate,{},int8{{activations=dynamic}}",
        "{},rotate,int8{{activations=dynamic}}",
        "rotate,int8{{activations=dynamic}},{}",
    ):
        model = read_model(text(writer="d = MatMul(h, down) e = Add(d, b) x1 = Add(x0, e)"))
        original = model.clone()
        run_passes(model, resolve(order.format(f"tp{{degree={degree},pad=true}}")).passes)
        compare_numbers(original, _joined(model), 0.1, {}, {})
        found = [expression_of(value) for value in model.graph.initializers.values() if value.const_value is not None]
        weights.append(sorted(item.text() for item in found if item is not None and "rotate" in item.text()))
    assert weights[0] == weights[1] == weights[2]
    assert len(weights[0]) >= 8


def _joined(model: onnx_ir.Model) -> onnx_ir.Model:
    from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models

    return join_ranks(rank_models(model))
