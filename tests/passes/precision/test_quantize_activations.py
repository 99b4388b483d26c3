"""quantize-activations, compared with the same arithmetic in numpy: integers exactly, floats within 1e-6."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.graph.linears import find_linear
from passopt.ir.relative_error import operator_error
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
NUMBERS = ", ".join(str((47 * number) % 255 - 127) for number in range(24))
LINEAR = f"""
g (float[batch,3,6] x) => (float[batch,3,4] y)
<int8[4,6] w = {{{NUMBERS}}}, float[4] s = {{0.5, 0.25, 2, 1}}> {{
    d = DequantizeLinear<axis = 0>(w, s)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(x, t)
}}"""
DIRECT = LINEAR.replace("    t = Transpose<perm = [1, 0]>(d)\n", "").replace("(x, t)", "(x, d)")
DIRECT = DIRECT.replace("int8[4,6]", "int8[6,4]").replace("axis = 0", "axis = 1")
#: Query, key and value read one x; the last linear reads another.
SHARED = """
g (float[batch,3,6] x) => (float[batch,3,4] q, float[batch,3,5] k, float[batch,3,7] o)
<float[4,6] wq = random, float[5,6] wk = random, float[7,4] wo = random> {
    tq = Transpose<perm = [1, 0]>(wq)
    q = MatMul(x, tq)
    tk = Transpose<perm = [1, 0]>(wk)
    k = MatMul(x, tk)
    to = Transpose<perm = [1, 0]>(wo)
    o = MatMul(q, to)
}"""


def dynamic(x, codes, scales):
    """Rows quantised by absmax/127, products in integers; independent of passopt."""
    x, scales = np.asarray(x, np.float32), np.asarray(scales, np.float32)
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    step[step == 0] = 1
    rows = np.clip(np.rint(x / step), -127, 127).astype(np.int64)
    return (rows @ codes.T.astype(np.int64)).astype(np.float32) * step * scales


def quantized(text, feeds=None, tolerance=None):
    """The model, what became of it, and its outputs for `feeds`."""
    model = read_model(HEADER + text) if isinstance(text, str) else text
    changed, _ = check(QuantizeActivations(), model, feeds=feeds, tolerance=tolerance)
    return model, changed, Session(changed).run({**random_feeds(model, {}), **(feeds or {})})


def counts(model, *op_types):
    found = [node.op_type for node in model.graph]
    return [found.count(op_type) for op_type in op_types]


def test_codes_are_multiplied_as_integers(check_pass):
    check_pass(QuantizeActivations(), HEADER + LINEAR, matches=1)


@pytest.mark.parametrize(("text", "is_turned"), [(LINEAR, True), (DIRECT, False)])
def test_numbers_are_those_of_the_formula(text, is_turned):
    """Rows of very unlike scale: each has its own."""
    x = np.random.default_rng(1).standard_normal((5, 3, 6)) * np.array([[1e-3], [40], [1]])
    model, changed, found = quantized(text, {"x": x.astype(np.float32)})
    codes = model.graph.initializers["w"].const_value.numpy()
    expected = dynamic(x, codes if is_turned else codes.T, [0.5, 0.25, 2, 1])
    for row in range(3):
        assert operator_error(expected[:, row], found["y"][:, row]) < 1e-6
    assert counts(changed, "DequantizeLinear", "MatMul", "MatMulInteger") == [0, 0, 1]
    linear = find_linear(changed.graph.outputs[0].producer())
    assert (linear.activations, linear.weight.transposed, linear.scales.name) == ("dynamic", is_turned, "s")


def test_rows_of_zeros_and_subnormals_give_zeros():
    x = np.zeros((1, 3, 6), np.float32)
    x[0, 1], x[0, 2, 3] = 1e-44, 4.0
    _, _, found = quantized(LINEAR, {"x": x})
    assert not found["y"][0, :2].any()
    assert found["y"][0, 2].any()


@pytest.mark.parametrize(("sign", "code"), [(1, 127), (-1, 127), (1, -127), (-1, -127)])
def test_sums_are_exact_at_the_extremes(sign, code):
    """13,696 products of ±127: kernels that saturate in 16 bits, or sum in fp32, show here."""
    width = 13696
    codes = np.full((4, width), code, np.int8)
    codes[1, ::2], codes[2, 1] = 1, -code
    x = np.full((2, 3, width), sign * 127, np.float32)
    x[1, 1, 1] *= -1
    model = read_model(HEADER + LINEAR.replace("3,6] x", f"3,{width}] x"))
    weight, scales = (model.graph.initializers[name] for name in "ws")
    weight.shape = onnx_ir.Shape(codes.shape)
    weight.const_value = LazyWeight(Literal.of(codes), "w")
    scales.const_value = onnx_ir.tensor(np.full(4, 2.0**-4, np.float32), name="s")
    for node in model.graph:
        node.outputs[0].shape = None
    _, _, found = quantized(model, {"x": x}, tolerance=1e-5)
    sums = x.astype(np.int64) @ codes.T.astype(np.int64)
    assert np.abs(sums).max() > 2**27
    np.testing.assert_array_equal(found["y"], sums.astype(np.float32) / 16)


def test_linears_of_one_input_share_its_rows():
    model = read_model(HEADER + SHARED)
    QuantizeWeights().run(model)
    changed, result = check(QuantizeActivations(), model)
    assert result.matches == 3
    assert counts(changed, "MatMulInteger", "ReduceMax", "Round", "DequantizeLinear") == [3, 2, 2, 0]
    linears = {item.output.name: item for node in changed.graph if (item := find_linear(node))}
    assert linears["q"].rows == linears["k"].rows != linears["o"].rows


def test_an_fp16_graph_computes_in_fp32():
    """Sums of codes reach 96,774, which fp16 does not hold; one Cast of x serves two linears."""
    text = SHARED.replace("float[", "float16[")
    model = read_model(HEADER + text)
    QuantizeWeights().run(model)
    x = np.full((1, 3, 6), 2.0, np.float16)
    _, changed, found = quantized(model, {"x": x})
    weights = changed.graph.initializers
    expected = dynamic(x, *(weights[f"wq.{part}"].const_value.numpy() for part in ("codes", "scales.fp32")))
    assert operator_error(expected, found["q"]) < 1e-3
    assert found["q"].dtype == np.float16
    assert "wq.scales" not in weights
    assert counts(changed, "MatMulInteger", "Abs", "DequantizeLinear", "Cast") == [3, 2, 0, 3 + 3 + 2 + 2]


def test_a_bf16_graph_is_quantised_like_its_twin():
    codes = LINEAR.replace("float[", "bfloat16[").replace("{0.5, 0.25, 2, 1}", "{16128, 16000, 16384, 16256}")
    model = read_model(HEADER + codes)
    assert QuantizeActivations().run(model).matches == 1
    assert model.graph.outputs[0].producer().op_type == "Cast"
    x = np.random.default_rng(3).standard_normal((2, 3, 6)).astype(ml_dtypes.bfloat16).astype(np.float32)
    found = Session(fp32_twin(model)).run({"x": x})["y"]
    weight = model.graph.initializers["w"].const_value.numpy()
    assert operator_error(dynamic(x, weight, [0.5, 0.25, 2, 1]), found) < 1e-6


def test_a_weight_of_two_linears():
    text = LINEAR.replace("x) =>", "x, float[batch,6] z) =>").replace("4] y)", "4] y, float[batch,4] u)")
    _, changed, _ = quantized(text.replace("    y =", "    u = MatMul(z, t)\n    y ="))
    assert counts(changed, "MatMulInteger", "Abs", "DequantizeLinear") == [2, 2, 0]


def test_activations_that_are_graph_outputs_as_well():
    """The rows may be seen by the caller, and by other operators than linears."""
    model = read_model(HEADER + SHARED)
    QuantizeWeights().run(model)
    assert [value.name for value in model.graph.outputs] == ["q", "k", "o"]
    changed, _ = check(QuantizeActivations(), model)
    assert [value.name for value in changed.graph.outputs] == ["q", "k", "o"]
    text = LINEAR.replace("4] y)", "4] y, float[batch,3,6] m)").replace("    y =", "    m = Abs(x)\n    y =")
    _, changed, _ = quantized(text)
    assert counts(changed, "Abs", "MatMulInteger") == [2, 1]


def test_a_bias_stays_an_addition():
    model = read_model(
        HEADER
        + SHARED.replace("tk = Transpose<perm = [1, 0]>(wk)", "")
        .replace("k = MatMul(x, tk)", "p = MatMul(x, wk) k = Add(p, b)")
        .replace("[5,6] wk", "[6,5] wk")
        .replace("> {", ", float[5] b = {1, 2, 3, 4, 5}> {", 1)
    )
    QuantizeWeights().run(model)
    changed, result = check(QuantizeActivations(), model)
    assert result.matches == 3
    assert changed.graph.outputs[1].producer().op_type == "Add"


def test_nothing_is_done_unless_asked_for():
    model = read_model(HEADER + LINEAR)
    result = QuantizeActivations(activations="none").run(model)
    assert (result.modified, counts(model, "MatMulInteger")) == (False, [0])


def test_axes_are_an_attribute_before_opset_18():
    model = read_model(HEADER.replace("21", "17") + LINEAR)
    changed, result = check(QuantizeActivations(), model)
    assert result.matches == 1
    assert find_linear(changed.graph.outputs[0].producer()).activations == "dynamic"


def declined(text):
    model = read_model(HEADER + text)
    _, result = check(QuantizeActivations(), model)
    assert not result.modified
    return list(result.declines)


def test_declines_codes_with_a_zero_point():
    text = LINEAR.replace("(w, s)", "(w, s, z)").replace("> {", ", int8[4] z = {1, 0, 0, 2}> {")
    assert declined(text) == ["w has a zero point"]


def test_declines_unsigned_codes():
    text = LINEAR.replace("int8[4,6]", "uint8[4,6]").replace(NUMBERS, ", ".join("7" * 24))
    assert declined(text) == ["w is UINT8, expected int8"]


def test_declines_scales_along_the_contraction_and_a_single_one():
    text = LINEAR.replace("axis = 0", "axis = 1").replace("float[4] s", "float[6] s").replace("2, 1}", "2, 1, 1, 1}")
    reason = "w is no constant matrix with one scale per output channel"
    assert declined(text) == [reason]
    text = LINEAR.replace("float[4] s", "float s").replace("{0.5, 0.25, 2, 1}", "{0.5}")
    assert declined(text) == [reason]


def test_declines_codes_that_are_computed():
    text = LINEAR.replace("float[batch,3,6] x", "float[batch,3,6] x, int8[4,6] w")
    text = text.replace(f"int8[4,6] w = {{{NUMBERS}}}, ", "")
    assert declined(text) == ["w is no constant matrix with one scale per output channel"]


@pytest.mark.parametrize("value", ["d", "t"])
def test_declines_a_weight_that_is_a_graph_output(value):
    shape = "4,6" if value == "d" else "6,4"
    text = LINEAR.replace("4] y)", f"4] y, float[{shape}] {value})")
    assert declined(text) == ["w is a graph output once dequantised"]


@pytest.mark.parametrize("value", ["d", "t"])
def test_declines_a_weight_that_other_operators_read(value):
    shape = "4,6" if value == "d" else "6,4"
    text = LINEAR.replace("4] y)", f"4] y, float[{shape}] n)").replace(
        "    y =", f"    [mine] n = Neg({value})\n    y ="
    )
    assert declined(text) == ["w is used dequantised by Neg 'mine'"]


def test_declines_what_int32_does_not_hold():
    width = 132_105
    model = read_model(HEADER + LINEAR.replace("3,6] x", f"3,{width}] x"))
    weight = model.graph.initializers["w"]
    weight.shape = onnx_ir.Shape((4, width))
    weight.const_value = LazyWeight(Literal.of(np.ones((4, width), np.int8)), "w")
    for node in model.graph:
        node.outputs[0].shape = None
    result = QuantizeActivations().run(model)
    assert list(result.declines) == ["w contracts 132105 channels; int32 holds sums of 132,104"]


def test_declines_an_input_of_unknown_dtype():
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[n,6] x) => (float[?,?] y)
        <int8[6,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[2] s = {0.5, 0.25}> {
        z = local.f(x)
        d = DequantizeLinear<axis = 1>(w, s) y = MatMul(z, d) }"""
    result = QuantizeActivations().run(read_model(text))
    assert list(result.declines) == ["the dtype of z is unknown"]
