"""What is found of linears in every spelling, and what is not taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.linears import find_linear, find_rows, find_weight, quantized_rows_of
from passopt.ir.graph.verifier import verify_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.testing.checking import read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
FLOAT = "g (float[b,3,6] x) => (float[b,3,4] y) <float[{shape}] w = random> {{ {body} }}"
CODES = """
g (float[b,3,6] x) => (float[b,3,4] y)
<int8[{shape}] codes = {{{numbers}}}, float[4] scales = {{1, 2, 3, 4}}> {{ {body} }}"""
NUMBERS = ", ".join(str(number - 12) for number in range(24))
ROWS = """
    magnitude = Abs(x)
    largest = ReduceMax<keepdims = 1>(magnitude, last)
    quotient = Div(largest, most)
    is_zero = Equal(quotient, zero)
    step = Where(is_zero, one, quotient)
    ratio = Div(x, step)
    nearest = Round(ratio)
    bounded = Clip(nearest, lowest, most)
    rows = Cast<to = 3>(bounded)"""
PRODUCT = """
    turned = Transpose<perm = [1, 0]>(codes)
    sums = MatMulInteger(rows, turned)
    wide = Cast<to = 1>(sums)
    product = Mul(wide, step)
    y = Mul(product, scales)"""
DYNAMIC = f"""
g (float[b,3,6] x) => (float[b,3,4] y)
<int8[4,6] codes = {{{NUMBERS}}}, float[4] scales = {{1, 2, 3, 4}}, float most = {{127}}, float lowest = {{-127}},
 float one = {{1}}, float zero = {{0}}, int64[1] last = {{-1}}> {{{ROWS}{PRODUCT}
}}"""


def model_of(text):
    model = read_model(HEADER + text)
    verify_model(model)
    return model


def found_in(text):
    """All linears of a graph, by the name of the output."""
    linears = [find_linear(node) for node in model_of(text).graph]
    return {item.output.name: item for item in linears if item is not None}


def matrix(expression):
    with Evaluator() as evaluator:
        return evaluator.array(expression)


@pytest.mark.parametrize(
    ("shape", "body", "transposed"),
    [
        ("4,6", "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", True),
        ("4,6", "t = Transpose(w) y = MatMul(x, t)", True),
        ("6,4", "y = MatMul(x, w)", False),
    ],
)
def test_a_float_weight_in_either_layout(shape, body, transposed):
    linear = found_in(FLOAT.format(shape=shape, body=body))["y"]
    assert (linear.input.name, linear.weight.value.name, linear.activations) == ("x", "w", "float")
    assert (linear.weight.transposed, linear.weight.channels, linear.scales, linear.bias) == (transposed, 4, None, None)
    stored = linear.weight.value.const_value.numpy()
    np.testing.assert_array_equal(matrix(linear.weight.expression()), stored if transposed else stored.T)
    assert [node.op_type for node in linear.nodes] == [*(["Transpose"] if transposed else []), "MatMul"]


@pytest.mark.parametrize(
    ("shape", "body", "transposed"),
    [
        ("4,6", "w = DequantizeLinear<axis = 0>(codes, scales) t = Transpose(w) y = MatMul(x, t)", True),
        ("6,4", "w = DequantizeLinear<axis = 1>(codes, scales) y = MatMul(x, w)", False),
        ("6,4", "w = DequantizeLinear(codes, scales) y = MatMul(x, w)", False),
    ],
)
def test_a_weight_of_codes(shape, body, transposed):
    linear = found_in(CODES.format(shape=shape, numbers=NUMBERS, body=body))["y"]
    assert (linear.weight.value.name, linear.scales.name, linear.activations) == ("codes", "scales", "float")
    assert (linear.weight.transposed, linear.weight.expression().shape) == (transposed, (4, 6))
    np.testing.assert_array_equal(matrix(linear.scales_expression()), [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ("4,6", "w = DequantizeLinear<axis = 0>(codes, scales, zeros) t = Transpose(w) y = MatMul(x, t)"),
        ("6,6", "w = DequantizeLinear<axis = 0>(codes, six) y = MatMul(x, w)"),
        ("6,4", "w = DequantizeLinear(codes, single) y = MatMul(x, w)"),
    ],
    ids=["zero point", "along the contraction", "one scale"],
)
def test_codes_of_another_kind_are_no_weight(shape, body):
    numbers = ", ".join(["1"] * (36 if shape == "6,6" else 24))
    text = CODES.format(shape=shape, numbers=numbers, body=body)
    text = text.replace(
        "> {", ", int8[4] zeros = {0, 0, 0, 0}, float[6] six = {1, 1, 1, 1, 1, 1}, float single = {1}> {"
    )
    if shape == "6,6":
        text = text.replace("[b,3,4] y", "[b,3,6] y")
    assert found_in(text) == {}


@pytest.mark.parametrize(("turned", "shape"), [(0, "6,4"), (1, "4,6")])
def test_a_gemm_with_its_bias(turned, shape):
    text = f"g (float[b,6] x) => (float[b,4] y) <float[{shape}] w = random, float[4] c = {{1, 2, 3, 4}}>"
    linear = found_in(text + f"{{ y = Gemm<transB = {turned}>(x, w, c) }}")["y"]
    assert (linear.bias.name, linear.weight.transposed, linear.weight.channels) == ("c", bool(turned), 4)


@pytest.mark.parametrize("factor", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_a_gemm_with_factors_is_none(factor):
    rows = "6,b" if "transA" in factor else "b,6"
    text = f"g (float[{rows}] x) => (float[b,4] y) <float[6,4] w = random, float[4] c = {{1, 2, 3, 4}}>"
    assert found_in(text + f"{{ y = Gemm<{factor}>(x, w, c) }}") == {}


def test_products_of_computed_values_have_no_weight():
    text = "g (float[b,6] x, float[6,4] w) => (float[b,4] y) { y = MatMul(x, w) }"
    (node,) = model_of(text).graph
    assert find_weight(node) is None


def test_dynamic_activations():
    found = found_in(DYNAMIC)
    assert list(found) == ["y"]
    linear = found["y"]
    assert (linear.input.name, linear.weight.value.name, linear.scales.name) == ("x", "codes", "scales")
    assert (linear.activations, linear.rows.codes.name, linear.rows.scales.name) == ("dynamic", "rows", "step")
    assert linear.weight.transposed
    assert [node.outputs[0].name for node in linear.nodes] == [node.outputs[0].name for node in model_of(DYNAMIC).graph]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mul(product, scales)", "Mul(scales, product)"),
        ("Mul(wide, step)", "Mul(step, wide)"),
        ("Equal(quotient, zero)", "Equal(zero, quotient)"),
        ("last = {-1}", "last = {2}"),
    ],
)
def test_factors_in_any_order(old, new):
    assert old in DYNAMIC
    assert found_in(DYNAMIC.replace(old, new))["y"].activations == "dynamic"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Abs(x)", "Neg(x)"),
        ("keepdims = 1>(magnitude, last)", "keepdims = 1>(magnitude)"),
        ("last = {-1}", "last = {1}"),
        ("Div(largest, most)", "Div(largest, one)"),
        ("Equal(quotient, zero)", "Equal(quotient, one)"),
        ("Where(is_zero, one, quotient)", "Where(is_zero, quotient, one)"),
        ("Div(x, step)", "Div(magnitude, step)"),
        ("Round(ratio)", "Floor(ratio)"),
        ("Clip(nearest, lowest, most)", "Clip(nearest, zero, most)"),
        ("Clip(nearest, lowest, most)", "Clip(nearest, lowest)"),
        ("Mul(wide, step)", "Mul(wide, quotient)"),
        ("MatMulInteger(rows, turned)", "MatMulInteger(rows, turned, none)"),
        ("Mul(product, scales)", "Mul(product, one)"),
        ("Mul(product, scales)", "Add(product, scales)"),
    ],
)
def test_anything_else_is_no_dynamic_linear(old, new):
    assert old in DYNAMIC
    text = DYNAMIC.replace(old, new).replace("> {", ", int8 none = {0}> {", 1)
    assert found_in(text) == {}


def test_rows_that_a_value_has_already():
    model = model_of(DYNAMIC)
    data, rows = model.graph.inputs[0], next(node for node in model.graph if node.outputs[0].name == "rows")
    found = quantized_rows_of(data)
    assert found == find_rows(rows.outputs[0])
    assert quantized_rows_of(model.graph.outputs[0]) is None
