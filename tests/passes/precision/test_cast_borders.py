"""cast around what it cannot look into: bodies, calls, sequences, other domains; and by each operator's own schema."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.graph.verifier import verify_model
from passopt.ir.relative_error import operator_error
from passopt.ir.serialization.model_files import model_bytes
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes.precision.cast import CastModel
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check_onnx, random_feeds

WIDE, NARROW = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16


def cast(text, *, opset=18, dtype="fp16", limit=3e-3, feeds=None, functions=""):
    """(model, result) after every check: structure, types inferred strictly, a second run, and the numbers."""
    imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
    original = parse_model(f"<ir_version: 9, opset_import: [{imports}]>\n{text}\n{functions}")
    model = original.clone()
    result = CastModel(dtype=dtype).run(model)
    verify_model(model)
    check_onnx(model)
    onnx.shape_inference.infer_shapes(onnx.load_from_string(model_bytes(model, {})), check_type=True, strict_mode=True)
    after = print_model(model)
    assert not CastModel(dtype=dtype).run(model).modified
    assert print_model(model) == after
    compare(original, fp32_twin(model) if dtype == "bf16" else model, limit, feeds or {})
    return model, result


def compare(original, changed, limit, feeds):
    inputs = {**random_feeds(original, {}), **feeds}
    kinds = {value.name: value.dtype.numpy() for value in changed.graph.inputs}
    expected = Session(original, optimize=False).run(inputs)
    found = Session(changed, optimize=False).run({name: array.astype(kinds[name]) for name, array in inputs.items()})
    assert list(expected) == list(found)
    for name, reference in expected.items():
        assert operator_error(as_floats(reference), as_floats(found[name])) <= limit, name


def as_floats(result):
    return np.stack(result).astype(np.float32) if isinstance(result, list) else np.asarray(result, np.float32)


def dtypes(model):
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    ]
    return {value.name: value.dtype for value in values}


def operators(model):
    return [node.op_type for node in model.graph]


# Bodies


BRANCHES = """g (bool c, float[2,3] x) => (float[2,4] y, float[2,4] z)
<float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> {
    h = Neg(x)
    i = If (c) <then_branch = a () => (float[2,4] t) { t = MatMul(h, w) },
                else_branch = b () => (float[2,4] e) { u = Exp(h) v = Abs(w) e = MatMul(u, v) }>
    y = Relu(i)
    z = Identity(i)
}"""


@pytest.mark.parametrize("branch", [True, False])
def test_branches_read_what_they_read_before(branch):
    model, result = cast(BRANCHES, feeds={"c": np.array(branch)})
    found = dtypes(model)
    assert (found["x"], found["h"], found["w"], found["y"]) == (NARROW, NARROW, WIDE, NARROW)
    assert result.notes[-1] == "1 node keeps the dtypes that it has: 1 × If"


def test_loops_carry_what_they_carried_before():
    model, _ = cast("""g (float[2,3] x, float[3] d) => (float[2,3] y, float[n,2,3] s) <int64 n = {3}, bool go = {1}> {
        h = Neg(x)
        y, s = Loop (n, go, h) <body = b (int64 i, bool k, float[2,3] a) => (bool l, float[2,3] r, float[2,3] o) {
            l = Identity(k) r = Add(a, d) o = Mul(r, h) }>
    }""")
    assert {value.dtype for value in model.graph.outputs} == {NARROW}


def test_scans_too_and_bodies_inside_of_bodies():
    cast("""g (bool c, float[4,3] x, float[3] d) => (float[3] y, float[4,3] s) <float[3] z = {1, 2, 3}> {
        h = Sigmoid(x)
        y, s = Scan (z, h) <num_scan_inputs = 1, body = b (float[3] a, float[3] e) => (float[3] r, float[3] o) {
            o = If (c) <then_branch = t () => (float[3] p) { p = Mul(e, d) },
                        else_branch = f () => (float[3] q) { q = Neg(e) }>
            r = Add(a, o) }>
    }""")


def test_a_cast_that_a_body_reads_is_moved_out_of_its_way():
    model, _ = cast("""g (bool c, float[2,3] x) => (float16[2,3] y) {
        s = Exp(x) h = Cast <to = 10> (s)
        y = If (c) <then_branch = a () => (float16[2,3] t) { t = Neg(h) },
                    else_branch = b () => (float16[2,3] e) { f = Cast <to = 1> (h) g = Exp(f) e = Cast <to = 10> (g) }>
    }""")
    assert operators(model) == ["Cast", "Exp", "Cast", "If"]


def test_a_body_that_hands_a_value_of_the_graph_on():
    """ONNX allows it; onnxruntime does not run it, so only the text is looked at."""
    model = parse_model("""<ir_version: 9, opset_import: ["" : 18]> g (bool c, float[2,3] x) => (float[2,3] y) {
        h = Neg(x)
        y = If (c) <then_branch = a () => (float[2,3] t) { t = Neg(h) },
                    else_branch = b () => (float[2,3] e) { e = Exp(h) }>
    }""")
    node = model.graph[1]
    node.attributes["else_branch"].as_graph().outputs[0] = model.graph[0].outputs[0]
    CastModel().run(model)
    result = node.attributes["else_branch"].as_graph().outputs[0]
    assert (result.producer().op_type, result.dtype) == ("Cast", WIDE)


def test_a_weight_of_the_checkpoint_that_only_a_body_reads_stays_wide():
    model, _ = cast("""g (bool c, float[2,3] x) => (float[2,3] y) <float[3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
        y = If (c) <then_branch = a () => (float[2,3] t) { t = MatMul(x, w) },
                    else_branch = b () => (float[2,3] e) <float[3] k = {7, 8, 9}> { e = Add(x, k) }>
    }""")
    assert dtypes(model)["w"] == WIDE


# Calls


def test_calls_of_functions_keep_their_dtypes():
    functions = """<domain: "local", opset_import: ["" : 18]>
    halved (x, w) => (y, z) { h = Constant <value = float {0.5}> () y = Mul(x, h) z = MatMul(y, w) }"""
    model, result = cast(
        """g (float[2,3] x) => (float[2,4] y) <float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> {
        h = Neg(x) a, b = local.halved (h, w) c = Relu(b) d = MatMul(a, w) y = Add(c, d) }""",
        functions=functions,
    )
    assert operators(model) == ["Neg", "Cast", "halved", "Cast", "Cast", "Relu", "MatMul", "Add"]
    assert "1 × local.halved; run inline-functions first to cast inside of calls" in result.notes[-1]


def test_a_function_that_gives_16_bits_by_itself():
    functions = """<domain: "local", opset_import: ["" : 18]>
    half (x) => (y) { y = Cast <to = 10> (x) }"""
    model, _ = cast("g (float[2] x) => (float16[2] y) { y = local.half (x) }", functions=functions)
    assert operators(model) == ["Cast", "half"]


def test_what_follows_a_call_of_unknown_type_is_typed_by_inference():
    functions = """<domain: "local", opset_import: ["" : 18]>
    twice (x) => (y) { y = Add(x, x) }"""
    model, _ = cast("g (float[2] x) => (float[2] y) { a = local.twice (x) y = Neg(a) }", functions=functions)
    assert operators(model) == ["Cast", "twice", "Cast", "Neg"]


# Other domains and other types


def test_operators_of_other_domains_see_no_change():
    model = parse_model("""<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1, "other" : 1]>
    g (float[2,3] x, float[3,3] w) => (float[2,3] y, float[2,3] z) {
        h = Neg(x) m = other.Product(h, w) r = Relu(m)
        a, b = com.microsoft.Split (r) y = Neg(a)
        k = other.Thing(r, w) z = Mul(k, x) }""")
    CastModel().run(model)
    verify_model(model)
    kept = {node.op_type: [value.dtype for value in node.inputs] for node in model.graph}
    assert (kept["Product"], kept["Thing"][1]) == ([WIDE, WIDE], WIDE)
    assert (kept["Relu"], kept["Split"], kept["Mul"][1]) == ([None], [None], WIDE)
    assert [value.dtype for value in model.graph.outputs] == [NARROW, NARROW]
    assert not CastModel().run(model).modified


def test_sequences_keep_their_elements():
    model = parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> g (seq(float[2]) x) => (seq(float[2]) y) { y = Identity(x) }'
    )
    before = print_model(model)
    assert not CastModel().run(model).modified
    assert print_model(model) == before
    assert isinstance(model.graph.outputs[0].type, onnx_ir.SequenceType)


def test_tensors_go_into_sequences_and_come_out():
    model, _ = cast("""g (float[2,3] x, float[2,3] z) => (float[2,3] y, float[4,3] c) <int64 one = {1}> {
        h = Neg(x) s = SequenceConstruct(h, z) a = SequenceAt(s, one) y = Relu(a)
        c = ConcatFromSequence <axis = 0> (s) }""")
    assert {value.dtype for value in model.graph.outputs} == {NARROW}
    assert operators(model).count("Cast") == 4


def test_optional_values():
    model, _ = cast(
        """g (float[2,3] x) => (float[2,3] y) { h = Neg(x) o = Optional(h) g = OptionalGetElement(o) y = Relu(g) }"""
    )
    assert operators(model) == ["Neg", "Cast", "Optional", "OptionalGetElement", "Cast", "Relu"]


# By the operator's own schema


@pytest.mark.parametrize(("body", "kept"), [
    ("<float z = {0}, float five = {5}, float one = {1}> { r = Range(z, five, one) y = Add(x, r) }", "Range"),
    ("{ n = Abs(x) m = ReduceMax <keepdims = 0> (n) k = Ceil(m) r = Range(k0, k, one) s = ReduceSum(r) y = Add(x, s) }"
     .replace("{ n", "<float k0 = {0}, float one = {1}> { n"), "Range"),
    ("{ h = Neg(x) q, s, p = DynamicQuantizeLinear(h) y = DequantizeLinear(q, s, p) }", "DynamicQuantizeLinear"),
    ("<float s = {0.02}, uint8 z = {128}> { h = Neg(x) q = QuantizeLinear(h, s, z) d = Cast <to = 1> (q) y = Neg(d) }",
     "QuantizeLinear"),
    ('<float[1] k = {3}> { h = Neg(x) y = Resize (h, , k) }', "Resize"),
    ("{ h = Neg(x) m = MeanVarianceNormalization <axes = [0]> (h) y = Relu(m) }", "MeanVarianceNormalization"),
    ("<int64 bins = {5}, int64 length = {8}, int64 rate = {80}, float low = {0}, float high = {40}> "
     "{ m = MelWeightMatrix(bins, length, rate, low, high) r = ReduceMax <keepdims = 0> (m) y = Add(x, r) }",
     "MelWeightMatrix"),
])  # fmt: skip
def test_what_takes_no_16_bits_reads_and_gives_fp32(body, kept):
    """Islands by the schemas of the model's own opset."""
    opset = 19 if "Dequantize" in body else 18
    model, _ = cast(f"g (float[5] x) => (float[n] y) {body}", opset=opset, limit=2e-2)
    node = next(node for node in model.graph if node.op_type == kept)
    assert {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype.is_floating_point()} == {WIDE}


def test_boxes_that_are_suppressed_are_compared_in_fp32():
    text = """g (float[1,4,4] b, float[1,2,4] s) => (int64[n,3] y)
    <int64 k = {2}, float iou = {0.5}, float least = {0.1}> {
        c = Mul(b, b)
        y = NonMaxSuppression(c, s, k, iou, least) }"""
    boxes = np.array([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, 2, 1, 3], [2, 2, 3, 3]]], np.float32)
    scores = np.array([[[0.9, 0.75, 0.6, 0.95], [0.3, 0.7, 0.2, 0.8]]], np.float32)
    model, _ = cast(text, feeds={"b": boxes, "s": scores})
    node = list(model.graph)[-1]
    assert [value.dtype for value in node.inputs[:2]] == [WIDE, WIDE]


def test_constants_alone_are_combined_in_fp32_where_16_bits_are_not_defined():
    text = """g (float[1,2] x) => (int64[n,3] y, float[1,2] z)
    <float[1,2,4] b = {0, 0, 1, 1, 2, 2, 3, 3}, float[1,1,2] s = {0.5, 0.7}, int64 k = {2}> {
        y = NonMaxSuppression(b, s, k) z = Neg(x) }"""
    found = dtypes(cast(text)[0])
    assert (found["b"], found["s"]) == (WIDE, WIDE)


def test_moves_are_fp32_where_the_opset_does_not_know_bf16():
    """Before opset 13 hardly any operator took bf16, and no Cast did."""
    text = "g (float[2,3] x) => (float[3,2] y) { h = Relu(x) t = Transpose(h) y = Trilu(t) }"
    model, _ = cast(text, opset=13 if "Trilu" not in text else 14, dtype="bf16", limit=2e-2)
    assert dtypes(model)["t"] == onnx_ir.DataType.BFLOAT16
    message = "cast: Cast takes BFLOAT16 from opset 13 on, this model has 12. Run legalize first."
    with pytest.raises(PassError, match=message):
        CastModel(dtype="bf16").run(
            parse_model('<ir_version: 8, opset_import: ["" : 12]> g (float x) => (float y) { y = Neg(x) }')
        )


def test_an_operator_that_lacks_bf16_is_an_island():
    text = "g (float[2,3] x) => (float[2,3] y) { h = Relu(x) e = HardSwish(h) y = Neg(e) }"
    model, _ = cast(text, opset=21, dtype="bf16", limit=2e-2)
    assert operators(model) == ["Relu", "Cast", "HardSwish", "Neg", "Cast"]


# Results of the graph


@pytest.mark.parametrize("text", [
    "g (float16[2] x, float[1] like) => (float[2] y) { y = CastLike(x, like) }",
    "g (int32[2] x, float[1] like) => (float[2] y) { y = CastLike(x, like) }",
    "g (float16[2] x) => (float[2] y) { y = Cast <to = 1> (x) }",
    "g (float x) => (float y, float c) { c = Constant <value_float = 1.5> () y = Add(x, c) }",
    "g (float x) => (float y, float c) { c = Constant <value = float {0.1}> () y = Neg(x) }",
    "g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {0.5, 3}> { y = Add(x, w) }",
    "g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {0.5, 3}> { y = Pow(x, w) }",
    "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {0.5, 3}> { z = Cast <to = 1> (w) y = Mul(x, w) }",
    "g (float[2] x) => (float16[2] y, float[2] z) <float16[2] w = {14336, 16896}> { z = Cast <to = 1> (w)"
    " y = Cast <to = 10> (x) }",
    "g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x) z = Identity(y) }",
    "g (float[2] x) => (float[2] x, float[2] y) { y = Neg(x) }",
])  # fmt: skip
def test_results_are_of_the_dtype_of_the_model(text):
    feeds = {"x": np.array([0.5, 2], np.float32)} if "Pow" in text else None
    model, _ = cast(text, opset=19, feeds=feeds)
    assert {value.dtype for value in model.graph.outputs} == {NARROW}


def test_a_model_of_16_bits_is_widened_around_what_keeps_them():
    text = """g (bool c, float16[2,3] x) => (float16[2,3] y) {
        h = Neg(x)
        i = If (c) <then_branch = a () => (float16[2,3] t) { t = Abs(h) },
                    else_branch = b () => (float16[2,3] e) { e = Neg(h) }>
        y = Relu(i) }"""
    model, _ = cast(text, dtype="fp32")
    found = dtypes(model)
    assert (found["x"], found["h"], found["i"], found["y"]) == (WIDE, WIDE, NARROW, WIDE)


def test_bits_keep_their_meaning():
    """onnxruntime runs no BitCast, so only the dtypes are looked at."""
    text = """<ir_version: 13, opset_import: ["" : 26]> g (float[2] x) => (int32[2] y, float[2] z, int32[2] k)
    <float[2] c = {1, 2}> {
        h = Neg(x) y = BitCast <to = 6> (h) f = BitCast <to = 1> (y) z = Neg(f) k = BitCast <to = 6> (c) }"""
    model = parse_model(text)
    CastModel().run(model)
    check_onnx(model)
    found = dtypes(model)
    assert (found["h"], found["f"], found["c"]) == (NARROW, WIDE, WIDE)
    assert [node.inputs[0].dtype for node in model.graph if node.op_type == "BitCast"][::2] == [WIDE, WIDE]


def test_a_clip_in_bf16_is_an_island_before_opset_16():
    text = "g (float[2] x) => (float[2] y) <float low = {-1}> { h = Neg(x) y = Clip(h, low) }"
    for opset, kind in ((13, WIDE), (16, onnx_ir.DataType.BFLOAT16)):
        model, _ = cast(text, opset=opset, dtype="bf16", limit=2e-2)
        assert next(node for node in model.graph if node.op_type == "Clip").inputs[0].dtype == kind


def test_the_mean_of_a_norm_is_fp32_by_definition():
    text = """g (float[2,6] x, float[6] w) => (float[2,6] y, float[2,1] m) {
        h = Neg(x) y, m = LayerNormalization (h, w) }"""
    for dtype in ("fp16", "bf16"):
        cast(text, dtype=dtype, limit=2e-2)


def test_a_model_without_floats_is_left_alone_at_any_opset():
    model = parse_model('<ir_version: 8, opset_import: ["" : 7]> g (bool[2] x) => (bool[2] y) { y = Not(x) }')
    assert not CastModel(dtype="bf16").run(model).modified
