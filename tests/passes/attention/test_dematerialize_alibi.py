"""dematerialize-alibi: only a mask that is ALiBi's, element by element, becomes the formula."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.graph.alibi import alibi_slopes
from passopt.ir.serialization.text import parse_model, print_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import LazyWeight, small_constant
from passopt.ir.weights.literals import Literal
from passopt.passes.attention.dematerialize_alibi import DematerializeAlibi
from passopt.testing.checking import check

HEADS, LENGTH = 3, 11
ROWS_FIRST = "rows = Slice(mask, start, stop, one, one) bias = Slice(rows, zero, width, two, one)"
COLUMNS_FIRST = "columns = Slice(mask, zero, width, two, one) bias = Slice(columns, start, stop, one, one)"


def alibi(slopes=None, length=LENGTH, masked=-np.inf, kind=np.float32):
    """[heads, n, n]: slope · column, `masked` above the diagonal."""
    slopes = alibi_slopes(HEADS) if slopes is None else np.asarray(slopes, np.float32)
    mask = np.broadcast_to(
        slopes[:, None, None] * np.arange(length, dtype=np.float32), (len(slopes), length, length)
    ).copy()
    mask[:, ~np.tri(length, dtype=bool)] = masked
    return mask.astype(kind)


def graph(mask, body=ROWS_FIRST, output="scores = Softmax<axis=-1>(bias)", outputs="scores", constants=""):
    """Rows past … past+seq of the mask, as an exporter writes them: bounds are Reshapes of scalar lengths."""
    kind = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}.get(mask.dtype, "int64")
    dims = ",".join(map(str, mask.shape))
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[past] cache, float[total] attended, {kind}[{dims}] mask)
        => ({kind}[{mask.shape[0]},seq,total] {outputs})
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] flat = {{-1}}{constants}> {{
            cached = Shape(cache)
            first = Squeeze(cached)
            start = Reshape(first, flat)
            all = Shape(attended)
            last = Squeeze(all)
            stop = Reshape(last, flat)
            width = Identity(stop)
            {body}
            {output}
        }}"""
    )
    value = onnx_ir.Value(name="mask")
    value.const_value = LazyWeight(Literal.of(mask), "mask")
    value.shape, value.type = value.const_value.shape, onnx_ir.TensorType(value.const_value.dtype)
    stand_in = model.graph.inputs.pop()
    assert stand_in.name == "mask"
    model.graph.register_initializer(value)
    for node in model.graph:
        for index, operand in enumerate(node.inputs):
            if operand is not None and operand.name == "mask":
                node.replace_input_with(index, value)
    return model


def checked(model, first=4, last=9, **settings):
    feeds = {"cache": np.zeros(first, np.float32), "attended": np.zeros(last, np.float32)}
    return check(DematerializeAlibi(), model, feeds=feeds, **settings)


def replaced(model, **settings):
    changed, result = checked(model, **settings)
    assert result.matches == 1, result.declines
    assert "mask" not in changed.graph.initializers
    return changed


def declined(model):
    """The reason, after asserting that nothing changed."""
    _, result = checked(model)
    assert not result.modified
    (reason,) = result.declines
    return reason


def test_baked_mask_becomes_slopes_and_positions(golden):
    golden(print_model(replaced(graph(alibi()))))


@pytest.mark.parametrize("body", [ROWS_FIRST, COLUMNS_FIRST])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 11), (5, 11), (10, 11)])
def test_prefill_and_decode_rows(body, first, last):
    changed = replaced(graph(alibi(), body), first=first, last=last)
    assert np.array_equal(small_constant(changed.graph.initializers["alibi.slopes"]).reshape(-1), alibi_slopes(HEADS))


def test_fp16_mask_gets_the_true_slopes_and_is_cast_at_the_end():
    slopes = alibi_slopes(6)
    changed = replaced(graph(alibi(slopes, kind=np.float16)), tolerance=2e-3)
    constant = small_constant(changed.graph.initializers["alibi.slopes"])
    assert constant.dtype == np.float32
    assert np.array_equal(constant.reshape(-1), slopes)
    assert [node.op_type for node in changed.graph].count("Cast") == 2


def test_slopes_of_another_formula_are_read_off_the_mask():
    changed = replaced(graph(alibi([0.3, 0.7])))
    assert small_constant(changed.graph.initializers["alibi.slopes"]).reshape(-1).tolist() == [
        np.float32(0.3),
        np.float32(0.7),
    ]


def test_the_smallest_number_stands_for_minus_infinity():
    replaced(graph(alibi(masked=np.finfo(np.float32).min)))


def test_a_shared_mask_is_replaced_for_each_use():
    body = ROWS_FIRST + " again = Slice(mask, start, stop, one, one) bias2 = Slice(again, zero, width, two, one)"
    changed, result = checked(graph(alibi(), body, "sum = Add(bias, bias2) scores = Softmax<axis=-1>(sum)"))
    assert result.matches == 2
    assert "mask" not in changed.graph.initializers


def test_a_mask_that_is_also_read_otherwise_stays():
    body = ROWS_FIRST + " other = ReduceMax<keepdims=0>(mask)"
    changed, result = checked(graph(alibi(), body, "sum = Add(bias, other) scores = Softmax<axis=-1>(sum)"))
    assert result.matches == 1
    assert "mask" in changed.graph.initializers


def test_a_bias_that_is_a_graph_output():
    changed, result = checked(graph(alibi(), output="", outputs="bias"))
    assert result.matches == 1
    assert changed.graph.outputs[0].name == "bias"


@pytest.mark.parametrize("at", [(0, 5, 2), (2, 10, 10), (1, 0, 0), (1, 10, 3)])
def test_declines_a_wrong_element_and_names_it(at):
    mask = alibi()
    mask[at] += 0.25
    place, slope = f"mask[{at[0]}, {at[1]}, {at[2]}]", alibi_slopes(HEADS)[at[0]]
    assert declined(graph(mask)) == f"{place} is {mask[at]}, an ALiBi mask of slope {slope} has {alibi()[at]} there"


def test_declines_what_is_not_causal():
    mask = alibi()
    mask[1, 3, 4] = 0
    assert declined(graph(mask)).startswith("mask[1, 3, 4] is 0.0, an ALiBi mask of slope")


def test_declines_another_kind_of_bias():
    """Distances instead of columns: equal after a softmax, but not what this pass writes."""
    distances = np.arange(LENGTH, dtype=np.float32) - np.arange(LENGTH, dtype=np.float32)[:, None]
    mask = alibi_slopes(HEADS)[:, None, None] * distances
    assert declined(graph(mask)).startswith("mask[0, 0, ")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_declines_numbers_that_are_not_finite(number):
    mask = alibi()
    mask[0, LENGTH - 1, 1] = number
    assert declined(graph(mask)).startswith("mask[0, ")


def test_declines_a_mask_that_is_not_square():
    assert declined(graph(alibi()[:, :9])) == "mask is FLOAT[3, 9, 11], not floating [heads, n, n]"


def test_declines_a_mask_of_another_rank():
    model = graph(
        alibi()[:, None],
        "rows = Slice(mask, start, stop, one, one) wide = Slice(rows, zero, width, two, one) bias = Squeeze(wide)",
    )
    result = DematerializeAlibi().run(model)
    assert result.declines == {"mask is FLOAT[3, 1, 11, 11], not floating [heads, n, n]": 1}


def test_declines_integers():
    assert declined(graph(np.zeros((3, 11, 11), np.int64), output="scores = Neg(bias)")) == (
        "mask is INT64[3, 11, 11], not floating [heads, n, n]"
    )


#: Ends of an axis as exporters write them, and positions counted from its end, before its start and beyond its end.
POSITIONS = """, int64[1] big = {9223372036854775807}, int64[1] least = {-9223372036854775807},
    int64[1] back = {-3}, int64[1] six = {6}, int64[1] far = {99}"""


@pytest.mark.parametrize("width", ["width", "big", "far", "back"])
@pytest.mark.parametrize("stop", ["stop", "big", "back", "six"])
@pytest.mark.parametrize("start", ["start", "zero", "back", "least", "far"])
def test_constant_bounds_are_counted_and_clamped_as_slice_does(start, stop, width):
    body = f"rows = Slice(mask, {start}, {stop}, one, one) bias = Slice(rows, zero, {width}, two, one)"
    replaced(graph(alibi(), body, output="", outputs="bias", constants=POSITIONS))


def test_a_sum_of_lengths_is_a_length():
    body = "both = Add(start, stop) " + ROWS_FIRST.replace("stop", "both").replace("width", "both")
    replaced(graph(alibi(), body), first=2, last=5)


@pytest.mark.parametrize(
    "bound",
    ["bad = Neg(start)", "bad = Sub(start, stop)", "bad = Add(start, flat)", "bad = Mul(start, stop)"]
    + ["both = Concat<axis=0>(start, stop) bad = ReduceMax(both)", "s = Shape(mask) bad = Slice(s, one, two, zero)"],
)
@pytest.mark.parametrize("place", ["start", "stop", "width"])
def test_declines_a_bound_that_need_not_be_a_length(place, bound):
    model = graph(alibi(), f"{bound} " + ROWS_FIRST.replace(place, "bad"))
    assert declined(model) == "the bound bad of the slice is neither a constant nor the length of a graph input"


def test_declines_a_bound_that_is_no_length():
    """Slice counts a negative bound from the end, Range does not."""
    model = graph(alibi(), "k = ReduceSum(attended) f = Cast<to=7>(k) " + ROWS_FIRST.replace("start", "f"))
    assert declined(model) == "the bound f of the slice is neither a constant nor the length of a graph input"


def test_declines_a_single_position():
    model = graph(alibi(length=1))
    assert DematerializeAlibi().run(model).declines == {"mask has 1 positions; the slopes cannot be read from it": 1}


def test_declines_a_computed_mask():
    model = graph(alibi(), "twice = Add(mask, mask) " + ROWS_FIRST.replace("mask", "twice"))
    assert declined(model) == "twice is not a constant weight"


def test_only_the_sampled_rows_are_read(monkeypatch):
    """A mask [40, 4096, 4096] is 2.7 GB: no more than 128 rows of each head are read, one at a time."""
    boxes = []
    original = Evaluator.read
    monkeypatch.setattr(Evaluator, "read", lambda self, e, box: boxes.append(box) or original(self, e, box))
    result = DematerializeAlibi().run(graph(alibi(length=300)))
    assert result.matches == 1
    sizes = [np.prod([stop - start for start, stop in box]) for box in boxes]
    assert max(sizes) <= 300
    assert len(sizes) <= HEADS * 128 + 1
