"""Shapes that a model does not state, and integer vectors read element by element."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.graph.completion import complete_outputs, complete_types
from passopt.ir.serialization.text import parse_model, print_model
from passopt.ir.shapes.dimensions import dimensions, merged_shapes
from passopt.ir.shapes.elements import ConstantElement, DimOf, elements, known_numbers

HEADER = '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>\n'


def values(text):
    """Completed values by name."""
    model = parse_model(HEADER + text)
    complete_types(model)
    found = {value.name: value for node in model.graph for value in node.outputs}
    return {**found, **model.graph.initializers, **{value.name: value for value in model.graph.inputs}}


def described(value):
    """`elements` in short: numbers, (value, axis) or None."""
    found = elements(value)
    if found is None:
        return None
    return [
        item.number if isinstance(item, ConstantElement) else (item.value.name, item.axis) if item else None
        for item in found
    ]


CONSTANTS = "<int64 i0 = {0}, int64[1] i1 = {1}, int64[2] pair = {6, 12}, int64[1] far = {9}, int64[1] axis = {0},"
CONSTANTS += "int64[2] kept = {-1, -1},"
CONSTANTS += "int64[3,2] table = {1, 2, 3, 4, 5, 6}, int64[1] back = {-1}, int64[1] behind = {-9}, int64[1] two = {2},"
CONSTANTS += "int64[0] none = {}, int64[1] huge = {4294967297}, int64[3] sixes3 = {6, 6, 6},"
CONSTANTS += "int64[2] sixes = {6, 6}, int64[1] last = {-1}>"
BODY = "g (int64[batch,seq,4] x, int64[3] fed) => (int64[p] y) " + CONSTANTS


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("v = Shape(x)", [("x", 0), ("x", 1), ("x", 2)]),
        ("v = Shape<start=1, end=2>(x)", [("x", 1)]),
        ("v = Shape<start=-2>(x)", [("x", 1), ("x", 2)]),
        ("s = Shape(x) v = Gather(s, i0)", [("x", 0)]),
        ("s = Shape(x) v = Gather(s, far)", [None]),
        ("s = Shape(x) v = Slice(s, i1, far, axis)", [("x", 1), ("x", 2)]),
        ("s = Shape<end=1>(x) v = Concat<axis=0>(s, pair, i1)", [("x", 0), 6, 12, 1]),
        ("s = Shape<end=1>(x) q = Squeeze(s) u = Unsqueeze(q, i0) v = Cast<to=7>(u)", [("x", 0)]),
        ("v = Identity(fed)", [None, None, None]),
        ("s = Shape<end=2>(x) c = Cast<to=6>(s) v = Cast<to=7>(c)", [("x", 0), ("x", 1)]),
        ("s = Shape<end=2>(x) c = Cast<to=1>(s) v = Cast<to=7>(c)", [None, None]),
        ("s = Shape<end=2>(x) c = Cast<to=9>(s) v = Cast<to=7>(c)", [None, None]),
        ("s = Shape<end=2>(x) c = Cast<to=3>(s) v = Cast<to=7>(c)", [None, None]),
        ("s = Shape<end=2>(x) e = Equal(s, kept) v = Where(e, pair, s)", [("x", 0), ("x", 1)]),
        ("e = Equal(pair, sixes) v = Where(e, kept, pair)", [-1, 12]),
        ("s = Shape<end=2>(x) e = Equal(s, pair) v = Where(e, pair, s)", [None, None]),
        ("s = Shape(x) v = Mul(s, s)", [None, None, None]),
        ("v = Concat<axis=0>(pair, fed)", [6, 12, None, None, None]),
        ("v = Gather<axis=0>(table, i0)", [None, None]),
        ("v = Gather<axis=1>(table, i0)", [None, None, None]),
        ("s = Shape(x) u = Unsqueeze(s, i1) v = Gather<axis=0>(u, i0)", [None]),
        ("v = Slice(table, i1, far, axis)", None),
        ("s = Shape(x) v = Slice(s, last, behind, axis, back)", [("x", 2), ("x", 1), ("x", 0)]),
        ("s = Shape(x) v = Slice(s, axis, far, axis, two)", [("x", 0), ("x", 2)]),
        ("s = Shape(x) u = Unsqueeze(s, i0) v = Reshape(u, last)", [None, None, None]),
        ("s = Shape<end=1>(x) v = Reshape(s, none)", [("x", 0)]),
        ("big = Identity(huge) v = Cast<to=6>(big)", [None]),
        ("s = Shape(x) m = Mod(s, sixes3) v = Cast<to=7>(m)", [None, None, None]),
    ],
)
def test_elements_of_a_vector(body, expected):
    found = values(BODY + f"{{ {body} y = Identity(v) }}")
    assert described(found["v"]) == expected


def test_elements_of_constants_know_their_place():
    first, second = elements(values(BODY + "{ y = Identity(fed) }")["pair"])
    assert (first.number, first.index, second.number, second.index) == (6, 0, 12, 1)
    assert isinstance(first, ConstantElement)


def test_no_elements_without_a_length():
    text = "g (int64[n] x, float[2] f) => (int64[n] y) <float[2] c = {1, 2}, int64[17] long = {%s}>"
    text += " { v = Neg(x) y = Neg(v) }"
    found = values(text % ",".join(["1"] * 17))
    assert [elements(found[name]) for name in ("v", "c", "long")] == [None, None, None]
    assert elements(None) is None


def test_missing_types_and_shapes_are_filled_in():
    text = "g (float[batch,6,5] x) => (float[p,q] y) <int64[2] target = {0, -1}, float[30,7] w = {%s}>"
    text += "{ a = Relu(x) r = Reshape(a, target) m = MatMul(r, w) y = Cast<to=1>(m) }"
    found = values(text % ",".join(["1"] * 210))
    assert [str(found[name].shape) for name in ("a", "r", "m")] == ["[batch,6,5]", "[batch,30]", "[batch,7]"]
    assert found["m"].dtype == onnx_ir.DataType.FLOAT


def test_computed_targets_of_reshape_and_expand_are_read():
    text = "g (float[batch,seq,12] x, float[1,seq,1] z) => (float[a,b,c,d] y, float[e,f,g] w)"
    text += "<int64[2] heads = {4, 3}, int64[1] five = {5}> {"
    text += "s = Shape<end=2>(x) target = Concat<axis=0>(s, heads) r = Reshape(x, target) y = Relu(r)"
    text += " b = Shape<end=1>(x) q = Shape<start=1, end=2>(x)"
    text += " t = Concat<axis=0>(b, q, five) e = Expand(z, t) w = Relu(e) }"
    found = values(text)
    assert str(found["r"].shape) == "[batch,seq,4,3]"
    assert str(found["e"].shape) == "[batch,seq,5]"


def test_what_a_model_states_is_kept():
    model = parse_model(HEADER + "g (float[batch,6] x) => (float[n,6] y) { a = Relu(x) y = Neg(a) }")
    model.graph[0].outputs[0].shape = onnx_ir.Shape(["mine", None])
    complete_types(model)
    assert str(model.graph[0].outputs[0].shape) == "[mine,6]"
    assert str(model.graph.outputs[0].shape) == "[n,6]"


UNSTATED = "g (float[batch,6] x) => (float[] y, float[] z) { a = Relu(x) y = Neg(a) z = Exp(y) }"


def test_graph_outputs_are_completed_where_a_model_is_read():
    model = parse_model(HEADER + UNSTATED)
    assert [str(value.shape) for value in model.graph.outputs] == ["[batch,6]", "[batch,6]"]
    assert print_model(parse_model(print_model(model))) == print_model(model)


def test_completing_types_for_a_pass_leaves_the_text_alone():
    model = parse_model(HEADER + UNSTATED)
    for value in (*model.graph.outputs, *model.graph[0].outputs):
        value.shape = None
    before = print_model(model)
    complete_types(model)
    assert print_model(model) == before
    assert [value.shape for value in model.graph.outputs] == [None, None]
    assert str(model.graph[0].outputs[0].shape) == "[batch,6]"
    complete_outputs(model)
    assert str(model.graph.outputs[1].shape) == "[batch,6]"


def test_operators_that_nobody_knows_are_passed_over():
    found = values(
        "g (float[3] x) => (float[3] y) { a = local.mystery(x) b = Relu(a) c = Neg(x) y = Add(b, c) }"
        '\n<opset_import: ["" : 21], domain: "local"> mystery (p) => (q) { q = Relu(p) }'
    )
    assert (found["a"].shape, found["b"].shape) == (None, None)
    assert str(found["c"].shape) == "[3]"


def test_shapes_are_merged_by_what_is_known():
    stated, other = onnx_ir.Shape(["batch", None, 3]), onnx_ir.Shape(["n", 4, None])
    assert str(merged_shapes(stated, other)) == "[batch,4,3]"
    assert merged_shapes(stated, onnx_ir.Shape([2])) is stated
    assert merged_shapes(None, other) is other
    assert merged_shapes(stated, None) is stated


def test_dimensions_are_numbers_names_and_unknowns():
    value = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", None, 3]))
    assert dimensions(value) == ["batch", None, 3]
    assert dimensions(onnx_ir.Value(name="x")) is None


def test_dim_of_names_value_and_axis():
    found = values(BODY + "{ v = Shape<start=1>(x) y = Identity(v) }")
    first, _ = elements(found["v"])
    assert isinstance(first, DimOf)
    assert (first.value.name, first.axis) == ("x", 1)
    assert np.all(dimensions(first.value) == ["batch", "seq", 4])


def test_numbers_that_shapes_state_are_known():
    body = "{ s = Shape(x) i = Gather(s, last) v = Concat<axis=0>(i, pair) t = Shape(x) y = Identity(v) }"
    found = values(BODY + body)
    assert known_numbers(found["v"]) == [4, 6, 12]
    assert known_numbers(found["t"]) is None
    assert known_numbers(found["fed"]) is None
    assert known_numbers(None) is None


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("seq+past", "past+seq"),
        ("past + seq", "past+seq"),
        ("seq", "seq"),
        ("(b+a)*2", "(b+a)*2"),
        ("(b+d)*c+(a+e)*f", "(b+d)*c+(a+e)*f"),
    ],
)
def test_sums_of_symbols_have_one_order(symbol, expected):
    assert dimensions(onnx_ir.Value(name="x", shape=onnx_ir.Shape([symbol]))) == [expected]


def reshaped(shape, target, head="int64[9] unused"):
    """The shape of `shape` after a reshape to a computed target."""
    text = f"g (float[{shape}] x, {head}) => (float[p] y) <int64[1] minus = {{-1}}, int64[1] three = {{3}},"
    text += " int64[1] six = {6}, int64[1] two = {2}, int64[1] zero = {0}> {"
    text += f" b = Shape<end=1>(x) m = Mul(b, six) h = Div(b, two) {target} y = Relu(r) }}"
    return str(values(text)["r"].shape)


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ("batch,6,seq,10", "t = Concat<axis=0>(m, minus, six) r = Reshape(x, t)", "[6*batch,?,6]"),
        (
            "batch,6,seq,10",
            "s = Shape<start=2,end=3>(x) t = Concat<axis=0>(m, s, minus) r = Reshape(x, t)",
            "[6*batch,seq,10]",
        ),
        ("batch,6,seq,10", "s = Shape<start=2>(x) t = Concat<axis=0>(minus, s) r = Reshape(x, t)", "[6*batch,seq,10]"),
        (
            "6*batch,seq,10",
            "s = Shape<start=1>(x) t = Concat<axis=0>(minus, six, s) r = Reshape(x, t)",
            "[batch,6,seq,10]",
        ),
        ("6*batch,seq", "t = Concat<axis=0>(h, two, minus) r = Reshape(x, t)", "[3*batch,2,seq]"),
        ("2*past+seq,3", "t = Concat<axis=0>(two, minus) r = Reshape(x, t)", "[2,?]"),
        ("seq,7", "t = Concat<axis=0>(minus, two) r = Reshape(x, t)", "[?,2]"),
        ("seq,6", "t = Concat<axis=0>(zero, minus) r = Reshape(x, t)", "[seq,6]"),
        ("seq,6", "s = Shape(x) t = Concat<axis=0>(s, minus) r = Reshape(x, t)", "[seq,6,1]"),
    ],
)
def test_lengths_that_a_reshape_infers(shape, target, expected):
    shape = shape.replace("6*batch", '"6*batch"').replace("2*past+seq", '"2*past+seq"')
    found = reshaped(shape, target).replace("None", "?")
    assert found == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("1,seq,1", "[batch,seq,5]"),
        ("batch,seq,5", "[batch,seq,5]"),
        ("n,seq,5", "[None,seq,5]"),
        ("4,seq,5", "[4,seq,5]"),
    ],
)
def test_an_expand_takes_the_longer_length(shape, expected):
    text = f"g (float[{shape}] x, float[batch,seq] z) => (float[p] y) <int64[1] five = {{5}}>"
    found = values(text + "{ s = Shape(z) t = Concat<axis=0>(s, five) e = Expand(x, t) y = Relu(e) }")
    assert str(found["e"].shape) == expected


def test_a_slice_keeps_the_axes_that_it_does_not_cut():
    text = "g (float[batch,seq,6] x, int64[1] n) => (float[p] y) <int64[1] axes = {-2}, int64[1] zero = {0}>"
    found = values(text + "{ s = Slice(x, zero, n, axes) y = Relu(s) }")
    assert str(found["s"].shape) == "[batch,None,6]"
    found = values(text + "{ s = Slice(x, zero, n) y = Relu(s) }")
    assert "seq" not in str(found["s"].shape)


@pytest.mark.parametrize(
    ("call", "expected"),
    [("i0, n, i1", "[batch]"), ("i1, n, i1", "[?]"), ("i0, n, i2", "[?]"), ("i0, m, i1", "[?]")],
)
def test_a_range_up_to_a_length_is_as_long(call, expected):
    """With another start or step, or with a limit that is computed, it is not known to be."""
    text = f"""g (float[batch,seq] x) => (int64[k] y) <int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}> {{
        s = Shape(x) n = Gather(s, i0) m = Add(n, i1) v = Range({call}) y = Neg(v) }}"""
    assert str(values(text)["v"].shape).replace("None", "?") == expected


@pytest.mark.parametrize(("dims", "expected"), [("batch,seq", "[batch,1,?]"), ("rows,seq", "[?,1,?]")])
def test_a_symbol_of_a_target_is_believed_if_the_tensor_was_empty_with_it(dims, expected):
    """Whoever flattens a tensor hides its lengths; it is empty all the same if the batch is 0."""
    text = f"""g (float[{dims}] x, float[batch,3] z) => (float[k,m,n] y)
        <int64[1] all = {{-1}}, int64[2] rest = {{1, -1}}> {{
        f = Reshape(x, all) b = Shape<end=1>(z) t = Concat<axis=0>(b, rest) v = Reshape(f, t) y = Neg(v) }}"""
    assert str(values(text)["v"].shape).replace("None", "?") == expected


def test_a_value_of_unknown_dtype_gets_no_shape(caplog):
    """A file cannot hold such a shape, and onnx-ir warns of it whenever it writes the model."""
    model = parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[n,6] x) => (float[] y)
        <int64[2] s = {2, -1}> {
        z = local.f(x)
        r = Reshape(z, s) y = Neg(r) }""")
    complete_types(model)
    reshaped = model.graph[1].outputs[0]
    assert (reshaped.type, reshaped.shape) == (None, None)
    onnx_ir.to_proto(model)
    assert not caplog.records
