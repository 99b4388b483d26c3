"""quantize-weights, compared with numpy's own dequantised weights: within 1e-5, not within a loose tolerance."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from passopt.ir.errors import PassError
from passopt.ir.relative_error import operator_error
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'

TRANSPOSED = """
g (float[batch,6] x) => (float[batch,4] y) <float[4,6] w = random> { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""
DIRECT = "g (float[batch,6] x) => (float[batch,4] y) <float[6,4] w = random> { y = MatMul(x, w) }"
MODEL = """
lm (int64[batch,seq] input_ids) => (float[batch,seq,9] logits)
<float[9,6] table = random, float[6,7] up = random, float[7,6] down = random, float[9,6] head = random> {
    x = Gather<axis=0>(table, input_ids)
    u = MatMul(x, up)
    d = MatMul(u, down)
    t = Transpose<perm=[1,0]>(head)
    logits = MatMul(d, t)
}"""
TOKENS = {"input_ids": np.array([[0, 8, 4, 5, 3], [3, 7, 1, 6, 2]])}


def dequantized(weight, axis):
    """absmax/127 per channel in the weight's dtype, codes within ±127, and back; independent of passopt."""
    wide = weight.astype(np.float64)
    scale = (np.abs(wide).max(axis=1 - axis, keepdims=True) / 127).astype(np.float32).astype(weight.dtype)
    codes = np.clip(np.rint(weight.astype(np.float32) / scale.astype(np.float32)), -127, 127)
    return (codes * scale.astype(np.float32)).astype(weight.dtype)


def quantized(text, axes, item=None, feeds=None, bound=1e-5, lossy=2e-2):
    """The quantised model, whose numbers are those of the original with `axes` (weight → axis) dequantised."""
    model = read_model(HEADER + text)
    changed, result = check(item or QuantizeWeights(), model, tolerance=lossy, feeds=feeds)
    twin = model.clone()
    for name, axis in axes.items():
        value = twin.graph.initializers[name]
        value.const_value = LazyWeight(Literal.of(dequantized(value.const_value.numpy(), axis)), name)
    inputs = {**random_feeds(model, {}), **(feeds or {})}
    expected, found, original = (Session(each).run(inputs) for each in (twin, changed, model))
    for name, reference in expected.items():
        assert operator_error(reference, found[name]) <= bound
        assert operator_error(original[name], found[name]) > bound
    return changed, result


def test_weight_becomes_codes_and_scales(check_pass):
    check_pass(QuantizeWeights(), HEADER + TRANSPOSED, tolerance=1e-2, matches=1)


@pytest.mark.parametrize(("text", "axis"), [(TRANSPOSED, 0), (DIRECT, 1)])
def test_one_scale_per_output_channel(text, axis):
    changed, _ = quantized(text, {"w": axis})
    assert changed.graph.initializers["w.scales"].shape == (4,)
    assert changed.graph.initializers["w.codes"].dtype.name == "INT8"
    (node,) = [node for node in changed.graph if node.op_type == "DequantizeLinear"]
    assert node.attributes["axis"].value == 0
    assert changed.graph.initializers["w.codes"].shape == (4, 6)
    assert "w" not in changed.graph.initializers


@pytest.mark.parametrize(("turned", "weight"), [(0, "float[6,4] w"), (1, "float[4,6] w")])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_gemm_becomes_a_matmul_of_codes(turned, weight, bias):
    text = f"g (float[batch,6] x) => (float[batch,4] y) <{weight} = random, float[4] b = {{1, 2, 3, 4}}>"
    text += f"{{ y = Gemm<transB = {turned}>(x, w{bias}) }}"
    changed, _ = quantized(text, {"w": 1 - turned})
    assert changed.graph.initializers["w.codes"].shape == (4, 6)
    expected = ["DequantizeLinear", "Transpose", "MatMul", *(["Add"] if bias else [])]
    assert [node.op_type for node in changed.graph] == expected


@pytest.mark.parametrize("factor", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_declines_a_gemm_that_does_more(factor):
    rows = "6,batch" if "transA" in factor else "batch,6"
    text = f"g (float[{rows}] x) => (float[batch,4] y) <float[6,4] w = random, float[4] b = {{1, 2, 3, 4}}>"
    (reason,) = declined(text + f"{{ [mine] y = Gemm<{factor}>(x, w, b) }}")
    assert reason.startswith("Gemm 'mine' is no plain linear: ")


def test_declines_a_weight_whose_rows_are_contracted_elsewhere():
    text = "g (float[batch,5] x) => (float[batch,5] y, float[batch,5] z) <float[5,5] w = random>"
    assert set(declined(text + "{ y = Gemm<transB=1>(x, w) z = MatMul(x, w) }")) == {
        "w is used by other operators than linears"
    }


def test_fp16_weights_have_fp16_scales():
    text = TRANSPOSED.replace("float[", "float16[")
    changed, _ = quantized(text, {"w": 0}, bound=1e-3, lossy=2e-2)
    assert changed.graph.initializers["w.scales"].dtype.name == "FLOAT16"


def test_bf16_weights_have_bf16_scales():
    model = read_model(
        HEADER + TRANSPOSED.replace("float[", "bfloat16[").replace("random", "{" + ",".join(["16256"] * 24) + "}")
    )
    weight = model.graph.initializers["w"]
    weight.const_value = LazyWeight(Literal.of(np.ones((4, 6), ml_dtypes.bfloat16)), "w")
    assert QuantizeWeights().run(model).matches == 1
    assert model.graph.initializers["w.scales"].dtype.name == "BFLOAT16"


def test_embedding_and_head_stay_by_default():
    changed, result = quantized(MODEL, {"up": 1, "down": 1}, feeds=TOKENS, lossy=3e-2)
    assert {"table", "head"} < set(changed.graph.initializers)
    assert sorted(result.declines) == [
        "head is the head; int8{head=true} includes it",
        "table is an embedding; int8{embedding=true} includes it",
    ]


def test_head_is_included_if_asked_for():
    axes = {"up": 1, "down": 1, "head": 0}
    changed, _ = quantized(MODEL, axes, QuantizeWeights(head=True), TOKENS, lossy=3e-2)
    assert "head.codes" in changed.graph.initializers


def test_embedding_is_looked_up_in_codes_if_asked_for():
    axes = {"up": 1, "down": 1, "table": 0}
    changed, _ = quantized(MODEL, axes, QuantizeWeights(embedding=True), TOKENS, lossy=5e-2)
    assert [node.op_type for node in changed.graph].count("DequantizeLinear") == 2
    assert [node.op_type for node in changed.graph].count("Gather") == 2


def test_a_head_is_a_head_behind_a_bias_and_a_cast():
    text = MODEL.replace(
        "logits = MatMul(d, t)", "m = MatMul(d, t) c = Cast<to=11>(m) a = Cast<to=1>(c) logits = Add(a, a)"
    )
    _, result = quantized(text.replace("Add(a, a)", "Identity(a)"), {"up": 1, "down": 1}, feeds=TOKENS, lossy=3e-2)
    assert "head is the head; int8{head=true} includes it" in result.declines


def test_tied_embedding_and_head_may_differ():
    text = MODEL.replace(", float[9,6] head = random", "").replace("(head)", "(table)")
    model = read_model(HEADER + text)
    changed, _ = check(QuantizeWeights(head=True), model, tolerance=5e-2, feeds=TOKENS)
    assert {"table", "table.codes", "table.scales"} < set(changed.graph.initializers)


def test_a_weight_of_two_linears():
    text = DIRECT.replace("x) =>", "x, float[batch,6] z) =>").replace("[batch,4] y)", "[batch,4] y, float[batch,4] u)")
    changed, result = quantized(text.replace("y = ", "u = MatMul(z, w) y = "), {"w": 1})
    assert result.matches == 2
    assert "w" not in changed.graph.initializers


def test_rows_of_zeros_and_subnormals():
    rows = [[0] * 6, [1e-45, -1e-45, 0, 0, 0, 0], [1e-43, 3e-44, 0, 0, -1e-43, 0], [1, 2, 3, -4, 5, 6]]
    numbers = ", ".join(repr(float(number)) for row in rows for number in row)
    model = read_model(HEADER + TRANSPOSED.replace("random", f"{{{numbers}}}"))
    changed, _ = check(QuantizeWeights(), model, tolerance=1e-2)
    scales = changed.graph.initializers["w.scales"].const_value.numpy()
    codes = changed.graph.initializers["w.codes"].const_value.numpy()
    assert (scales > 0).all()
    assert not codes[0].any()
    assert codes.min() >= -127


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bit_weights_need_opset_19(kind):
    text = TRANSPOSED.replace("float[", f"{kind}[").replace("random", "{" + ",".join(["16256"] * 24) + "}")
    model = read_model(HEADER.replace("21", "18") + text)
    weight = model.graph.initializers["w"]
    weight.const_value = LazyWeight(Literal.of(weight.const_value.numpy()), "w")
    with pytest.raises(PassError, match=r"w and 0 more weights are 16-bit; .* from opset 19 on, this model has 18"):
        QuantizeWeights().run(model)


def test_fp32_weights_are_fine_before_opset_19():
    _, result = check(QuantizeWeights(), HEADER.replace("21", "18") + TRANSPOSED, tolerance=1e-2)
    assert result.matches == 1


def declined(text, item=None, feeds=None):
    _, result = check(item or QuantizeWeights(), HEADER + text, feeds=feeds)
    assert not result.modified
    return list(result.declines)


def test_declines_a_weight_that_other_operators_read():
    text = TRANSPOSED.replace("[batch,4] y)", "[batch,4] y, float[6,4] n)").replace("y = ", "n = Neg(t) y = ")
    assert declined(text) == ["w is used by other operators than linears"]
    text = DIRECT.replace("[batch,4] y)", "[batch,4] y, float[6,4] n)").replace("y = ", "n = Neg(w) y = ")
    assert declined(text) == ["w is used by other operators than linears"]


def test_declines_a_weight_on_the_left():
    text = "g (float[6,seq] x) => (float[4,seq] y) <float[6,4] w = random>"
    text += " { t = Transpose<perm=[1,0]>(w) y = MatMul(t, x) }"
    assert declined(text) == ["w is used by other operators than linears"]


def test_declines_a_transposed_weight_that_nobody_multiplies():
    text = TRANSPOSED.replace("y = MatMul(x, t)", "n = Neg(t) y = MatMul(x, n)")
    assert declined(text) == ["w is used by other operators than linears"]


def test_declines_a_weight_that_is_a_graph_output():
    assert declined(TRANSPOSED.replace("[batch,4] y)", "[batch,4] y, float[6,4] t)")) == ["w is a graph output"]
    assert declined(DIRECT.replace("[batch,4] y)", "[batch,4] y, float[6,4] w)")) == ["w is a graph output"]


def test_declines_other_dtypes_and_ranks(parsed):
    for kind, shape, inside in (("double", "6,4", "6"), ("float", "2,6,4", "6")):
        output = "2,batch,4" if shape.startswith("2") else "batch,4"
        model = parsed(
            f"g ({kind}[batch,{inside}] x, {kind}[{shape}] w) => ({kind}[{output}] y) {{ y = MatMul(x, w) }}"
        )
        value = model.graph.inputs[1]
        model.graph.inputs.remove(value)
        value.const_value = LazyWeight(
            Literal.of(np.ones([int(n) for n in shape.split(",")], kind.replace("float", "float32"))), "w"
        )
        model.graph.register_initializer(value)
        assert QuantizeWeights().run(model).declines == {"w is not a floating matrix": 1}


def test_a_small_constant_is_no_weight():
    text = "g (float[batch,2] x) => (float[batch,2] y)"
    text += " { c = Constant<value = float[2,2] {1, 2, 3, 4}>() y = MatMul(x, c) }"
    assert declined(text) == []


def test_declines_an_embedding_of_another_dtype(parsed):
    text = "g (int64[n] ids) => (int64[n,3] y) <int64[2,3] w = {1, 2, 3, 4, 5, 6}> { y = Gather(w, ids) }"
    model = parsed(text)
    value = model.graph.initializers["w"]
    value.const_value = LazyWeight(Literal.of(value.const_value.numpy()), "w")
    assert QuantizeWeights(embedding=True).run(model).declines == {"w is not a floating matrix": 1}


@pytest.mark.parametrize("opset", [9, 12])
def test_declines_below_opset_13(opset):
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    g (float[b,6] x) => (float[b,5] y) <float[6,5] w = random> {{ y = MatMul(x, w) }}"""
    _, result = check(QuantizeWeights(), text, matches=0)
    assert list(result.declines) == [
        f"one scale per channel needs opset 13, this model has {opset}; run legalize first"
    ]
