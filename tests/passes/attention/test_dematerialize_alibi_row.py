"""dematerialize-alibi-row: a stored row of biases becomes slopes times positions, if it is one."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.graph.alibi import alibi_slopes
from passopt.passes.attention.dematerialize_alibi_row import DematerializeAlibiRow
from passopt.testing.checking import check, read_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
HEAD = "g (float[batch,total] x, float[batch,5,3,total] scores) => (float[] y)"
LENGTH = 12
START = " n = Shape<start=1, end=2>(x) start = Sub(longest, n)"
BIAS = " bias = Slice(row, start, end, axis)"
ADD = " y = Add(scores, bias)"


def row(heads=5, slopes=None, dtype=np.float32):
    slopes = alibi_slopes(heads) if slopes is None else np.asarray(slopes, np.float32)
    return (np.asarray(slopes)[:, None] * np.arange(1 - LENGTH, 1, dtype=np.float32)).astype(dtype)


def text(body, array=None, shape="5,1,12", head=HEAD, kind="float"):
    numbers = ",".join(map(str, (row() if array is None else array).reshape(-1).tolist()))
    constants = f"<{kind}[{shape}] row = {{{numbers}}}, int64[1] longest = {{{LENGTH}}}, int64[1] axis = {{-1}},"
    constants += "int64[1] end = {9223372036854775807}, int64[1] early = {9}, int64[1] one = {1}, int64[1] rows = {1},"
    constants += (
        "int64 zero = {0}, int64[1] four = {4}, int64[1] minus = {-7}, int64[2] two = {1, 2}, int64[2] both = {0, 0}>"
    )
    return f"{HEADER}{head}{constants} {{ {body} }}"


def written(body=START + BIAS + ADD, matches=1, **settings):
    model, _ = check(DematerializeAlibiRow(), text(body, **settings), matches=matches, lengths={"total": 7})
    return model


def declined(reason, body=START + BIAS + ADD, **settings):
    result = DematerializeAlibiRow().run(read_model(text(body, **settings)))
    assert not result.modified
    assert any(reason in key for key in result.declines), result.declines


def test_a_row_becomes_slopes_and_positions(check_pass):
    check_pass(DematerializeAlibiRow(), text(START + BIAS + ADD), matches=1, lengths={"total": 7})


@pytest.mark.parametrize(
    "start",
    [
        START,
        START.replace("start =", "d =") + " start = Max(d, four)",
        " n = Shape<start=1, end=2>(x) d = Sub(longest, n) s = Squeeze(d) m = Max(s, zero) start = Unsqueeze(m, axis)",
    ],
)
def test_places_to_begin(start):
    written(start + BIAS + ADD)


def test_constant_places_to_begin():
    head = HEAD.replace("3,total", "3,8")
    written(BIAS.replace("start", "four") + ADD, head=head)
    written(BIAS.replace("start", "minus") + ADD, head=HEAD.replace("3,total", "3,7"))


def test_one_step_and_a_cut_of_the_only_row():
    body = (
        START
        + " rest = Sub(one, one) r = Slice(row, rest, end, rows, one) bias = Slice(r, start, end, axis, one)"
        + ADD
    )
    written(body)


def test_slopes_are_those_of_the_row():
    model = written(array=row(slopes=[0.3, 0.1, 0.7, 0.2, 0.4]))
    slopes = next(value for name, value in model.graph.initializers.items() if "slopes" in name)
    assert slopes.const_value.numpy().reshape(-1).tolist() == pytest.approx([0.3, 0.1, 0.7, 0.2, 0.4])


def test_a_row_with_a_leading_axis():
    model = written(shape="1,5,1,12")
    slopes = next(value for name, value in model.graph.initializers.items() if "slopes" in name)
    assert list(slopes.shape) == [1, 5, 1, 1]


def test_a_rounded_row_gives_the_true_slopes():
    """fp16 text holds bits as integers."""
    rounded = row(dtype=np.float16)
    head = HEAD.replace("float[batch,5", "float16[batch,5").replace("(float[] y)", "(float16[] y)")
    source = text(START + BIAS + ADD, rounded.view(np.uint16), head=head, kind="float16")
    model, _ = check(DematerializeAlibiRow(), source, matches=1, lengths={"total": 7}, tolerance=1e-3)
    slopes = next(value for name, value in model.graph.initializers.items() if "slopes" in name)
    assert np.array_equal(slopes.const_value.numpy().reshape(-1), alibi_slopes(5))


def test_declines_a_start_that_may_be_negative():
    """Slice counts it from the end."""
    declined(
        "start, where the columns of row begin, may be negative",
        " n = Shape<start=1, end=2>(x) start = Neg(n)" + BIAS + ADD,
    )
    body = " n = Shape<start=1, end=2>(x) start = Sub(n, longest)" + BIAS + ADD
    declined("may be negative: counted from the end", body)


def test_declines_another_constant():
    other = row()
    other[3, 4] += 0.5
    declined("row[3, 0, 4] is", array=other)
    declined("row[0, 0, ", array=np.random.default_rng(0).standard_normal((5, 12)))


@pytest.mark.parametrize("shape", ["1,5,12", "5,12"])
def test_declines_other_shapes(shape):
    declined("not floating [heads, 1, longest]", shape=shape)


def test_declines_integers():
    array = np.tile(np.arange(1 - LENGTH, 1), (5, 1))
    head = HEAD.replace("float[batch,5", "int64[batch,5").replace("(float[] y)", "(int64[] y)")
    declined("row is INT64[5, 1, 12], not floating", array=array, kind="int64", head=head)


def test_declines_other_cuts():
    declined("takes the columns of row up to [9], not to the end", START + BIAS.replace("end", "early") + ADD)
    declined("along another axis than the columns", START + BIAS.replace("axis", "rows") + ADD)
    declined(
        "cuts row along another axis before it takes its columns",
        START + " r = Slice(row, one, end, rows) bias = Slice(r, start, end, axis)" + ADD,
    )


def test_declines_a_computed_row():
    body = START + " r = Neg(row) bias = Slice(r, start, end, axis)" + ADD
    declined("r is not a constant weight", body)
