"""canonicalize: what only moves data to where it is goes, and what does more stays."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.passes.cleanup.canonicalize import Canonicalize
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
X = "g (float[batch,seq,3,5] x, int64[2] fed) => (float[] y)"
CONSTANTS = (
    "<int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i4 = {4},"
    "int64[1] minus = {-1},"
    "int64[1] five = {5}, int64[1] end = {9223372036854775807}, int64[2] two = {1, 2}, int64[2] ends = {2, 3},"
    "int64[2] zeros = {0, 0}, int64[2] three_five = {3, 5}, int64[2] flat = {-1, 5}, int64[2] far = {2147483647, 3},"
    "int64[2] zero_first = {0, -1}, int64[3] kept = {0, -1, 15},"
    "int64[1] fifteen = {15}, float one = {1}, float two_ = {2}, float[1,1,1,1,1] deep = {1}, float[2] ones = {1, 1}>"
)


def operators(body, head=X, **settings):
    """The operators that are left, after every check of `check`; numbers agree."""
    model, result = check(Canonicalize(), f"{HEADER}{head}{CONSTANTS} {{ {body} }}", **settings)
    assert result.modified
    return [node.op_type for node in model.graph]


def declined(body, reason, head=X):
    model, result = check(Canonicalize(), f"{HEADER}{head}{CONSTANTS} {{ {body} }}", matches=0)
    assert any(reason in text for text in result.declines), result.declines
    return model


def untouched(body, head=X):
    check(Canonicalize(), f"{HEADER}{head}{CONSTANTS} {{ {body} }}", matches=0)


def test_what_moves_nothing_goes(check_pass):
    body = """
        a = Transpose <perm = [0, 1, 2, 3]> (x)
        b = Slice(a, i0, end, i1, i1)
        c = Concat <axis = 1> (b)
        d = CastLike(c, x)
        s = Shape <start = 0, end = 2> (x)
        target = Concat <axis = 0> (s, three_five)
        e = Expand(d, target)
        f = Reshape(e, target)
        m = Mul(one, f)
        q = Div(m, one)
        y = Exp(q)"""
    check_pass(Canonicalize(), f"{HEADER}{X}{CONSTANTS} {{ {body} }}", matches=9)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ([0, 2, 1, 3], [0, 2, 1, 3], ["Exp"]),
        ([1, 2, 3, 0], [1, 3, 0, 2], ["Transpose", "Exp"]),
        ([3, 0, 1, 2], [1, 2, 3, 0], ["Exp"]),
    ],
)
def test_transposes_become_one(first, second, left):
    body = f"a = Transpose <perm = {first}> (x) b = Transpose <perm = {second}> (a) y = Exp(b)"
    assert operators(body) == left


def test_declines_a_transpose_that_moves_axes():
    declined("y = Transpose <perm = [0, 1, 3, 2]> (x)", "perm [0, 1, 3, 2] moves axes")


def test_a_shared_transpose_stays_for_its_other_reader():
    head = "g (float[2,7,3,5] x) => (float[] y, float[] z)"
    body = "a = Transpose <perm = [0, 2, 1, 3]> (x) y = Transpose <perm = [0, 2, 3, 1]> (a) z = Exp(a)"
    assert operators(body, head) == ["Transpose", "Transpose", "Exp"]


def test_a_graph_output_keeps_its_name():
    model, _ = check(Canonicalize(), f"{HEADER}{X}{CONSTANTS} {{ y = Transpose <perm = [0, 1, 2, 3]> (x) }}", matches=1)
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("kind", ["Concat <axis = 1>", "Max", "Min", "Sum", "Mean"])
def test_variadic_operators_of_one_input(kind):
    assert operators(f"a = {kind} (x) y = Exp(a)") == ["Exp"]
    untouched(f"y = {kind} (x, x)")


@pytest.mark.parametrize("bounds", ["i0, end, i1", "i0, five, i3", "i0, end, minus", "zeros, far, two"])
def test_a_slice_of_everything_goes(bounds):
    assert operators(f"a = Slice(x, {bounds}) y = Exp(a)", matches=1) == ["Exp"]


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ("i1, end, i1", "takes 1 to 9223372036854775807 of axis 1"),
        ("i0, i2, i3", "takes 0 to 2 of axis 3"),
        ("i0, minus, i1", "takes 0 to -1 of axis 1"),
        ("i0, five, i1", "takes 0 to 5 of axis 1"),
        ("i0, computed, i1", "computed is not a small constant"),
    ],
)
def test_declines_a_slice_of_a_part(bounds, reason):
    declined(f"computed = Slice(fed, i0, i1, i0) y = Slice(x, {bounds})", reason)


def test_declines_steps():
    declined("y = Slice(x, i0, end, i3, i2)", "takes every [2]th element")
    body = "y = Slice(x, i1, end, i3, i1)"
    model, _ = check(Canonicalize(), f"{HEADER}{X}{CONSTANTS} {{ {body} }}", matches=1)
    assert len(model.graph[0].inputs) == 4


def test_an_expand_to_its_own_shape_goes():
    assert operators("s = Shape(x) e = Expand(x, s) y = Exp(e)") == ["Exp"]


def test_declines_an_expand_that_may_grow():
    head = "g (float[batch,1,3,5] x, float[batch,seq,3,5] other) => (float[] y)"
    declined("s = Shape(other) y = Expand(x, s)", "['batch', 1, 3, 5] becomes ['batch', 'seq', 3, 5]", head)
    head = "g (float[batch,n,3,5] x, float[batch,seq,3,5] other) => (float[] y)"
    declined("s = Shape(other) y = Expand(x, s)", "becomes ['batch', None, 3, 5]", head)


def test_declines_a_reshape_to_other_axes():
    declined("y = Reshape(x, flat)", "['batch', 'seq', 3, 5] becomes")


def test_declines_a_reshape_whose_lengths_are_unknown():
    untouched("y = Reshape(x, fed)", "g (float[batch,seq,3,5] x, int64[4] fed) => (float[a,b,c,d] y)")


def test_reshapes_become_one():
    assert operators("a = Reshape(x, kept) y = Reshape(a, flat)") == ["Reshape"]
    assert operators("a = Reshape(x, kept) s = Shape(x) b = Reshape(a, s) y = Exp(b)") == ["Exp"]


def test_allowzero_is_kept():
    head = "g (float[n,3,5] x) => (float[] y)"
    body = "a = Reshape(x, flat) s = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (s, fifteen)"
    body += " y = Reshape <allowzero = 1> (a, t)"
    text = f"{HEADER}{head}{CONSTANTS} {{ {body} }}"
    model, _ = check(Canonicalize(), text, matches=1, lengths={"n": 0})
    assert model.graph[-1].attributes["allowzero"].as_int() == 1


def test_declines_reshapes_whose_middle_is_read():
    head = X.replace("(float[] y)", "(float[] y, float[] z)")
    declined("a = Reshape(x, kept) y = Reshape(a, flat) z = Exp(a)", "others read a", head)


def test_declines_a_zero_that_means_the_shape_between():
    declined("a = Reshape(x, flat) y = Reshape(a, zero_first)", "may hold a 0, which means a length of the reshape")


KEY = "g (float[batch,3,seq,5] x) => (float[] y)"
MERGED = "b = Shape <start = 0, end = 1> (x) s = Shape <start = 2, end = 3> (x)"
BODY = MERGED + " m = Concat <axis = 0> (minus, s, five) r = Concat <axis = 0> (b, i3, five, s)"
THREE = " a = Reshape(x, m) t = Transpose <perm = [0, 2, 1]> (a) y = Reshape(t, r)"


def test_a_transpose_in_three_axes_becomes_direct():
    model, _ = check(Canonicalize(), f"{HEADER}{KEY}{CONSTANTS} {{ {BODY}{THREE} }}", matches=1)
    assert [node.op_type for node in model.graph] == ["Transpose"]
    assert model.graph[0].attributes["perm"].as_ints() == (0, 1, 3, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("m = Concat <axis = 0> (minus, s, five)", "m = Concat <axis = 0> (minus, five, s)"), "is not merged to"),
        (("(b, i3, five, s)", "(b, five, i3, s)"), "the result is not [batch, heads, channels, length]"),
    ],
)
def test_declines_another_transpose_in_three_axes(change, reason):
    declined((BODY + THREE).replace(*change), reason, KEY)


def test_declines_three_axes_out_of_three():
    head = "g (float[3,seq,5] x) => (float[] y)"
    body = "a = Reshape(x, kept) t = Transpose <perm = [0, 2, 1]> (a) y = Reshape(t, flat)"
    declined(body, "does not have four axes", head)


def test_a_squeeze_undoes_an_unsqueeze():
    assert operators("a = Unsqueeze(x, ends) b = Squeeze(a, ends) y = Exp(b)") == ["Exp"]
    assert operators("a = Unsqueeze(x, minus) b = Squeeze(a, i4) y = Exp(b)") == ["Exp"]


def test_declines_a_squeeze_of_another_axis():
    head = "g (float[1,seq] x) => (float[] y)"
    declined("a = Unsqueeze(x, i2) y = Squeeze(a, i0)", "adds axes [2] and removes [0]", head)


@pytest.mark.parametrize("body", ["y = Mul(x, two_)", "y = Mul(two_, x)", "y = Div(x, two_)"])
def test_declines_other_factors(body):
    declined(body, "two_ is 2.0, not 1")


def test_declines_a_one_that_adds_axes():
    declined("y = Mul(x, deep)", "x may be broadcast to 5 axes")
    untouched("y = Div(one, x)")
    untouched("y = Mul(x, ones)", "g (float[seq,2] x) => (float[] y)")


def test_cast_like_becomes_a_cast_or_nothing():
    head = X.replace("float[] y", "int64[] y")
    assert operators("c = CastLike(x, fed) y = Neg(c)", head) == ["Cast", "Neg"]
    assert operators("c = CastLike(x, x) y = Neg(c)") == ["Neg"]


def test_a_look_up_by_rows_becomes_gather():
    head = "g (float[7,5] table, int64[batch,seq] ids) => (float[] y)"
    ids = {"ids": np.array([[0, 6, -1], [-7, 3, 2]])}
    for axis in ("minus", "i2"):
        assert operators(f"u = Unsqueeze(ids, {axis}) y = GatherND(table, u)", head, feeds=ids) == ["Gather"]


def test_declines_a_look_up_by_several_indices():
    head = "g (float[7,5,4] table, int64[2] ids) => (float[1,4] y)"
    declined("u = Unsqueeze(ids, i0) y = GatherND(table, u)", "does not hold one index per row", head)
    head = "g (float[3,5] table, int64[3] ids) => (float[] y)"
    untouched("u = Unsqueeze(ids, minus) y = GatherND <batch_dims = 1> (table, u)", head)


def test_shapes_that_nobody_states_are_no_reason(parsed):
    model = parsed("g (float[a,b] x, int64[2] s) => (float[c,d] y) { r = Reshape(x, s) y = Expand(r, s) }")
    for node in model.graph:
        node.outputs[0].shape = onnx_ir.Shape([None, None])
    assert not Canonicalize().run(model).modified


@pytest.mark.parametrize(
    "body", ["d = Dropout(x) y = Neg(d)", "d, m = Dropout(x, half) y = Neg(d)", "d = Dropout(x, half, off) y = Neg(d)"]
)
def test_a_dropout_of_inference_goes(body):
    constants = "<float half = {0.5}, bool off = {0}>"
    model, result = check(Canonicalize(), f"{HEADER}{X}{constants} {{ {body} }}")
    assert result.modified
    assert [node.op_type for node in model.graph] == ["Neg"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("y = Dropout(x, half, on)", "float[] y", "y is in training mode"),
        ("y = Dropout(x, half, fed_flag)", "float[] y", "fed_flag is not a small constant"),
        ("d, m = Dropout(x, half) y = Neg(d) z = Not(m)", "float[] y, bool[] z", "the mask m is read"),
    ],
)
def test_declines_a_dropout_that_may_train_or_tell(parsed, body, outputs, reason):
    head = f"g (float[2,3] x, bool fed_flag) => ({outputs}) <float half = {{0.5}}, bool on = {{1}}>"
    result = Canonicalize().run(parsed(f"{head} {{ {body} }}"))
    assert not result.modified
    assert any(reason in text for text in result.declines), result.declines


ANY = "g (float[a,b] x, float[?] u, int64[2] s, float[n,2] z) => (float[] y)"


def kept(body, count, head=ANY, **settings):
    """Check that operators stay which the lengths of a run need; the numbers agree for these lengths."""
    model, _ = check(Canonicalize(), f"{HEADER}{head}{CONSTANTS} {{ {body} }}", **settings)
    assert len(model.graph) == count


@pytest.mark.parametrize("length", [1, 2, 5])
def test_an_expand_to_one_keeps_a_length_that_is_not_known(length):
    feeds = {"u": np.arange(length, dtype=np.float32)}
    kept("e = Expand(u, i1) v = Slice(e, i0, i1, i0) y = Neg(v)", 3, feeds=feeds)


@pytest.mark.parametrize("lengths", [{"a": 6, "b": 4, "n": 6}, {"a": 1, "b": 8, "n": 0}, {"a": 3, "b": 1, "n": 3}])
def test_a_cast_to_bool_is_no_length(lengths):
    body = "t = Shape<end = 1>(x) b = Cast<to = 9>(t) i = Cast<to = 7>(b) k = Concat<axis = 0>(i, minus) "
    kept(body + "r = Reshape(x, k) y = Neg(r)", 6, lengths=lengths)


def test_an_expand_to_lengths_of_another_value_stays():
    head = "g (float[?,2] x, int64[2] fed, float[n,2] z) => (float[] y)"
    body = "t = Shape(z) e = Expand(x, t) y = Neg(e)"
    kept(body, 3, head, feeds={"x": np.ones((4, 2), np.float32), "z": np.ones((1, 2), np.float32)})


@pytest.mark.parametrize("target", [[0, -1], [-1, 0], [2, 12], [0, 0]])
def test_reshapes_stay_apart_where_a_target_that_is_fed_may_hold_a_zero(target):
    head = "g (float[2,3,4] x, int64[2] s) => (float[] y)"
    body = "k = Concat<axis = 0>(i6, i4) a = Reshape(x, k) b = Reshape(a, s) y = Neg(b)".replace("i6", "six")
    text = f"{HEADER}{head}{CONSTANTS[:-1]}, int64[1] six = {{6}}> {{ {body} }}"
    s = np.array([6, 4] if target == [0, 0] else target, np.int64)
    model, result = check(Canonicalize(), text, feeds={"s": s})
    assert [node.op_type for node in model.graph].count("Reshape") == 2
    assert any("may hold a 0" in reason for reason in result.declines)


@pytest.mark.parametrize(("n", "left"), [(0, 2), (3, 2)])
def test_reshapes_stay_apart_where_a_length_of_another_value_may_be_zero(n, left):
    head = "g (float[2,3,4] x, float[n,2] z) => (float[] y)"
    body = "t = Shape<end = 1>(z) k = Concat<axis = 0>(t, minus) a = Reshape(x, six_four) b = Reshape(a, k) y = Neg(b)"
    text = f"{HEADER}{head}{CONSTANTS[:-1]}, int64[2] six_four = {{6, 4}}> {{ {body} }}"
    model, _ = check(Canonicalize(), text, lengths={"n": n})
    assert [node.op_type for node in model.graph].count("Reshape") == left


def test_reshapes_become_one_where_a_zero_means_the_same_length():
    head = "g (float[batch,6,4] x) => (float[] y)"
    body = "t = Shape<end = 1>(x) k = Concat<axis = 0>(t, i3, minus) a = Reshape(x, kept) b = Reshape(a, k) y = Neg(b)"
    text = f"{HEADER}{head}{CONSTANTS.replace('{0, -1, 15}', '{0, -1, 12}')} {{ {body} }}"
    for batch in (2, 1):
        model, _ = check(Canonicalize(), text, lengths={"batch": batch})
        assert [node.op_type for node in model.graph].count("Reshape") == 1


@pytest.mark.parametrize("attributes", ["", "<saturate = 1>", "<saturate = 0>"])
def test_a_cast_like_rounds_as_it_did(attributes):
    head = "g (float[2] x, float[1] one) => (float[] y)"
    body = f"like = Cast<to = 17>(one) c = CastLike{attributes}(x, like) y = Cast<to = 1>(c)"
    feeds = {"x": np.array([1000, 1.5], np.float32)}
    model, _ = check(Canonicalize(), f"{HEADER}{head} {{ {body} }}", feeds=feeds, matches=1)
    cast = next(node for node in model.graph if node.outputs[0].name == "c")
    assert cast.op_type == "Cast"
    assert ("saturate" in cast.attributes) == bool(attributes)


@pytest.mark.parametrize("steps", ["", ", one"])
@pytest.mark.parametrize(("k", "start", "end"), [(5, 1, 2), (5, 1, 1), (1, -1, 9), (5, -2, 9)])
def test_a_slice_of_opset_10_that_cuts_an_axis_with_a_symbol_stays(steps, k, start, end):
    """ONNX's inference says of this opset only that the axis keeps its symbol."""
    text = f"""<ir_version: 8, opset_import: ["" : 10]> g (float[n,k] x) => (float[?,?] y)
        <int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] one = {{1}}> {{
        c = Slice(x, s, e, one{steps}) y = Neg(c) }}"""
    model, _ = check(Canonicalize(), text, lengths={"k": k})
    assert [node.op_type for node in model.graph] == ["Slice", "Neg"]
