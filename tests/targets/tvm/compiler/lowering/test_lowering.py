"""Each operator lowered, compiled and run against onnxruntime, with symbolic lengths and unequal dimensions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.targets.tvm.compiler.lowering.graph import lower
from passopt.targets.tvm.compiler.lowering.registry import CONVERTERS
from passopt.targets.tvm.compiler.relax_steps import run_steps, steps
from passopt.targets.tvm.machines import find_cpu

relax = pytest.importorskip("tvm.relax")

OPERATORS = {
    "cast like another": (
        "i = Cast <to = 7> (x)\n a = CastLike (y, i)\n b = CastLike (a, y)\n logits = Add (b, x)",
        "",
    ),
    "sequence": (
        "p = SplitToSequence <axis = 2> (y, two)\n a = SequenceAt (p, last)\n b = SequenceAt (p, first)\n"
        "logits = Concat <axis = 2> (a, b)",
        "int64 two = {4}, int64 last = {-1}, int64 first = {0}",
    ),
    "by the importer": ("a = Softplus (y)\n b = HardSwish (a)\n logits = Add (a, b)", ""),
    "integers divided": (
        "a = Div (input_ids, two)\n b = Cast <to = 1> (a)\n c = Unsqueeze (b, axes)\n logits = Add (y, c)",
        "int64 two = {2}, int64[1] axes = {2}",
    ),
    "plain": (
        "logits = Add (y, x)",
        "",
    ),
    "arithmetic": (
        "a = Mul (y, x)\n b = Sub (a, y)\n c = Div (b, two)\n logits = Pow (c, two)",
        "float two = {2.0}",
    ),
    "functions": (
        "a = Tanh (y)\n b = Exp (a)\n c = Sqrt (b)\n d = Erf (c)\n e = Sin (d)\n f = Cos (y)\n g = Log (b)\n"
        "h = Mul (e, f)\n i = Sub (h, g)\n logits = Neg (i)",
        "",
    ),
    "halves rounded": (
        "a = Cast <to = 1> (input_ids)\n b = Sub (a, three)\n h = Mul (b, half)\n r = Round (h)\n f = Floor (h)\n"
        "c = Ceil (h)\n d = Mul (f, c)\n e = Sub (d, r)\n u = Unsqueeze (e, axes)\n logits = Add (u, y)",
        "float three = {3}, float half = {0.5}, int64[1] axes = {2}",
    ),
    "logic": (
        "a = Greater (y, zero)\n b = LessOrEqual (x, y)\n c = And (a, b)\n d = GreaterOrEqual (x, zero)\n"
        "e = Xor (c, d)\n f = Where (e, x, y)\n g = Equal (f, x)\n h = Cast <to = 1> (g)\n logits = Add (h, f)",
        "float zero = {0}",
    ),
    "extremes": (
        "a = Max (y, x, low)\n b = Min (y, x)\n logits = Sub (a, b)",
        "float low = {0.1}",
    ),
    "what training leaves": (
        "a = Identity (y)\n logits = Dropout (a)",
        "",
    ),
    "a size": (
        "n = Size (x)\n f = Cast <to = 1> (n)\n s = Squeeze (f)\n logits = Div (y, s)",
        "",
    ),
    "constant of lengths": (
        "s = Shape (y)\n z = ConstantOfShape <value = float[1] {0.5}> (s)\n logits = Mul (y, z)",
        "",
    ),
    "every second": (
        "a = Slice (y, from, to, axes, steps)\n b = Slice (y, zero, to, axes, steps)\n"
        "logits = Concat <axis = 2> (a, b)",
        "int64[1] from = {1}, int64[1] zero = {0}, int64[1] to = {9223372036854775807}, int64[1] axes = {-1}, "
        "int64[1] steps = {2}",
    ),
    "every second position": (
        "a = Slice (y, from, to, axes, steps)\n logits = Neg (a)",
        "int64[1] from = {1}, int64[1] to = {9223372036854775807}, int64[1] axes = {1}, int64[1] steps = {2}",
    ),
    "slice backwards": (
        "a = Slice (y, from, to, axes, steps)\n logits = Sub (a, x)",
        "int64[1] from = {-1}, int64[1] to = {-9223372036854775807}, int64[1] axes = {2}, int64[1] steps = {-1}",
    ),
    "running sum backwards": (
        "logits = CumSum <reverse = 1> (y, axis)",
        "int64 axis = {2}",
    ),
    "range of floats": (
        "r = Range (zero, six, one)\n logits = Add (y, r)",
        "float zero = {0}, float six = {6}, float one = {1}",
    ),
    "relu and reciprocal": (
        "a = Abs (y)\n b = Relu (a)\n c = Add (b, one)\n logits = Reciprocal (c)",
        "float one = {1}",
    ),
    "silu": (
        "a = Sigmoid (y)\n logits = Mul (y, a)",
        "",
    ),
    "swiglu": (
        "a = Sigmoid (y)\n b = Mul (a, y)\n logits = Mul (x, b)",
        "",
    ),
    "gelu": (
        'a = Gelu (y)\n logits = Gelu <approximate = "tanh"> (a)',
        "",
    ),
    "clip": (
        "logits = Clip (y, low, high)",
        "float low = {-0.2}, float high = {0.3}",
    ),
    "where of a comparison": (
        "a = Less (y, x)\n logits = Where (a, x, y)",
        "",
    ),
    "integers by length": (
        'p = Shape ("past.0.key")\n q9 = Gather (p, two)\n s = Shape (input_ids)\n'
        " n = Gather (s, one)\nt = Add (q9, n)\n r = Range (q9, t, one)\n f = Cast <to = 1> (r)\n"
        " g = Unsqueeze (f, axes)\n logits = Add (y, g)",
        "int64 one = {1}, int64 two = {2}, int64[2] axes = {0, 2}",
    ),
    "expand to lengths": (
        "s = Shape (input_ids)\n t = Concat <axis = 0> (s, six)\n z = Expand (zero, t)\n logits = Add (y, z)",
        "int64[1] six = {6}, float[1,1,1] zero = {0.5}",
    ),
    "split and join": (
        "a, b = Split <axis = -1> (y, widths)\n logits = Concat <axis = -1> (b, a, a)",
        "int64[2] widths = {1, 5}",
    ),
    "slice from the end": (
        "a = Slice (y, from, to, axes)\n logits = Mul (a, a)",
        "int64[1] from = {-4}, int64[1] to = {-1}, int64[1] axes = {2}",
    ),
    "last position": (
        "a = Slice (y, from, to, axes)\n logits = Mul (a, a)",
        "int64[1] from = {-1}, int64[1] to = {9223372036854775807}, int64[1] axes = {1}",
    ),
    "gather backwards": (
        "a = Gather <axis = 2> (y, places)\n logits = Neg (a)",
        "int64[2] places = {-2, 0}",
    ),
    "gather one": (
        "a = Gather <axis = 2> (y, last)\n b = Unsqueeze (a, axes)\n logits = Add (b, y)",
        "int64 last = {-1}, int64[1] axes = {2}",
    ),
    "gather by indices": (
        "a = GatherND (y, places)\n b = Unsqueeze (a, axes)\n logits = Add (b, y)",
        "int64[1,1] places = {-1}, int64[1] axes = {0}",
    ),
    "triangle": (
        "a = Trilu <upper = 0> (y, k)\n logits = Neg (a)",
        "int64 k = {1}",
    ),
    "reductions": (
        "a = ReduceMean (y, axes)\n b = ReduceMax (y, axes)\n c = Add (a, b)\n d = ReduceMin (y, axes)\n"
        "e = ReduceSum <keepdims = 0> (y, axes)\n f = Unsqueeze (e, axes)\n g = Mul (d, f)\n h = ReduceProd (y, axes)\n"
        "i = Add (g, h)\n j = Add (c, i)\n logits = Sub (y, j)",
        "int64[1] axes = {-1}",
    ),
    "l2": (
        "a = ReduceL2 (y, axes)\n logits = Div (y, a)",
        "int64[1] axes = {2}",
    ),
    "running sum": (
        "logits = CumSum (y, axis)",
        "int64 axis = {1}",
    ),
    "layer norm": (
        "logits = LayerNormalization (y, g, h)",
        "float[6] g = {1, 2, 3, 4, 5, 6}, float[6] h = {6, 5, 4, 3, 2, 1}",
    ),
    "rms norm": (
        "logits = RMSNormalization <epsilon = 0.01> (y, g)",
        "float[6] g = {1, 2, 3, 4, 5, 6}",
    ),
    "softmax": (
        "logits = Softmax (y)",
        "",
    ),
    "flatten": (
        "a = Flatten <axis = 2> (y)\n s = Shape (x)\n b = Reshape (a, s)\n logits = Add (b, x)",
        "",
    ),
    "infinities": (
        "r = Relu (y)\n i = Reciprocal (r)\n n = Mul (i, r)\n"  # where y < 0: inf, and NaN
        "a = IsInf (i)\n b = IsNaN (n)\n c = IsInf (n)\n d = IsNaN (i)\n e = Or (c, d)\n f = Not (b)\n"
        "g = Where (a, one, x)\n h = Where (f, g, y)\n k = Where (e, ten, h)\n logits = Add (k, g)",
        "float one = {1}, float ten = {10}",
    ),
    "outer product": (
        "a = Unsqueeze (input_ids, two)\n b = Cast <to = 1> (a)\n c = MatMul (b, row)\n logits = Add (c, y)",
        "int64[1] two = {2}, float[1,6] row = {1, 2, 3, 4, 5, 6}",
    ),
    "gemm with bias": (
        "a = Reshape (y, flat)\n b = Gemm <transB = 1> (a, w2, bias)\n logits = Reshape (b, shape)",
        "int64[2] flat = {-1, 6}, float[2,6] w2 = {1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1}, "
        "float[2] bias = {1, 2}, int64[3] shape = {3, -1, 2}",
    ),
    "int8 linear": (
        "w3 = DequantizeLinear <axis = 0> (q8, s8)\n t = Transpose <perm = [1,0]> (w3)\n logits = MatMul (y, t)",
        "int8[2,6] q8 = {1, -2, 3, -4, 5, -6, 127, -127, 4, 3, 2, 1}, float[2] s8 = {0.5, 0.25}",
    ),
    "embedding of codes": (
        "e = DequantizeLinear <axis = 0> (q8, s8)\n g = Gather (e, input_ids)\n logits = Add (g, y)",
        "int8[7,6] q8 = {-20, -19, -18, -17, -16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, "
        "-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21}, "
        "float[7] s8 = {1, 2, 3, 4, 5, 6, 7}",
    ),
}


#: Converters whose tests need more than a line: below, and among whole models.
ELSEWHERE = {"Attention", "RotaryEmbedding", "Swish"}


def test_every_converter_has_a_line():
    used = {word for body, _ in OPERATORS.values() for word in re.findall(r"(\w+) (?:<[^>]*> )?\(", body)}
    wanted = {op_type for domain, op_type in CONVERTERS if not domain}
    assert wanted - used - ELSEWHERE == set()


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_onnxruntime(both, name):
    found, expected = both(*OPERATORS[name])
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_swish(both):
    twin = "z = Mul (y, half)\n a = Sigmoid (z)\n logits = Mul (y, a)"
    found, expected = both("logits = Swish <alpha = 0.5> (y)", "float half = {0.5}", twin, opset=24)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_computed_product_is_refused_with_its_name(both):
    body = "t = Transpose <perm = [0,2,1]> (x)\n s = MatMul (y, t)\n logits = Softmax (s)"
    with pytest.raises(ModelError, match=r"(?s)MatMul\): both sides are computed.*`allow_fallback`"):
        both(body)


def test_computed_product_falls_back_if_allowed(both):
    body = "t = Transpose <perm = [0,2,1]> (x)\n s = MatMul (y, t)\n logits = Softmax (s)"
    found, expected = both(body, allow_fallback=True)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_cache_read_outside_of_attention_is_no_cache_in_place(both):
    body = 'k = ReduceMean ("past.0.key", axes)\n logits = Add (y, k)'
    extra = "int64[4] axes = {0, 1, 2, 3}"
    body = body.replace("logits = Add (y, k)", "j = Reshape (k, one)\n logits = Add (y, j)")
    extra += ", int64[3] one = {1, 1, 1}"
    with pytest.raises(ModelError, match=r"reads past\.0\.key .*only a fused attention"):
        both(body, extra)
    found, expected = both(body, extra, allow_fallback=True)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_weight_that_is_computed_names_the_pass(both, tmp_path):
    body = "n = ReduceL2 (big, axes)\n d = Div (big, n)\n t = Transpose <perm = [1,0]> (d)\n logits = MatMul (y, t)"
    values = ", ".join(str(i % 7 + 1) for i in range(60 * 6))
    with pytest.raises(ModelError, match="computed anew at every step; run fold-norm-head"):
        both(body, f"int64[1] axes = {{1}}, float[60,6] big = {{{values}}}")


LINEARS = {
    "Gemm": "f = Flatten <axis = 2> (y)\n a = Gemm <alpha = 2.0> (f, square)\n s = Shape (y)\n logits = Reshape (a, s)",
    "Einsum": 'logits = Einsum <equation = "bsk,kn->bsn"> (y, square)',
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_of_another_spelling_is_refused(both, name):
    extra = "float[6,6] square = {" + ", ".join(str(i % 5 - 2) for i in range(36)) + "}"
    with pytest.raises(ModelError, match=rf"\({name}\): a linear without a native kernel"):
        both(LINEARS[name], extra)
    found, expected = both(LINEARS[name], extra, allow_fallback=True)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


QKV = "h = Reshape (y, shape)\n q = Transpose <perm = [0,2,1,3]> (h)\n"
ATTENTION = 'a, pk, pv = Attention (q, q, q, MASK, "past.0.key", "past.0.value")\n'
MERGE = "t = Transpose <perm = [0,2,1,3]> (a)\n s = Shape (y)\n logits = Reshape (t, s)"
SHAPE = "int64[4] shape = {0, 0, 2, 3}"


@pytest.mark.slow
def test_attention_of_three_axes(both):
    body = 'logits, pk, pv = Attention <q_num_heads = 2, kv_num_heads = 2> (y, x, y, , "past.0.key", "past.0.value")'
    found, expected = both(body)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_mask_per_head_is_no_cache_in_place(both):
    body = QKV + ATTENTION.replace("MASK", "mask") + MERGE
    extra = SHAPE + ", float[1,2,5,9] mask = {" + ", ".join(str(i % 7 / 4) for i in range(90)) + "}"
    with pytest.raises(ModelError, match=r"its mask has shape \[1,2,5,9\]"):
        both(body, extra)


def test_mask_of_another_width_is_refused(both):
    body = QKV + ATTENTION.replace("MASK", "mask") + MERGE
    with pytest.raises(ModelError, match=r"a mask \[\.\., 5, 8\] over scores"):
        both(body, SHAPE + ", float[1,1,5,8] mask = {" + ", ".join(["0"] * 40) + "}")


@pytest.mark.slow
def test_boolean_mask(both):
    body = (
        'n = Shape (attention_mask)\n s0 = Shape (input_ids)\n one = Gather (n, i1)\n r = Range (i0, one, i1)\n'
        "m = Less (r, six)\n k = Unsqueeze (m, front)\n" + QKV + ATTENTION.replace("MASK", "big") + MERGE
    ).replace(QKV, "w0 = Gather (s0, i1)\n w1 = Unsqueeze (w0, i00)\n e1 = Unsqueeze (one, i00)\n"
              "t0 = Concat <axis = 0> (w1, e1)\n big = Expand (k, t0)\n" + QKV)  # fmt: skip
    extra = SHAPE + ", int64 i0 = {0}, int64 i1 = {1}, int64 six = {6}, int64[1] front = {0}, int64[1] i00 = {0}"
    found, expected = both(body, extra)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_codes_are_never_turned_back_into_floats(both):
    body = "w3 = DequantizeLinear <axis = 0> (q8, s8)\n logits = Add (y, w3)"
    with pytest.raises(ModelError, match="turned back into floats"):
        both(body, "int8[1,6] q8 = {1, -2, 3, -4, 5, -6}, float[1] s8 = {0.5}")


def test_graph_without_cache_is_refused(tmp_path):
    path = tmp_path / "model.onnxtxt"
    path.write_text('<ir_version: 10, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y) { y = Neg (x) }')
    with pytest.raises(ModelError, match="not a decoder"):
        lower(load_model(path), find_cpu())


def test_every_step_is_shown_by_name(tmp_path, decoder_text):
    path = tmp_path / "model.onnxtxt"
    path.write_text(decoder_text("logits = Add (y, x)"))
    cpu, seen = find_cpu(), []
    run_steps(lower(load_model(path), cpu).module, cpu.target(), lambda name, module: seen.append(name))
    assert seen == [step.name for step in steps()]


def test_old_opsets_are_refused(tmp_path, decoder_text):
    path = tmp_path / "model.onnxtxt"
    path.write_text(decoder_text("logits = Add (y, x)").replace('"" : 23', '"" : 12'))
    with pytest.raises(ModelError, match="opset 12: .*run legalize before"):
        lower(load_model(path), find_cpu())
