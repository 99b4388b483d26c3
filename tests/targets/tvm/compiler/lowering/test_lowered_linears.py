"""Which kernels linears get, together with what stands before and behind them; numbers against onnxruntime."""

import numpy as np
import pytest

pytest.importorskip("tvm")

RNG = np.random.default_rng(11)
SQUARE = "float[6,6] square = {" + ", ".join(f"{item:.3f}" for item in RNG.standard_normal(36)) + "}"
#: int8 codes of a weight [6, 6] and what quantising rows takes.
QUANTISED = (
    "int8[6,6] codes = {" + ", ".join(str(item) for item in RNG.integers(-127, 128, 36)) + "}, "
    "float[6] scales = {0.1, 0.2, 0.3, 0.2, 0.1, 0.05}, float[6] w = {1, 2, 0.5, 1.5, 1, 0.7}, "
    "float c127 = {127}, float low = {-127}, float zero = {0}, float one = {1}, int64[1] last = {-1}"
)


def quantised_linear(data: str, result: str) -> str:
    """The linear with dynamic activations that `int8{activations=dynamic}` writes, of one tensor."""
    return (
        f"a = Abs ({data})\n m = ReduceMax <keepdims = 1> (a, last)\n d = Div (m, c127)\n e = Equal (d, zero)\n"
        f"s = Where (e, one, d)\n r = Div ({data}, s)\n o = Round (r)\n c = Clip (o, low, c127)\n"
        f"q = Cast <to = 3> (c)\n t = Transpose <perm = [1,0]> (codes)\n i = MatMulInteger (q, t)\n"
        f"f = Cast <to = 1> (i)\n p = Mul (f, s)\n {result} = Mul (p, scales)\n"
    )


NORM = "n = RMSNormalization <axis = -1> (y, w)\n"
HALVES = "y6 = Cast <to = 10> (y)\n x6 = Cast <to = 10> (x)\n w6 = Cast <to = 10> (w)\n"
SWIGLU = "v = Sigmoid (y)\n u = Mul (y, v)\n n = Mul (u, x)\n"
#: body, constants, kernels it takes, kernels that it must not take.
CASES = {
    "residual behind": (
        "h = MatMul (y, square)\n logits = Add (h, x)",
        SQUARE,
        {"linear_float32_6_6_residual"},
        {"add"},
    ),
    "residual before": (
        "h = MatMul (y, square)\n logits = Add (x, h)",
        SQUARE,
        {"linear_float32_6_6_residual"},
        {"add"},
    ),
    "residual of another shape": (
        "h = MatMul (y, square)\n k = ReduceMean <keepdims = 1> (x, last)\n logits = Add (h, k)",
        f"{SQUARE}, int64[1] last = {{1}}",
        {"linear_float32_6_6"},
        {"linear_float32_6_6_residual"},
    ),
    "a linear that others read too": (
        "h = MatMul (y, square)\n g = Add (h, x)\n logits = Mul (g, h)",
        SQUARE,
        {"linear_float32_6_6"},
        {"linear_float32_6_6_residual"},
    ),
    "the sum of two linears": (
        "h = MatMul (y, square)\n k = MatMul (x, square)\n logits = Add (h, k)",
        SQUARE,
        {"linear_float32_6_6", "linear_float32_6_6_residual"},
        {"add"},
    ),
    "a bias that is no residual": (
        "f = Flatten <axis = 2> (y)\n a = Gemm (f, square, bias)\n g = Flatten <axis = 2> (x)\n b = Add (a, g)\n"
        "s = Shape (y)\n logits = Reshape (b, s)",
        f"{SQUARE}, float[6] bias = {{1, 2, 3, 4, 5, 6}}",
        {"linear_float32_6_6"},
        {"linear_float32_6_6_residual"},
    ),
    "norm to codes": (
        NORM + quantised_linear("n", "l") + "logits = Add (l, x)",
        QUANTISED,
        {"rms_norm_6_float32_1e_05_quantized", "linear_w8a8_6_6_residual"},
        {"rms_norm_6_float32_1e_05", "quantize_rows_6"},
    ),
    "SwiGLU to codes": (
        SWIGLU + quantised_linear("n", "logits"),
        QUANTISED,
        {"swiglu_6_quantized", "linear_w8a8_6_6"},
        {"swiglu_6", "quantize_rows_6"},
    ),
    "a norm that others read too": (
        NORM + quantised_linear("n", "l") + "logits = Add (l, n)",
        QUANTISED,
        {"rms_norm_6_float32_1e_05", "quantize_rows_6", "linear_w8a8_6_6_residual"},
        {"rms_norm_6_float32_1e_05_quantized"},
    ),
    "a norm in fp16 to codes, added in fp16": (
        HALVES
        + NORM.replace("n =", "n6 =").replace("y, w", "y6, w6")
        + "n = Cast <to = 1> (n6)\n"
        + quantised_linear("n", "l")
        + "l6 = Cast <to = 10> (l)\n g = Add (x6, l6)\n logits = Cast <to = 1> (g)",
        QUANTISED,
        {"rms_norm_6_float32_1e_05_quantized", "linear_w8a8_6_6_residual"},
        {"rms_norm_6_float32_1e_05", "quantize_rows_6"},
    ),
    "a norm in fp16 that others read too": (
        HALVES
        + NORM.replace("n =", "n6 =").replace("y, w", "y6, w6")
        + "n = Cast <to = 1> (n6)\n"
        + quantised_linear("n", "l")
        + "l6 = Cast <to = 10> (l)\n g = Add (n6, l6)\n k = Add (g, l6)\n"
        "logits = Cast <to = 1> (k)",
        QUANTISED,
        {"rms_norm_6_float32_1e_05", "quantize_rows_6", "linear_w8a8_6_6"},
        {"rms_norm_6_float32_1e_05_quantized", "linear_w8a8_6_6_residual"},
    ),
    "a norm whose shape alone others read": (
        NORM + quantised_linear("n", "l") + "z = Shape (n)\n g = Expand (one, z)\n logits = Add (l, g)",
        QUANTISED,
        {"rms_norm_6_float32_1e_05_quantized", "linear_w8a8_6_6_residual"},
        {"rms_norm_6_float32_1e_05"},
    ),
    "one tensor as input and residual": (
        "h = MatMul (y, square)\n logits = Add (y, h)",
        SQUARE,
        {"linear_float32_6_6_residual"},
        {"add"},
    ),
    "int8 weights and a residual": (
        "t = DequantizeLinear <axis = 0> (codes, scales)\n u = Transpose <perm = [1,0]> (t)\n h = MatMul (y, u)\n"
        "logits = Add (h, x)",
        QUANTISED,
        {"linear_int8_6_6_residual"},
        {"add"},
    ),
    "a sum over ranks between linear and residual": (
        "h = MatMul (y, square)\n s = Sum (h)\n logits = Add (s, x)",
        SQUARE,
        {"linear_float32_6_6"},
        {"linear_float32_6_6_residual"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_and_numbers(both, lowered_text, name):
    body, extra, wanted, unwanted = CASES[name]
    names = {variable.name_hint for variable in lowered_text(body, extra).module.get_global_vars()}
    assert wanted <= names
    assert not unwanted & names
    found, expected = both(body, extra)
    # A code is a 127th of a row's largest element: one that fp16 rounds to its neighbour shows.
    bound = 2e-2 * np.abs(expected).max() if "fp16" in name else 1e-5
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=bound)


UNKNOWN = "int64[1] first = {0}, int64[1] stop = {1}, int64[1] all = {99}, int64[1] axis = {1}"
UNKNOWN_LENGTHS = {
    "residual": (
        "e = Slice (x, first, stop, axis)\n r = Slice (y, first, all, axis)\n k = MatMul (r, square)\n"
        "logits = Add (k, e)",
        f"{SQUARE}, {UNKNOWN}",
    ),
    "SwiGLU": (
        "e = Slice (x, first, stop, axis)\n r = Slice (y, first, all, axis)\n v = Sigmoid (r)\n u = Mul (r, v)\n"
        "logits = Mul (u, e)",
        UNKNOWN,
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_LENGTHS)
def test_two_lengths_that_the_graph_does_not_know_are_not_taken_for_one(lowered_text, name):
    names = {variable.name_hint for variable in lowered_text(*UNKNOWN_LENGTHS[name]).module.get_global_vars()}
    assert not names & {"linear_float32_6_6_residual", "swiglu_6"}
