"""fuse-rotary: halves turned by stored or computed angles become one operator with tables of half the width."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.passes.fusion.fuse_rotary import FuseRotary
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : %d]>\n'
ROTATE = """
    upper = Slice(x, h3, end, last)
    lower = Slice(x, h0, h3, last)
    n = Neg(upper)
    turned = Concat <axis = -1> (n, lower)
    a = Mul(x, cos)
    b = Mul(turned, sin)
    y = Add(a, b)"""
ANGLES = np.outer(np.arange(9), 1.0 / np.array([1, 3, 20])).astype(np.float32)
NUMBERS = {name: ",".join(map(str, np.tile(f(ANGLES), 2).reshape(-1))) for name, f in (("c", np.cos), ("s", np.sin))}
CONSTANTS = (
    "<int64[1] h0 = {0}, int64[1] h2 = {2}, int64[1] h3 = {3}, int64[1] end = {9223372036854775807},"
    "int64[1] last = {3}, int64[1] one = {1}, int64[2] sizes = {3, 3}, int64[2] uneven = {2, 4},"
    "int64[2] two_starts = {0, 0}, int64[2] two_ends = {3, 99}, int64[2] two_axes = {3, 2},"
    "int64[1] total = {7}, int64[2] front = {0, 1}, float[3] freq = {1, 0.3, 0.05},"
    f"float[9,6] c = {{{NUMBERS['c']}}}, float[9,6] s = {{{NUMBERS['s']}}}>"
)
LOOKED_UP = (
    "cg = Gather(c, position_ids) cos = Unsqueeze(cg, one) sg = Gather(s, position_ids) sin = Unsqueeze(sg, one)"
)
#: The inputs by which an exported decoder is known, whose position_ids are never negative.
DECODER = 'int64[batch,seq] input_ids, float[batch,1,past,2] "past.0.key"'
HEAD = f"g (float[batch,5,seq,6] x, {DECODER}, int64[batch,seq] position_ids) => (float[] y)"
COMPUTED = """
    f = Cast <to = 1> (position_ids)
    u = Unsqueeze(f, h2)
    angles = Mul(u, freq)
    both = Concat <axis = -1> (angles, angles)
    c1 = Cos(both)
    s1 = Sin(both)
    cos = Unsqueeze(c1, one)
    sin = Unsqueeze(s1, one)"""


def fused(body, head=HEAD, opset=23, constants=CONSTANTS, **settings):
    ids = {"position_ids": np.array([[4, 5, 6], [0, 1, 2]])} if "int64[batch,seq] position_ids" in head else {}
    settings.setdefault("feeds", ids)
    model, result = check(FuseRotary(), f"{HEADER % opset}{head}{constants} {{ {body} }}", **settings)
    return [node.op_type for node in model.graph], result, model


def declined(reason, body, head=HEAD, opset=23, **settings):
    _, result, _ = fused(body, head, opset, matches=0, **settings)
    assert any(reason in text for text in result.declines), result.declines


def test_stored_angles(check_pass):
    text = f"{HEADER % 23}{HEAD}{CONSTANTS} {{ {LOOKED_UP}{ROTATE} }}"
    check_pass(FuseRotary(), text, matches=1, feeds={"position_ids": np.array([[4, 5, 6], [0, 1, 8]])})


def test_computed_angles():
    operators, _, model = fused(COMPUTED + ROTATE, matches=1)
    assert operators == ["Cast", "Unsqueeze", "Mul", "Cos", "Sin", "RotaryEmbedding"]
    rotary = model.graph[-1]
    assert [str(value.shape) for value in rotary.inputs[1:3]] == ["[batch,seq,3]"] * 2


def test_halves_by_split_and_products_in_any_order():
    body = "lower, upper = Split <axis = -1> (x, sizes) n = Neg(upper) turned = Concat <axis = 3> (n, lower)"
    body += " b = Mul(sin, turned) a = Mul(cos, x) y = Add(b, a)"
    operators, _, _ = fused(LOOKED_UP + body.replace("axis = 3", "axis = -1"), matches=1)
    assert operators == ["RotaryEmbedding"]


def test_queries_and_keys_share_their_tables():
    head = HEAD.replace("x, ", "x, float[batch,3,seq,6] k, ").replace("(float[] y)", "(float[] y, float[] z)")
    keys = ROTATE
    for name in ("upper", "lower", "turned", "n", "a", "b"):
        keys = (
            keys.replace(f"{name} =", f"{name}k =")
            .replace(f"({name},", f"({name}k,")
            .replace(f", {name})", f", {name}k)")
        )
    keys = keys.replace("(x,", "(k,").replace("y =", "z =").replace("Neg(upper)", "Neg(upperk)")
    _, _, model = fused(LOOKED_UP + ROTATE + keys, head, matches=2)
    first, second = model.graph
    assert first.inputs[1] is second.inputs[1]
    assert first.inputs[2] is second.inputs[2]
    assert str(first.inputs[1].shape) == "[9,3]"


@pytest.mark.parametrize("axes", ["squeezed", "rows"])
def test_a_table_cut_to_the_sequence_becomes_whole(axes):
    cut = "cw = Slice(c, h0, total, h0) sw = Slice(s, h0, total, h0)"
    if axes == "squeezed":
        cut = "c4 = Unsqueeze(c, front) c5 = Slice(c4, h0, total, h2) cw = Squeeze(c5, front)"
        cut += " s4 = Unsqueeze(s, front) s5 = Slice(s4, h0, total, h2) sw = Squeeze(s5, front)"
    body = cut + LOOKED_UP.replace("(c,", "(cw,").replace("(s,", "(sw,") + ROTATE
    _, _, model = fused(body, matches=1)
    assert model.graph[-1].inputs[1].shape[0] == 9


def test_a_table_cut_at_the_front_stays_cut():
    cut = "cw = Slice(c, one, total, h0) sw = Slice(s, one, total, h0)"
    body = cut + LOOKED_UP.replace("(c,", "(cw,").replace("(s,", "(sw,") + ROTATE
    ids = {"position_ids": np.array([[3, 4, 5], [0, 1, 2]])}
    operators, _, _ = fused(body, feeds=ids, matches=1)
    assert operators.count("Slice") == 2


def test_positions_of_one_row_serve_every_batch():
    head = HEAD.replace("int64[batch,seq]", "int64[1,seq]")
    ids = {"position_ids": np.array([[4, 5, 6]])}
    for body in (LOOKED_UP, COMPUTED):
        operators, _, _ = fused(body + ROTATE, head, feeds=ids, matches=1)
        assert "Expand" in operators


def test_ids_in_32_bits():
    head = HEAD.replace("int64[batch,seq]", "int32[batch,seq]")
    ids = {"position_ids": np.array([[4, 5, 6], [0, 1, 2]], np.int32)}
    operators, _, _ = fused(LOOKED_UP + ROTATE, head, feeds=ids, matches=1)
    assert operators == ["Cast", "RotaryEmbedding"]


PARTIAL = (
    """
    part = Slice(x, h0, h6, last)
    rest = Slice(x, h6, end, last)"""
    + ROTATE.replace("(x,", "(part,").replace("y =", "o =")
    + """
    y = Concat <axis = -1> (o, rest)"""
)
WIDE = HEAD.replace("5,seq,6", "5,seq,10")
SIX = CONSTANTS[:-1] + ", int64[1] h6 = {6}, int64[1] h7 = {7}, int64[1] h9 = {9}>"


@pytest.mark.parametrize("angles", [LOOKED_UP, COMPUTED])
def test_a_head_that_is_turned_in_part(angles):
    operators, _, model = fused(angles + PARTIAL, WIDE, constants=SIX, matches=2)
    assert operators[-1] == "RotaryEmbedding"
    assert not {"Slice", "Concat"} & set(operators)
    assert model.graph[-1].attributes["rotary_embedding_dim"].as_int() == 6


def test_declines_parts_that_are_not_the_whole_head():
    body = LOOKED_UP + PARTIAL.replace("Slice(x, h6, end", "Slice(x, h6, h9")
    _, result, _ = fused(body, WIDE, constants=SIX, matches=1)
    assert "the parts 0:6:9 along axis 3 are not all of the 10 channels" in result.declines


def test_what_others_read_stays():
    head = HEAD.replace("(float[] y)", "(float[] y, float[batch,5,seq,6] turned, float[] z)")
    operators, _, model = fused(LOOKED_UP + ROTATE + " z = Exp(cos)", head, matches=1)
    assert {"RotaryEmbedding", "Concat", "Exp"} <= set(operators)
    assert [value.name for value in model.graph.outputs] == ["y", "turned", "z"]


def test_declines_an_older_opset():
    declined("needs opset 23", LOOKED_UP + ROTATE, opset=21)


def test_declines_three_axes():
    head = "g (float[batch,seq,6] x, float[batch,seq,6] cos, float[batch,seq,6] sin) => (float[] y)"
    body = ROTATE.replace("last", "h2")
    declined("is not [batch, heads, seq, channels]", body, head)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("h3", "h2", "0:2:"),
        ("last)", "h2)", "along axis 2"),
        ("h3, end, last", "h3, h3, last", "0:3:3 along"),
    ],
)
def test_declines_other_halves(old, new, reason):
    body = ROTATE.replace(old, new)
    head = "g (float[batch,5,6,6] x, float[batch,1,6,6] cos, float[batch,1,6,6] sin) => (float[] y)"
    model = read_model(f"{HEADER % 23}{head}{CONSTANTS} {{ {body} }}")
    result = FuseRotary().run(model)
    assert not result.modified
    assert any(reason in text for text in result.declines), result.declines


def test_declines_slices_along_several_axes():
    body = ROTATE.replace("Slice(x, h0, h3, last)", "Slice(x, two_starts, two_ends, two_axes)")
    body = body.replace("Slice(x, h3, end, last)", "Slice(x, two_ends, two_starts, two_axes)")
    head = "g (float[batch,5,seq,6] x, float[batch,1,seq,6] cos, float[batch,1,seq,6] sin) => (float[] y)"
    result = FuseRotary().run(read_model(f"{HEADER % 23}{head}{CONSTANTS} {{ {body} }}"))
    assert any("not one number" in text for text in result.declines), result.declines


def test_declines_an_uneven_split():
    body = "lower, upper = Split <axis = -1> (x, uneven) n = Neg(upper) turned = Concat <axis = -1> (n, lower)"
    body += " a = Mul(x, cos) b = Mul(turned, sin) y = Add(a, b)"
    declined("splits 6 channels into [2, 4], not into halves", LOOKED_UP + body)


def test_declines_angles_per_head():
    head = "g (float[batch,5,seq,6] x, float[batch,5,seq,6] cos, float[batch,1,seq,6] sin) => (float[] y)"
    declined("cos ['batch', 5, 'seq', 6] is not", ROTATE, head)


def test_declines_one_angle_for_all_positions():
    head = "g (float[batch,5,seq,6] x, float[batch,1,1,6] cos, float[batch,1,1,6] sin) => (float[] y)"
    declined("cos ['batch', 1, 1, 6] is not", ROTATE, head)


@pytest.mark.parametrize(
    ("dims", "lengths"), [("c,seq", {"c": 1}), ("batch,t", {"t": 1}), ("c,t", {"c": 1, "t": 1}), ("1,t", {"t": 1})]
)
@pytest.mark.parametrize("angles", [LOOKED_UP, COMPUTED], ids=["stored", "computed"])
def test_declines_angles_that_may_be_broadcast(dims, lengths, angles):
    """Ids with lengths of their own may be one row, or one position, which the products repeat."""
    head = HEAD.replace("batch,seq] position_ids", f"{dims}] position_ids")
    shape = [{"batch": 2, "seq": 3, "1": 1, **lengths}[name] for name in dims.split(",")]
    ids = np.arange(np.prod(shape)).reshape(shape)
    fused(angles + ROTATE, head, matches=0, feeds={"position_ids": ids}, lengths={"batch": 2, "seq": 3, **lengths})


def test_declines_angles_whose_halves_may_differ():
    head = "g (float[batch,5,seq,6] x, float[batch,1,seq,6] cos, float[batch,1,seq,6] sin) => (float[] y)"
    declined("the halves of cos are not known to be equal: it is an input", ROTATE, head)
    body = COMPUTED.replace("(angles, angles)", "(angles, other)").replace("both =", "other = Exp(angles) both =")
    declined("it joins different values", body + ROTATE)
    declined("it comes from Exp", COMPUTED.replace("Cos(both)", "Exp(both)") + ROTATE)


def test_declines_a_table_whose_halves_differ():
    changed = CONSTANTS.replace(f"s = {{{NUMBERS['s']}}}", f"s = {{0.5,{NUMBERS['s'].partition(',')[2]}}}")
    assert changed != CONSTANTS
    declined("the halves of the table s differ", LOOKED_UP + ROTATE, constants=changed)


def test_declines_different_positions():
    head = HEAD.replace("position_ids)", "position_ids, int64[batch,seq] others)")
    declined("cos is looked up at", LOOKED_UP.replace("(s, position_ids)", "(s, others)") + ROTATE, head)


# Positions that may be negative


PLAIN = "g (float[batch,5,seq,6] x, int64[batch,seq] ids{}) => (float[] y)"


def looked_up(ids):
    return LOOKED_UP.replace("position_ids", ids)


def test_ids_that_may_be_negative_are_looked_up_before():
    """The last row is -1 for Gather; RotaryEmbedding refuses it."""
    for ids in ([[4, -1, 6], [0, -9, 8]], [[4, 5, 6], [0, 1, 8]]):
        operators, _, model = fused(
            looked_up("ids") + ROTATE, PLAIN.format(""), feeds={"ids": np.array(ids)}, matches=1
        )
        assert operators == ["Gather", "Gather", "RotaryEmbedding"]
        assert str(model.graph[0].outputs[0].shape) == "[batch,seq,3]"


def test_a_cut_table_stays_cut_for_ids_that_may_be_negative():
    cut = "cw = Slice(c, h0, total, h0) sw = Slice(s, h0, total, h0)"
    body = cut + looked_up("ids").replace("(c,", "(cw,").replace("(s,", "(sw,") + ROTATE
    operators, _, _ = fused(body, PLAIN.format(""), feeds={"ids": np.array([[4, -1, 6], [0, -7, 3]])}, matches=1)
    assert operators == ["Slice", "Gather", "Slice", "Gather", "RotaryEmbedding"]


def test_position_ids_of_a_graph_that_is_no_decoder_may_be_negative():
    head = PLAIN.replace("ids", "position_ids").format("")
    feeds = {"position_ids": np.array([[4, -1, 6], [0, 1, 8]])}
    operators, _, _ = fused(LOOKED_UP + ROTATE, head, feeds=feeds, matches=1)
    assert operators == ["Gather", "Gather", "RotaryEmbedding"]


#: Ids that are computed, whether they are known not to be negative, and what is fed.
IDS = {
    "range": (
        "long = Shape<start = 2, end = 3>(x) l = Squeeze(long, h0) r = Range(k0, l, k1) i = Unsqueeze(r, h0)",
        True,
    ),
    "absolute clip": ("i = Clip(ids, k0)", True),
    "upper bound": ('m = Max(ids, k0) i = Clip(m, "", k1)', True),
    "negative upper bound": ('m = Max(ids, k0) k = Neg(k1) i = Clip(m, "", k)', False),
    "largest": ("i = Max(ids, k0)", True),
    "smallest": ("i = Min(ids, k1)", False),
    "difference": ("i = Sub(ids, k1)", False),
    "sum": ("m = Max(ids, k0) i = Add(m, k1)", True),
    "where": ("less = Less(ids, k0) m = Max(ids, k0) i = Where(less, k1, m)", True),
    "where not": ("less = Less(k0, ids) i = Where(less, ids, ids)", False),
    "narrow": ("m = Max(ids, k0) w = Cast<to = 3>(m) i = Cast<to = 6>(w)", False),
    "wide": ("m = Max(ids, k0) w = Cast<to = 6>(m) i = Cast<to = 7>(w)", True),
    "backwards": (
        "o = Shape<start = 2, end = 3>(x) l = Squeeze(o, h0) r = Range(k0, l, k1) m = Neg(r) i = Unsqueeze(m, h0)",
        False,
    ),
}


@pytest.mark.parametrize("kind", IDS)
def test_what_is_known_of_computed_ids(kind):
    body, is_known = IDS[kind]
    constants = CONSTANTS[:-1] + ", int64 k0 = {0}, int64 k1 = {1}>"
    feeds = {"ids": np.array([[4, -1, 6], [0, 1, 2]])}
    lengths = {"batch": 2, "seq": 3}
    operators, _, _ = fused(
        body + " " + looked_up("i") + ROTATE,
        PLAIN.format(""),
        constants=constants,
        feeds=feeds,
        lengths=lengths,
        matches=1,
    )
    assert ("Gather" in operators) != is_known
