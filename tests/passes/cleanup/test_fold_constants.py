"""fold-constants: what follows from small constants is computed, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.serialization.text import print_model
from passopt.ir.weights.lazy_weight import LazyWeight, small_constant
from passopt.ir.weights.literals import Literal
from passopt.passes.cleanup import fold_constants
from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def folded(text, item=None, **settings):
    """(operators, constants by name, model) after every check of `check`."""
    model, _ = check(item or FoldConstants(), HEADER + text, **settings)
    constants = {name: small_constant(value) for name, value in model.graph.initializers.items()}
    return [node.op_type for node in model.graph], constants, model


def unchanged(text, item=None):
    model, result = check(item or FoldConstants(), HEADER + text)
    assert not result.modified
    return model


def test_reshape_target_becomes_a_constant(check_pass):
    check_pass(
        FoldConstants(),
        HEADER
        + """
        g (float[6] x) => (float[a,b] y) <int64 two = {2}, int64[1] three = {3}, int64[1] flat = {-1}> {
            f = Cast<to=1>(two)
            i = Cast<to=7>(f)
            v = Reshape(i, flat)
            target = Concat<axis=0>(v, three)
            same = Identity(x)
            y = Reshape(same, target)
        }""",
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("c = Constant<value = float[2] {1, 2}>() y = Add(x, c)", [1, 2]),
        ("c = Constant<value_floats = [1.0, 2.0]>() y = Add(x, c)", [1, 2]),
        ("c = Constant<value_float = 3.0>() y = Add(x, c)", 3),
        ("c = Neg(k) y = Add(x, c)", [-3, -4]),
        ("c = CastLike(i, x) y = Add(x, c)", [5, 6]),
        ("s = Shape(x) c = Cast<to=1>(s) y = Add(x, c)", [2]),
        ("c = Where(b, k, x2) y = Add(x, c)", [3, 8]),
    ],
)
def test_operators_on_constants_are_evaluated(body, expected):
    text = "g (float[2] x) => (float[2] y) <float[2] k = {3, 4}, int64[2] i = {5, 6},"
    text += " bool[2] b = {1, 0}, float[2] x2 = {7, 8}>"
    operators, constants, _ = folded(f"{text} {{ {body} }}")
    assert operators == ["Add"]
    assert constants["c"].tolist() == expected


def test_operators_without_effect_go():
    text = (
        "g (float[2] x, float[2] z) => (float[2] y) { a = Identity(x) b = Cast<to=1>(a) c = CastLike(b, z) y = Neg(c) }"
    )
    operators, _, model = folded(text)
    assert operators == ["Neg"]
    assert model.graph[0].inputs[0].name == "x"


def test_a_cast_to_another_dtype_stays():
    unchanged("g (float[2] x) => (double[2] y) { a = Cast<to=11>(x) y = Neg(a) }")


def test_graph_outputs_keep_their_operator():
    unchanged("g (float[2] x) => (float[2] y, float[2] c) <float[2] k = {3, 4}> { y = Identity(x) c = Neg(k) }")


def test_shared_constants_stay_for_the_other_user():
    operators, constants, _ = folded(
        "g (float[2] x) => (float[2] y) <float[2] k = {3, 4}> { c = Neg(k) a = Add(x, k) y = Mul(a, c) }"
    )
    assert operators == ["Add", "Mul"]
    assert {name: value.tolist() for name, value in constants.items()} == {"k": [3, 4], "c": [-3, -4]}


def test_dequantized_weights_are_never_folded():
    text = "g (float[2] x) => (float[2] y) <int8[2] codes = {3, -4}, float scale = {0.5}, float[2] k = {1, 2}> {"
    unchanged(text + " w = DequantizeLinear(codes, scale) y = Add(x, w) }")
    unchanged(text + " c = QuantizeLinear(k, scale) d = DequantizeLinear(c, scale) y = Add(x, d) }")


@pytest.mark.parametrize("kind", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_random_operators_are_never_folded(kind, parsed):
    model = parsed(f"g (float[2] x) => (float[2] y) <float[2] k = {{0.5, 0.5}}> {{ r = {kind}(k) y = Add(x, r) }}")
    assert not FoldConstants().run(model).modified


def with_weight(parsed, text, name="w"):
    """The initializer `name` as a weight of the checkpoint that must not be read."""
    model = parsed(text)
    value = model.graph.initializers[name]
    value.const_value = LazyWeight(Literal.of(value.const_value.numpy()), name)
    return model


def test_a_checkpoint_weight_is_never_read(parsed, monkeypatch):
    text = "g (float[2] x) => (float[2] y) <float[2] w = {3, 4}>"
    text += " { n = Neg(w) s = Shape(w) f = Cast<to=1>(s) a = Add(x, n) y = Mul(a, f) }"
    model = with_weight(parsed, text)
    monkeypatch.setattr(LazyWeight, "numpy", lambda self: pytest.fail("a weight was read"))
    monkeypatch.setattr(LazyWeight, "tobytes", lambda self: pytest.fail("a weight was read"))
    FoldConstants().run(model)
    assert [node.op_type for node in model.graph] == ["Neg", "Add", "Mul"]
    assert isinstance(model.graph.initializers["w"].const_value, LazyWeight)


def test_two_equal_checkpoint_weights_stay_two(parsed):
    text = "g (float[2] x) => (float[2] y) <float[2] v = {3, 4}, float[2] w = {3, 4}> { a = Add(x, v) y = Mul(a, w) }"
    model = with_weight(parsed, text)
    assert not FoldConstants().run(model).modified


def test_a_default_that_the_caller_may_replace_is_no_constant():
    text = "g (float[2] x, float[2] c) => (float[2] y) <float[2] c = {1, 2}, float[2] e = {1, 2}>"
    text += " { n = Neg(c) a = Add(n, e) y = Add(x, a) }"
    unchanged(text)


@pytest.mark.parametrize("first", ["float[K] w", "seq(float[K]) w"])
def test_a_length_is_read_from_no_input_with_a_default_and_from_no_sequence(first):
    """A default has a length of its own where nothing is fed, and the elements of a sequence have several."""
    default = ", float[2] w = {1, 2}" if first.startswith("float") else ""
    reads = "l = ReduceSum<keepdims=0>(w)" if default else "l0 = SequenceLength(w) l = Cast<to=1>(l0)"
    text = f"""g ({first}, float[K,3] x, float[K,4] z) => (float[K,3] y) <int64 k = {{0}}{default}> {{
        s = Shape<start=0, end=1>(z) c = Cast<to=1>(s) {reads} m = Mul(x, c) y = Add(m, l) }}"""
    model = read_model(HEADER + text)
    FoldConstants().run(model)
    sizes = [node for node in model.graph if node.op_type == "Shape"]
    assert [node.inputs[0].name for node in sizes] == ["x"]


def test_places_in_a_scalar_stay():
    """ONNX gives no axis for them, onnxruntime one."""
    unchanged("g (int64[1,1] x) => (int64[n,m] y) <int64 k = {3}> { z = NonZero(k) y = Concat<axis=0>(z, x) }")


def test_results_above_the_limit_are_not_even_computed(parsed, monkeypatch):
    monkeypatch.setattr(fold_constants, "evaluate", lambda *_: pytest.fail("it was computed"))
    model = parsed(
        "g (float[2] x) => (float[2] y) <int64[1] n = {3000000000}, float one = {1}> "
        "{ e = Expand(one, n) s = ReduceSum<keepdims=0>(e) y = Add(x, s) }"
    )
    assert not FoldConstants().run(model).modified


def test_the_limit_is_in_bytes():
    text = "g (float[4] x) => (float[4] y) <float[4] k = {1, 2, 3, 4}> { c = Neg(k) y = Add(x, c) }"
    assert folded(text, FoldConstants(limit=16))[0] == ["Add"]
    unchanged(text, FoldConstants(limit=15))


def test_equal_constants_become_one():
    text = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2},"
    text += " float[1,2] c = {1, 2}, float[2] d = {1, 3}, int64[2] e = {1, 2}>"
    text += "{ p = Add(x, a) q = Mul(p, b) r = Mul(q, d) y = Neg(r) }"
    operators, constants, _ = folded(text)
    assert operators == ["Add", "Mul", "Mul", "Neg"]
    assert sorted(constants) == ["a", "c", "d", "e"]


def test_zero_and_minus_zero_stay_two():
    unchanged(
        "g (float[2] x) => (float[2] y) <float a = {0}, float b = {-0.0}> { p = Div(x, a) q = Div(x, b) y = Add(p, q) }"
    )


def test_a_constant_that_is_an_output_stays():
    text = "g (float[2] x) => (float[2] y, float[2] b) <float[2] a = {1, 2}, float[2] b = {1, 2}>"
    text += " { p = Add(x, a) y = Mul(p, b) }"
    unchanged(text)


SIZES = """
    g (float[batch,seq,3] x, float[batch,seq,5] z) => (float[batch,seq,3] y, float[batch,seq,5] w)
    <int64[1] three = {3}, int64[1] five = {5}> {
        a = Neg(x)
        s1 = Shape<start=0, end=2>(x)
        t1 = Concat<axis=0>(s1, three)
        y = Reshape(a, t1)
        b = Neg(z)
        s2 = Shape<start=1, end=2>(z)
        s3 = Shape<start=0, end=1>(z)
        t2 = Concat<axis=0>(s3, s2, five)
        s4 = Shape<start=1, end=2>(x)
        t3 = Concat<axis=0>(s3, s4, five)
        b2 = Reshape(b, t2)
        w = Reshape(b2, t3)
    }"""


def test_lengths_are_read_from_one_input_once_and_first(check_pass):
    check_pass(FoldConstants(), HEADER + SIZES)


def test_hoisting_again_changes_nothing():
    model, _ = check(FoldConstants(), HEADER + SIZES)
    before = print_model(model)
    assert not FoldConstants().run(model).modified
    assert print_model(model) == before


def test_arithmetic_of_data_is_not_hoisted():
    text = "g (int64[n] x, float[3] f) => (int64[m] y) <int64[1] one = {1}>"
    text += " { a = Neg(f) c = Cast<to=7>(a) s = Add(c, c) y = Concat<axis=0>(s, one) }"
    unchanged(text)


def test_shape_of_known_dimensions_in_part():
    text = "g (float[batch,6,5] x) => (int64[2] y) <int64[2] z = {0, 0}> { s = Shape<start=-2>(x) y = Add(s, z) }"
    operators, constants, _ = folded(text)
    assert operators == ["Add"]
    assert constants["s"].tolist() == [6, 5]
    unchanged("g (float[batch,6] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }")


def test_folded_constants_have_dtype_and_shape():
    _, _, model = folded(
        "g (float16[2] x) => (float16[2] y) <float16[2] k = {15360, 16384}> { c = Neg(k) y = Add(x, c) }"
    )
    value = model.graph.initializers["c"]
    assert (value.dtype, str(value.shape)) == (onnx_ir.DataType.FLOAT16, "[2]")
    assert small_constant(value).tolist() == [-1, -2]


def test_a_constant_that_is_only_used_in_a_subgraph():
    text = """
    g (bool c, float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
        n = Neg(k)
        y = If (c) <then_branch = a () => (float[2] t) { t = Add(x, n) },
                        else_branch = b () => (float[2] e) { e = Identity(x) }>
    }"""
    operators, constants, _ = folded(text, feeds={"c": np.array(True)})
    assert operators == ["If"]
    assert constants["n"].tolist() == [-1, -2]


def test_equal_sizes_are_merged_only_if_every_attribute_is_equal():
    body = "g (float[a,b,3] x) => (float[a,3] y, float[b,3] z, float[a,3] w) <int64[1] three = {3}, float o = {1}> {"
    for name, axis in (("y", 0), ("z", 1), ("w", 0)):
        body += f" s{name} = Shape<start={axis}, end={axis + 1}>(x) t{name} = Concat<axis=0>(s{name}, three)"
        body += f" {name} = Expand(o, t{name})"
    operators, _, _ = folded(body + " }")
    assert (operators.count("Shape"), operators.count("Concat"), operators.count("Expand")) == (2, 2, 3)


def test_an_output_without_a_shape_is_left_without_one():
    """Its shape is part of the text: looking at it must not change it."""
    model = read_model(HEADER + "g (float[2] x) => (float[] y) <float o = {1}, int64[1] n = {3}> { y = Expand(o, n) }")
    model.graph.outputs[0].shape = None
    assert not FoldConstants().run(model).modified
    assert model.graph.outputs[0].shape is None


def test_lengths_that_shapes_state_are_folded_where_others_are_not():
    text = "g (float[batch,seq,6] x) => (int64[] y, int64[2] z)"
    text += "<int64 last = {-1}, int64 first = {0}, int64[1] four = {4}> {"
    text += " s = Shape(x) d = Gather(s, last) b = Gather(s, first) y = Add(d, b)"
    text += " i = Shape<start=2>(x) v = Concat<axis=0>(i, four) z = Neg(v) }"
    operators, constants, _ = folded(text)
    assert constants["d"].tolist() == 6
    assert constants["v"].tolist() == [6, 4]
    assert "Concat" not in operators
    assert "Add" in operators


def test_a_folded_bound_tells_a_length_and_that_another_number():
    """The slice is as long as its folded bounds say, which only the next sweep sees."""
    text = "g (float[batch,8] x) => (float[batch,4] y) <int64[1] two = {2}, int64[1] one = {1}, int64[1] zero = {0}> {"
    text += " s = Shape<start=1>(x) half = Div(s, two) part = Slice(x, zero, half, one)"
    text += " n = Shape<start=1>(part) f = Cast<to=1>(n) y = Mul(part, f) }"
    operators, constants, _ = folded(text)
    assert operators == ["Slice", "Mul"]
    assert constants["f"].tolist() == [4]


def test_a_sequence_is_no_constant(parsed):
    model = parsed(
        "g (int64 i) => (float[2] y) <float[2] k = {3, 4}> { s = SequenceConstruct(k) y = SequenceAt(s, i) }"
    )
    FoldConstants().run(model)
    assert [node.op_type for node in model.graph] == ["SequenceConstruct", "SequenceAt"]


def test_a_sum_of_lengths_is_one_in_any_order():
    text = 'g (float["past+seq",3] m, float["seq+past",3] x) => (float["past+seq",3] y) <int64[1] three = {3}> {'
    text += " s = Shape<end=1>(x) t = Concat<axis=0>(s, three) a = Neg(m) y = Reshape(a, t) }"
    _, _, model = folded(text)
    assert next(node for node in model.graph if node.op_type == "Shape").inputs[0].name == "m"


TABLE = "int64[2,3] t = {1, 2, 3, 4, 5, 6}, int64 i = {0}, int64[1] one = {1}, int64[1] two = {2}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("c = Gather<axis = 0>(t, i)", [1, 2, 3]),
        ("c = Gather<axis = 1>(t, i)", [1, 4]),
        ("r = Slice(t, one, two, one) c = Squeeze(r, one)", [2, 5]),
        ("r = Gather<axis = 0>(t, one) c = Squeeze(r)", [4, 5, 6]),
    ],
)
def test_rows_of_tables(body, expected):
    text = f"g (int64[{len(expected)}] x) => (int64[] y) <{TABLE}> {{ {body} y = Add(c, x) }}"
    operators, constants, _ = folded(text)
    assert operators == ["Add"]
    assert constants["c"].tolist() == expected


def at_opset(opset, text, **settings):
    header = HEADER.replace("21", str(opset)).replace("ir_version: 10", f"ir_version: {4 if opset < 10 else 10}")
    model, _ = check(FoldConstants(), header + text, **settings)
    return [node.op_type for node in model.graph]


SOFTMAX = "g (float[2,3,2] x) => (float[2,3,2] y) <float[2,3,2] k = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13}>"


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(("opset", "stays"), [(11, True), (12, True), (13, False), (21, False)])
def test_the_softmax_of_an_old_opset_stays(operator, opset, stays):
    found = at_opset(opset, f"{SOFTMAX} {{ c = {operator}<axis = 1>(k) y = Add(c, x) }}")
    assert (operator in found) == (stays or operator == "Hardmax")


def test_operators_that_the_evaluator_knows_badly_stay():
    body = "c = GroupNormalization<num_groups = 2>(k, s, b) y = Add(c, x)"
    unchanged(
        "g (float[1,4,2] x) => (float[1,4,2] y) <float[4] s = {1, 2, 1, 1}, float[4] b = {0, 1, 1, 1},"
        f" float[1,4,2] k = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ {body} }}"
    )


def test_a_slice_with_attributes_stays():
    body = "c = Slice<axes = [0], starts = [0], ends = [2]>(k) y = Add(c, x)"
    assert at_opset(9, f"g (float[2] x) => (float[2] y) <float[3] k = {{1, 2, 3}}> {{ {body} }}") == ["Slice", "Add"]


def test_texts_stay():
    unchanged('g (bool[2] x) => (bool[2] y) <string[2] k = {"a", "b"}> { c = Equal(k, k) y = And(c, x) }')
    body = "c = Cast<to = 8>(k) d = Cast<to = 1>(c) y = Add(d, x)"
    unchanged(f"g (float[2] x) => (float[2] y) <float[2] k = {{1, 2.5}}> {{ {body} }}")


@pytest.mark.parametrize(("attributes", "expected"), [("", [448, 1.5]), ("<saturate = 0>", [np.nan, 1.5])])
def test_casts_to_float8_saturate_unless_they_say_no(attributes, expected):
    body = f"like = Cast<to = 17>(one) b = CastLike{attributes}(k, like) c = Cast<to = 1>(b) y = Add(c, x)"
    text = f"g (float[2] x) => (float[2] y) <float[2] k = {{1000, 1.5}}, float one = {{1}}> {{ {body} }}"
    _, constants, _ = folded(text)
    if attributes:
        assert "c" not in constants  # NaN is no number to compute with
    else:
        assert constants["c"].tolist() == expected


@pytest.mark.parametrize(
    ("constants", "body"),
    [
        ("float[2] k = {300, -1.5}", "c = Cast<to = 2>(k) d = Cast<to = 1>(c)"),
        ("float[2] k = {3e9, 1}", "c = Cast<to = 6>(k) d = Cast<to = 1>(c)"),
        ("int64[2] k = {7, -7}, int64[2] o = {0, 2}", "c = Mod(k, o) d = Cast<to = 1>(c)"),
        ("float i = {0}, float n = {0.2}, float s = {0.1}", "d = Range(i, n, s)"),
        ("float[2] k = {nan, 1}", "d = Max(k, k)"),
    ],
)
def test_what_runtimes_do_in_different_ways_stays(constants, body):
    model = read_model(f"{HEADER}g (float[2] x) => (float[2] y) <{constants}> {{ {body} y = Add(d, x) }}")
    before = print_model(model)
    FoldConstants().run(model)
    assert print_model(model) == before


def test_integers_divide_as_in_runtimes():
    text = "g (int64[4] x) => (int64[4] y) <int64[4] k = {7, -7, 7, -7}, int64[4] o = {2, 2, -2, -2}>"
    _, constants, _ = folded(text + "{ c = Div(k, o) d = Mod(k, o) e = Add(c, d) y = Add(e, x) }")
    assert constants["e"].tolist() == [3 + 1, -3 + 1, -3 - 1, 3 - 1]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((1, 5, 2), [1, 3]), ((5, 1, -2), [5, 3]), ((0, 5, 2), [0, 2, 4]), ((3, 3, 1), []), ((2, 2, 2), [])],
)
@pytest.mark.parametrize("dtype", ["float", "int64"])
def test_a_range_of_whole_numbers_is_folded(bounds, expected, dtype):
    start, limit, step = bounds
    constants = f"{dtype} i = {{{start}}}, {dtype} n = {{{limit}}}, {dtype} s = {{{step}}}"
    text = f"g ({dtype}[{len(expected)}] x) => ({dtype}[{len(expected)}] y) <{constants}>"
    _, folded_constants, _ = folded(text + "{ r = Range(i, n, s) y = Add(r, x) }")
    assert folded_constants["r"].tolist() == expected


def test_a_range_with_one_value_for_two_bounds_is_folded():
    text = "g (float[1] x) => (float[1] y) <float i = {0}, float n = {1}>"
    _, constants, _ = folded(text + "{ r = Range(i, n, n) y = Add(r, x) }")
    assert constants["r"].tolist() == [0]


@pytest.mark.parametrize("bounds", ["{0}, float n = {1e9}, float s = {1}", "{0}, float n = {inf}, float s = {1}"])
def test_a_long_range_stays(bounds):
    operators, _, _ = folded(
        f"g (float[?] x) => (float[?] y) <float i = {bounds}> {{ r = Range(i, n, s) y = Add(r, x) }}"
    )
    assert operators == ["Range", "Add"]


def test_small_integers_wrap_as_in_runtimes():
    text = "g (int64[2] x) => (int64[2] y) <int64[2] k = {300, -129}>"
    _, constants, _ = folded(text + "{ b = Cast<to = 3>(k) c = Cast<to = 7>(b) y = Add(c, x) }")
    assert constants["c"].tolist() == [44, 127]


def test_long_sums_of_floats_stay():
    text = "g (float[1] x) => (float[1] y) <int64[1] n = {200}, int64[1] axis = {0}, float[1] tenth = {0.1}>"
    operators, _, _ = folded(text + "{ e = Expand(tenth, n) s = ReduceSum(e, axis) y = Add(s, x) }")
    assert operators == ["ReduceSum", "Add"]


def test_why_says_what_is_not_evaluated():
    text = "g (float[2,3,2] x) => (float[2,3,2] y) <float[2,3,2] k = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>"
    model = read_model(HEADER.replace("21", "12") + text + "{ c = Softmax<axis = 1>(k) y = Add(c, x) }")
    (refusal,) = FoldConstants().explain(model)
    assert refusal.reason == "Softmax is evaluated from opset 13 on, this model has 12; run legalize"


@pytest.mark.parametrize("end", [2**31 - 1, 2**63 - 1])
def test_a_slice_back_to_the_greatest_number_stays(end):
    """onnxruntime takes that for the start of the axis, ONNX for its end."""
    unchanged(f"""g (int64[4] x) => (int64[?] y)
        <int64[3] k = {{3, 1, 2}}, int64[1] s = {{-1}}, int64[1] e = {{{end}}}, int64[1] a = {{0}}> {{
        c = Slice(k, s, e, a, s) y = Concat<axis = 0>(c, x) }}""")
