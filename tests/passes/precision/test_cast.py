"""cast: everything narrow but the islands; the numbers of fp32 within what fp16 has."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.graph.functions import local_function
from passopt.ir.graph.verifier import verify_model
from passopt.ir.relative_error import operator_error
from passopt.ir.serialization.text import print_model
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of, small_constant
from passopt.ir.weights.literals import Literal
from passopt.passes.precision.cast import CastModel
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check_onnx, random_feeds, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
WIDE, NARROW = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16


def compare(original, changed, limit, feeds=None, lengths=None):
    """Both models in onnxruntime, the second on inputs in its own dtypes; its outputs by name."""
    inputs = {**random_feeds(original, lengths or {}), **(feeds or {})}
    kinds = {value.name: value.dtype.numpy() for value in changed.graph.inputs}
    expected = Session(original).run(inputs)
    found = Session(changed).run({name: array.astype(kinds[name]) for name, array in inputs.items()})
    assert list(expected) == list(found)
    for name, reference in expected.items():
        assert np.isfinite(found[name].astype(np.float32)).all(), name
        assert operator_error(reference, found[name].astype(np.float32)) <= limit, name
    return found


def cast(text, dtype="fp16", opset=23, limit=2e-3, modified=True, **settings):
    """The model after every check: structure, ONNX checker, a second run that changes nothing, numbers."""
    original = read_model(HEADER % opset + text) if isinstance(text, str) else text
    model = original.clone()
    result = CastModel(dtype=dtype).run(model)
    verify_model(model)
    check_onnx(model)
    assert result.modified == modified == (print_model(model) != print_model(original))
    after = print_model(model)
    assert not CastModel(dtype=dtype).run(model).modified
    assert print_model(model) == after
    compare(original, fp32_twin(model) if dtype == "bf16" else model, limit, **settings)
    return model


def dtypes(model):
    """The dtype of every floating value by name: computed, fed and constant."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    return {value.name: value.dtype for value in values if value.dtype.is_floating_point()}


def operators(model):
    return [node.op_type for node in model.graph]


NORM = """g (float[b,3,6] x) => (float[b,3,5] y) <float[6] w = random, float[6,5] m = random, int64[1] last = {-1}> {
    s = Pow(x, two)
    r = ReduceMean(s, last)
    e = Add(r, eps)
    i = Sqrt(e)
    n = Div(x, i)
    o = Mul(n, w)
    y = MatMul(o, m)
}""".replace("int64[1] last", "float two = {2}, float eps = {1e-6}, int64[1] last")


def test_a_norm_is_an_island(golden):
    model = cast(NORM)
    golden(print_model(model))


@pytest.mark.parametrize("square", ["s = Pow(x, two)", "s = Mul(x, x)"])
def test_a_norm_of_large_activations_does_not_overflow(square):
    """300² is beyond fp16."""
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32) * 300
    cast(NORM.replace("s = Pow(x, two)", square), feeds={"x": x})


def test_the_variance_of_equal_numbers_is_not_negative():
    """The mean of squares less the square of the mean, as ONNX writes a layer norm out; bf16 squares differ."""
    text = """g (float[b,3,6] x) => (float[b,3,5] y) <float[6,5] m = random, float eps = {1e-6}, int64[1] last = {-1}> {
        mean = ReduceMean(x, last) s = Mul(x, x) r = ReduceMean(s, last) q = Mul(mean, mean) v = Sub(r, q)
        e = Add(v, eps) i = Sqrt(e) d = Sub(x, mean) n = Div(d, i) y = MatMul(n, m) }"""
    x = np.random.default_rng(0).standard_normal((2, 3, 1)).astype(np.float32).repeat(6, axis=-1)
    model = cast(text, "bf16", limit=float("inf"), feeds={"x": np.random.default_rng(1).random((2, 3, 6), np.float32)})
    assert np.isfinite(Session(fp32_twin(model)).run({"x": x})["y"]).all()


def test_a_product_of_a_value_with_itself_that_is_no_norm_is_narrow():
    model = cast("g (float[b,6] x) => (float[b,6] y) { s = Mul(x, x) y = Add(s, x) }")
    assert dtypes(model)["s"] == NARROW


def test_the_first_norm_reads_an_embedding():
    text = NORM.replace("float[b,3,6] x", "int64[b,3] ids").replace(
        "<float[6] w", "<float[7,6] embed = random, float[6] w"
    )
    model = cast(text.replace("s = Pow", "x = Gather(embed, ids) s = Pow"))
    assert (dtypes(model)["embed"], dtypes(model)["m"], dtypes(model)["n"]) == (NARROW, NARROW, WIDE)


def test_cubes_are_computed_wide():
    """GELU in its tanh form: 50³ is beyond fp16."""
    text = """g (float[2,5] x) => (float[2,3] y)
    <float three = {3}, float c = {0.044715}, float h = {0.5}, float one = {1}, float[5,3] m = random> {
        a = Pow(x, three) b = Mul(a, c) d = Add(x, b) t = Tanh(d) u = Add(t, one) v = Mul(x, u) z = Mul(v, h)
        y = MatMul(z, m)
    }"""
    model = cast(text, feeds={"x": np.linspace(-60, 60, 10, dtype=np.float32).reshape(2, 5)})
    assert dtypes(model)["t"] == WIDE


ATTENTION = """g (float[b,2,n,6] q, float[b,2,t,6] k, float[b,2,t,5] v, int64[b,t] seen) => (float[b,2,n,5] y)
<float low = {-3.4028235e38}, float zero = {0}, float root = {2.449}, int64[2] axes = {1, 2}> {
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul(q, kt)
    d = Div(s, root)
    c = Cast <to = 9> (seen)
    u = Unsqueeze(c, axes)
    m = Where(u, zero, low)
    a = Add(d, m)
    p = Softmax(a)
    y = MatMul(p, v)
}"""
SEEN = np.array([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]], np.int64)


def test_softmax_and_masks_are_islands_and_a_row_that_sees_nothing_stays_a_mean(golden):
    model = cast(ATTENTION, feeds={"seen": SEEN})
    found = dtypes(model)
    assert (found["s"], found["d"], found["m"], found["a"], found["p"]) == (NARROW, NARROW, WIDE, WIDE, WIDE)
    assert found["low"] == WIDE
    golden(print_model(model))


def test_a_mask_that_chooses_makes_the_scores_wide():
    text = ATTENTION.replace("m = Where(u, zero, low)", "").replace("a = Add(d, m)", "a = Where(u, d, low)")
    model = cast(text, feeds={"seen": SEEN})
    assert (dtypes(model)["a"], dtypes(model)["low"]) == (WIDE, WIDE)


def test_alibi_stays_exact_at_column_4095():
    """In fp16, slope · 4095 is off by 2."""
    text = """g (float[1,3,1,t] s) => (float[1,3,1,t] y)
    <float[3,1,1] a = {0.5, 0.4, 0.3}, int64 zero = {0}, int64 one = {1}, int64[1] axis = {3}> {
        l = Shape <start = 3> (s) n = Squeeze(l) r = Range(zero, n, one) f = Cast <to = 1> (r)
        b = Mul(a, f) d = Add(s, b) y = Softmax(d)
    }"""
    scores = np.full((1, 3, 1, 4096), -2000, np.float32)
    scores[..., -2:] = 0
    model = cast(text, feeds={"s": scores})
    assert dtypes(model)["b"] == dtypes(model)["a"] == WIDE


ROTARY = """g (float[b,3,n,6] x, int64[b,n] p) => (float[b,3,n,5] y)
<float[9,6] cos = random, float[9,6] sin = random, float[6,5] w = random, int64[1] one = {1}, int64[1] zero = {0},
 int64[1] half = {3}, int64[1] end = {9}, int64[1] last = {3}> {
    c0 = Gather(cos, p)
    c = Unsqueeze(c0, one)
    s0 = Gather(sin, p)
    s = Unsqueeze(s0, one)
    a = Mul(x, c)
    lo = Slice(x, zero, half, last)
    hi = Slice(x, half, end, last)
    ng = Neg(hi)
    r = Concat <axis = -1> (ng, lo)
    z = Mul(r, s)
    o = Add(a, z)
    y = MatMul(o, w)
}"""


def test_tables_of_angles_stay_wide_and_what_is_rotated_is_cast_once(golden):
    model = cast(ROTARY)
    found = dtypes(model)
    assert found["cos"] == found["sin"] == found["o"] == WIDE
    assert operators(model).count("Cast") == 2
    golden(print_model(model))


def test_angles_computed_from_positions_stay_wide():
    """A product of inverse frequencies and positions is no linear."""
    text = """g (float[b,3,n,6] x, int64[b,n] p) => (float[b,3,n,6] y)
    <float[3,1] f = {1, 0.1, 0.01}, int64[1] one = {1}> {
        i = Cast <to = 1> (p) u = Unsqueeze(i, one) a = MatMul(f, u) t = Transpose <perm = [0, 2, 1]> (a)
        d = Concat <axis = -1> (t, t) c = Cos(d) e = Unsqueeze(c, one) y = Mul(x, e)
    }"""
    model = cast(text, feeds={"p": np.array([[4000, 4001, 4002], [1, 2, 3]], np.int64)})
    assert dtypes(model)["f"] == dtypes(model)["a"] == WIDE


def test_pieces_that_only_an_island_reads_are_not_lifted():
    """Nothing reads x itself in fp32: one cast behind is as good as one before."""
    text = "g (float[2,6] x) => (float[2,3] y) <int64[1] a = {0}, int64[1] b = {3}, int64[1] one = {1}>"
    model = cast(text + " { s = Slice(x, a, b, one) y = Softmax(s) }")
    assert operators(model) == ["Slice", "Cast", "Softmax", "Cast"]


def test_positional_embeddings_are_added_narrow():
    text = """g (int64[b,3] ids, int64[b,3] p) => (float[b,3,5] y)
    <float[7,6] e = random, float[9,6] q = random, float[6,6] m = random, float[6,5] h = random> {
        x = Gather(e, ids) z = Gather(q, p) s = Add(x, z) l = MatMul(s, m) r = Add(s, l) y = MatMul(r, h)
    }"""
    model = cast(text)
    assert set(dtypes(model).values()) == {NARROW}
    assert "Cast" not in operators(model)


def test_a_baked_bias_stays_wide():
    text = """g (float[b,3,n,n] s) => (float[b,3,n,n] y)
    <float[3,9,9] bias = random, int64[1] a = {0}, int64[1] one = {1}, int64[1] two = {2}> {
        l = Shape <start = 3> (s) r = Slice(bias, a, l, one) c = Slice(r, a, l, two) d = Add(s, c) y = Softmax(d)
    }"""
    assert dtypes(cast(text))["bias"] == WIDE


# Weights and constants


def test_weights_are_cast_lazily(monkeypatch):
    model = read_model(HEADER % 23 + NORM)
    for name in ("w", "m"):
        value = model.graph.initializers[name]
        value.const_value = LazyWeight(Literal.of(value.const_value.numpy()), name)
    monkeypatch.setattr(LazyWeight, "numpy", lambda self: pytest.fail("a weight was read"))
    monkeypatch.setattr(LazyWeight, "tobytes", lambda self: pytest.fail("a weight was read"))
    before = {name: expression_of(model.graph.initializers[name]) for name in ("w", "m")}
    CastModel().run(model)
    narrow = {name: expression_of(model.graph.initializers[name]) for name in ("w", "m")}
    assert narrow == {name: ex.Cast(NARROW, value.shape, value) for name, value in before.items()}
    CastModel(dtype="fp32").run(model)
    assert dtypes(model)["m"] == WIDE
    CastModel(dtype="fp16").run(model)
    assert {name: expression_of(model.graph.initializers[name]) for name in ("w", "m")} == narrow


def test_what_is_computed_of_weights_alone_is_narrow():
    """NormHead, as the checkpoint's own dtype would compute it; fold-norm-head finds it still."""
    from passopt.passes.lm_head.fold_norm_head import FoldNormHead

    text = """g (float[b,6] x) => (float[b,5] y) <float[5,6] h = random, int64[1] one = {1}, float eps = {1e-12}> {
        n = ReduceL2(h, one) c = Clip(n, eps) d = Div(h, c) t = Transpose <perm = [1, 0]> (d) y = MatMul(x, t)
    }"""
    model = cast(text)
    assert set(dtypes(model).values()) == {NARROW}
    assert small_constant(model.graph.initializers["eps"]) > 0
    assert FoldNormHead().run(model).matches == 1


def test_a_constant_read_in_both_dtypes_becomes_two():
    text = "g (float[2,3] x) => (float[2,3] y, float[2,3] z) <float two = {2}>"
    found = dtypes(cast(text + " { a = Pow(x, two) y = Exp(a) z = Mul(x, two) }"))
    assert (found["two"], found["two.fp16"]) == (WIDE, NARROW)


def test_a_weight_read_in_both_dtypes_is_stored_once():
    text = "g (float[6,6] x) => (float[6,6] y, float[6,6] z) <float[6,6] w = random>"
    model = cast(text + " { y = MatMul(x, w) e = Exp(x) z = Pow(e, w) }", limit=5e-3)
    assert (dtypes(model)["w"], dtypes(model)["w.cast"]) == (NARROW, WIDE)


@pytest.mark.parametrize("number", [1e5, 1e-7])
def test_a_number_that_fp16_has_not_makes_an_island(number):
    text = f"g (float[2,3] x) => (float[2,3] y) <float c = {{{number}}}, float d = {{{1 / number}}}>"
    model = cast(text + " { a = Mul(x, c) y = Mul(a, d) }", limit=1e-2)
    assert dtypes(model)["a"] == WIDE


def test_numbers_of_a_narrow_operator_are_never_infinite():
    text = (
        "g (float[2,3] x) => (float[2,4] y) <float[3,4] w = {1e9,1,1,1, 1,1,-1e9,1, 1,1,1,-0.0}> { y = MatMul(x, w) }"
    )
    model = read_model(HEADER % 23 + text)
    value = model.graph.initializers["w"]
    value.const_value = onnx_ir.tensor(value.const_value.numpy())
    CastModel().run(model)
    assert np.abs(small_constant(model.graph.initializers["w"]).astype(np.float32)).max() == 65504


def test_constant_nodes_get_the_dtype_that_is_read():
    text = """g (float[2,3] x) => (float[2,3] y) {
        two = Constant <value_float = 2.0> () half = Constant <value = float[1] {0.5}> ()
        a = Mul(x, half) b = Pow(a, two) y = Exp(b) }"""
    found = dtypes(cast(text))
    assert (found["two"], found["half"]) == (WIDE, NARROW)


def test_a_constant_of_a_computed_shape():
    text = "g (float[b,3] x) => (float[b,3] y) { s = Shape(x) c = ConstantOfShape <value = float[1] {0.5}> (s)"
    text += " y = Add(x, c) }"
    assert dtypes(cast(text))["c"] == WIDE


# The interface


def test_inputs_and_outputs_follow(golden):
    text = "g (float[2,3] x, int64[2] i, bool[2,3] k) => (float[2,3] y, float[2,3] z, int64[2] j) "
    model = cast(text + "{ y = Softmax(x) z = Where(k, x, y) j = Neg(i) }")
    assert {value.name: value.dtype for value in model.graph.outputs}["y"] == NARROW
    golden(print_model(model))


def test_an_output_that_was_a_cast_takes_its_place():
    text = "g (float16[2,3] x, float16[3,4] w) => (float[2,4] y) { m = MatMul(x, w) y = Cast <to = 1> (m) }"
    model = cast(text)
    assert operators(model) == ["MatMul"]
    assert model.graph.outputs[0].name == "y"


def test_a_wide_output_keeps_its_cast():
    text = "g (float[2,3] x) => (float16[2,3] y) { m = Softmax(x) y = Cast <to = 10> (m) }"
    assert operators(cast(text)) == ["Cast", "Softmax", "Cast"]


def test_pairs_of_casts_cancel():
    text = """g (float[2,3] x) => (float[2,3] y) {
        a = Softmax(x) h = Cast <to = 10> (a) f = Cast <to = 1> (h) y = Exp(f) }"""
    model = cast(text)
    assert operators(model) == ["Cast", "Softmax", "Exp", "Cast"]


def test_casts_of_integers_stay():
    text = "g (float[2,3] x) => (float[2,3] y, int64[2,3] n) { n = Cast <to = 7> (x) f = CastLike(n, x) y = Mul(x, f) }"
    model = cast(text)
    assert sorted(operators(model)) == ["Cast", "Cast", "Cast", "Cast", "Mul"]


def test_the_same_dtype_changes_nothing():
    model = read_model(HEADER % 23 + "g (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul(x, w) }")
    assert not CastModel(dtype="fp32").run(model).modified


# int8


def test_scales_are_cast_and_codes_stay():
    text = "g (float[b,6] x) => (float[b,5] y) <float[5,6] w = random>"
    model = read_model(HEADER % 23 + text + " { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }")
    QuantizeWeights().run(model)
    found = dtypes(cast(model))
    assert found["w.scales"] == NARROW


def test_a_quantised_embedding_keeps_the_stream_narrow():
    text = """g (int64[b,3] ids) => (float[b,3,5] y)
    <float[7,6] e = random, float[6,6] w = random, float[6,5] h = random> {
        x = Gather(e, ids) m = MatMul(x, w) r = Add(x, m) y = MatMul(r, h) }"""
    model = read_model(HEADER % 23 + text)
    QuantizeWeights(embedding=True).run(model)
    model = cast(model)
    assert set(dtypes(model).values()) == {NARROW}
    assert operators(model).count("Cast") == 1


def test_refuses_half_scales_below_opset_19():
    text = "g (int8[3,4] q, float[3] s) => (float[3,4] y) { y = DequantizeLinear <axis = 0> (q, s) }"
    with pytest.raises(PassError, match="takes 16-bit scales from opset 19 on, this model has 18. Run legalize first"):
        CastModel().run(read_model(HEADER % 18 + text))
    CastModel(dtype="fp32").run(read_model(HEADER % 18 + text))


# Fused operators


def test_fused_norms_and_rotations():
    text = """g (float[b,3,n,6] x, int64[b,n] p) => (float[b,3,n,5] y)
    <float[6] w = random, float[9,3] c = random, float[9,3] s = random, float[6,5] m = random> {
        o = RMSNormalization(x, w) r = RotaryEmbedding(o, c, s, p) y = MatMul(r, m)
    }"""
    model = cast(text)
    assert operators(model) == ["RMSNormalization", "Cast", "RotaryEmbedding", "Cast", "MatMul"]
    assert dtypes(model)["c"] == WIDE


FUSED = """g (float[b,2,n,6] q, float[b,1,n,6] k, float[b,1,n,6] v, int64[b,1,n,"n+p"] seen,
           float[b,1,p,6] "past.0.key", float[b,1,p,6] "past.0.value")
=> (float[b,2,n,6] y, float[b,1,"n+p",6] "present.0.key", float[b,1,"n+p",6] "present.0.value")
<float low = {-1.7014117e38}, float zero = {0}> {
    c = Cast <to = 9> (seen)
    m = Where(c, zero, low)
    y, "present.0.key", "present.0.value" = Attention <scale = 0.4> (q, k, v, m, "past.0.key", "past.0.value")
}"""


def test_a_mask_of_attention_is_bounded_to_what_fp16_has():
    """A row that sees nothing is the mean of the values, in fp32 and in fp16; with -inf it would be 0."""
    seen = np.ones((2, 1, 3, 8), np.int64)
    seen[1, :, 2], seen[0, :, 0, 4:] = 0, 0
    model = cast(FUSED, feeds={"seen": seen})
    assert operators(model) == ["Cast", "Where", "IsInf", "Max", "Where", "Cast", "Attention"]
    attention = list(model.graph)[-1]
    assert attention.attributes["softmax_precision"].as_int() == WIDE.value
    assert (dtypes(model)["past.0.key"], dtypes(model)["present.0.key"], dtypes(model)["low"]) == (NARROW, NARROW, WIDE)


def test_an_infinite_mask_of_attention_still_hides():
    seen = np.ones((2, 1, 3, 8), np.int64)
    seen[1, :, 2] = 0
    model = cast(FUSED.replace("-1.7014117e38", "-inf"), feeds={"seen": seen})
    assert dtypes(model)["low"] == WIDE


def test_attention_whose_mask_holds_alibi_is_an_island():
    text = """g (float[1,3,n,6] q, float[1,3,n,6] k, float[1,3,n,6] v) => (float[1,3,n,6] y)
    <float[3,1,1] a = {0.5, 0.4, 0.3}, int64 zero = {0}, int64 one = {1}, int64[1] axis = {1}> {
        l = Shape <start = 2, end = 3> (q) n = Squeeze(l) r = Range(zero, n, one) f = Cast <to = 1> (r) b = Mul(a, f)
        s = Concat <axis = 0> (axis, l, axis) t = Expand(b, s) y = Attention(q, k, v, t)
    }"""
    model = cast(text, lengths={"n": 5})
    assert operators(model).count("Cast") == 5
    assert dtypes(model)["t"] == WIDE


def test_alibi_attention_takes_slopes_in_fp32():
    text = """<ir_version: 10, opset_import: ["" : 23, "passopt" : 1]>
    g (float[b,3,n,4] q, float[b,3,n,4] k, float[b,3,n,4] v, int64[1,n] p, float[b,1,n,n] m) => (float[b,3,n,4] y)
    <float[3,1,1] a = {0.5, 0.4, 0.3}> {
        f = Cast <to = 1> (p)
        y = passopt.AlibiAttentionNoCache <scale = 0.5> (q, k, v, a, f, m)
    }"""
    model = read_model(text)
    function = local_function("AlibiAttentionNoCache", 23)
    model.functions[function.identifier()] = function
    found = dtypes(cast(model))
    assert (found["a"], found["f"], found["q"], found["y"]) == (WIDE, WIDE, NARROW, NARROW)


# bf16


def test_bf16_through_its_twin():
    model = cast(ATTENTION, "bf16", feeds={"seen": SEEN}, limit=1e-2)
    assert dtypes(model)["q"] == onnx_ir.DataType.BFLOAT16
    assert dtypes(model)["p"] == WIDE


# Decoders


@pytest.mark.parametrize("quantized", [False, True])
def test_a_decoder(quantized):
    spec = DecoderSpec(heads=3, quantized=quantized)
    feeds = {"attention_mask": np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], np.int64)}
    model = cast(tiny_decoder(spec), lengths={"batch": 2, "past": 3, "seq": 2}, feeds=feeds, limit=5e-3)
    weights = [value for value in model.graph.initializers.values() if value.name.endswith(".weight")]
    assert {value.dtype for value in weights} <= {NARROW, onnx_ir.DataType.INT8}
    assert {value.dtype for value in model.graph.outputs} == {NARROW}


def test_there_and_back_is_the_same_text():
    model = tiny_decoder(DecoderSpec(heads=3))
    CastModel().run(model)
    before = print_model(model, canonical=True)
    CastModel(dtype="fp32").run(model)
    assert not any(node.op_type == "Cast" and node.attributes["to"].as_int() == NARROW.value for node in model.graph)
    CastModel().run(model)
    assert print_model(model, canonical=True) == before
