"""shard on linears with dynamic activations: the ranks joined against numpy, where each rank quantises its own part."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from passopt.ir.errors import PassError
from passopt.ir.relative_error import operator_error
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.shard import Shard
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
MLP = """
mlp (float[batch,3,6] x) => (float[batch,3,5] y)
<float[8,6] up = random, float[8,6] gate = random, float[5,8] down = random> {
    up_t = Transpose<perm=[1,0]>(up)
    gate_t = Transpose<perm=[1,0]>(gate)
    down_t = Transpose<perm=[1,0]>(down)
    u = MatMul(x, up_t)
    g = MatMul(x, gate_t)
    s = Sigmoid(g)
    h = Mul(u, s)
    y = MatMul(h, down_t)
}"""
DYNAMIC = "int8{activations=dynamic}"


def quantized(text=MLP):
    model = read_model(HEADER + text)
    QuantizeWeights(head=True).run(model)
    QuantizeActivations().run(model)
    return model


def numpy_linear(x, codes, scales):
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    step[step == 0] = 1
    rows = np.clip(np.rint(x / step), -127, 127).astype(np.int64)
    return (rows @ codes.T.astype(np.int64)).astype(np.float32) * step * scales


def numpy_mlp(model, x, parts):
    """`parts`: the channels of h that each rank holds."""
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if "." in name}
    weights = {name: (arrays[f"{name}.codes"], arrays[f"{name}.scales"]) for name in ("up", "gate", "down")}
    up, gate = (numpy_linear(x, *weights[name]) for name in ("up", "gate"))
    h = (up / (1 + np.exp(-gate))).astype(np.float32)
    codes, scales = weights["down"]
    return sum(numpy_linear(h[..., part], codes[:, part], scales) for part in parts)


@pytest.mark.parametrize(
    ("degree", "parts"),
    [
        (1, [slice(0, 8)]),
        (2, [slice(0, 4), slice(4, 8)]),
        (4, [slice(start, start + 2) for start in range(0, 8, 2)]),
        (3, [slice(0, 3), slice(3, 6), slice(6, 8)]),
    ],
)
def test_each_rank_quantises_its_part_of_a_row(degree, parts):
    model = quantized()
    changed, _ = check(Shard(degree, pad=True), model, tolerance=2e-2) if degree > 1 else (model, None)
    joined = join_ranks(rank_models(changed)) if degree > 1 else changed
    feeds = random_feeds(model, {"batch": 4})
    feeds["x"] *= np.array([[1e-3], [1], [3]], np.float32)
    expected = numpy_mlp(model, feeds["x"], parts)
    found = Session(joined).run(feeds)["y"]
    for row in range(3):
        assert operator_error(expected[:, row], found[:, row]) < 1e-5
    if degree == 2:
        assert operator_error(numpy_mlp(model, feeds["x"], [slice(0, 8)]), found) > 1e-4


def test_partial_sums_meet_as_numbers(check_pass):
    model = quantized()
    assert [str(model.graph.outputs[0].shape), model.graph.outputs[0].producer().op_type] == ["[batch,3,5]", "Mul"]
    changed, _ = check_pass(Shard(2), model, tolerance=2e-2)
    (reduce,) = [node for node in changed.graph if node.op_type == "AllReduce"]
    assert reduce.inputs[0].producer().op_type == "Mul"
    assert reduce.inputs[0].producer().inputs[1].name == "down.scales"


def test_fp16_is_reduced_in_fp16():
    changed, _ = check(Shard(2), quantized(MLP.replace("float[", "float16[")), tolerance=2e-2)
    (reduce,) = [node for node in changed.graph if node.op_type == "AllReduce"]
    assert reduce.inputs[0].producer().op_type == "Cast"
    assert reduce.inputs[0].dtype.name == "FLOAT16"


def written(model):
    """The bytes of every weight on every rank."""
    found = {}
    for rank, part in enumerate(rank_models(model)):
        with Evaluator(rank) as evaluator:
            for name, value in part.graph.initializers.items():
                found[rank, name] = evaluator.array(expression_of(value)).tobytes()
    return found


@pytest.mark.parametrize("degree", [2, 4])
def test_orders_of_tp_and_int8_give_the_same_ranks(degree):
    orders = []
    for pipeline in (f"tp{{degree={degree},pad=true}},{DYNAMIC}", f"{DYNAMIC},tp{{degree={degree},pad=true}}"):
        model = tiny_decoder(DecoderSpec())
        run_passes(model, resolve(pipeline).passes)
        orders.append(model)
    kinds = [collections.Counter(node.op_type for node in model.graph) for model in orders]
    assert kinds[0] == kinds[1]
    assert kinds[0]["MatMulInteger"] > 2
    assert not kinds[0]["DequantizeLinear"]
    weights = [written(model) for model in orders]
    large = [{content for content in each.values() if len(content) > 64} for each in weights]
    assert large[0] == large[1]


def refused(text):
    model = read_model(HEADER + text)
    with pytest.raises(PassError) as error:
        Shard(2).run(model)
    return str(error.value)


def test_refuses_what_differs_between_ranks():
    model = quantized()
    rows = next(node for node in model.graph if node.op_type == "MatMulInteger" and node.inputs[0].name.startswith("h"))
    model.graph.outputs.append(rows.inputs[0])
    with pytest.raises(PassError, match=r"the caller reads h.cast, which each rank computes of its own part of a row"):
        Shard(2).run(model)


def test_refuses_a_reader_of_local_scales():
    model = quantized(
        MLP.replace("5] y)", "5] y, float[batch,3,1] n)")
        .replace("y = MatMul", "[mine] n = Neg(x1) y = MatMul")
        .replace("x) =>", "x, float[batch,3,1] x1) =>")
    )
    largest = next(node for node in model.graph if node.op_type == "ReduceMax" and node.inputs[0].name == "h.abs")
    mine = next(node for node in model.graph if node.name == "mine")
    model.graph.remove(mine)
    model.graph.insert_after(largest, mine)
    mine.replace_input_with(0, largest.outputs[0])
    with pytest.raises(PassError, match="Neg 'mine' reads h.reducemax, which each rank computes of its own part"):
        Shard(2).run(model)


def test_refuses_integer_products_of_another_kind():
    text = """
    g (float[batch,6] x, int8[batch,8] m) => (int32[batch,5] y)
    <float[6,8] up = random, int8[8,5] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
     21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40}> {
        u = MatMul(x, up)
        c = Cast<to = 3>(u)
        y = MatMulInteger(c, w)
    }"""
    assert "expected rows quantised as quantize-activations does" in refused(text)


def test_integer_products_of_replicated_values_stay_whole():
    text = """
    g (float[batch,6] x, int8[batch,8] m) => (float[batch,4] u, int32[batch,1] y)
    <float[6,4] up = random, int8[8,1] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
        u = MatMul(x, up)
        y = MatMulInteger(m, w)
    }"""
    changed, _ = check(Shard(2), HEADER + text)
    assert list(changed.graph.initializers["w"].shape) == [8, 1]
