"""Sampled leaves are in their ranges and belong together; lengths follow from the inputs' symbols."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.testing.decoders import tiny_decoder
from passopt.verification.rewrites.sample_inputs import Sampler, index_bounds
from passopt.verification.rewrites.symbol_lengths import DRAWS, Lengths

FLOAT, INT64, BOOL = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL
CHUNK, TOKEN, PREFILL = DRAWS


def shaped(*dims):
    return onnx_ir.Value(name="v", shape=onnx_ir.Shape(list(dims)))


@pytest.fixture
def model(parsed):
    return parsed(
        """g (int64[b,s] input_ids, int64[b,t] attention_mask, float[b,2,p,4] "past.0.key", float[n,7] other)
        => (float[n,7] out) { out = Abs(other) }"""
    )


def sampler(model, draw, indices=()):
    return Sampler(Lengths(model, draw), dict(indices))


def test_lengths_follow_the_contract(model):
    lengths = Lengths(model, CHUNK)
    assert lengths.shape_of(shaped("b", "s", "p", "t", 9)) == (2, 3, 5, 8, 9)
    assert Lengths(model, PREFILL).shape_of(shaped("b", "s", "p", "t")) == (1, 4, 0, 4)


def test_lengths_that_are_written_as_arithmetic_are_computed(model):
    assert Lengths(model, CHUNK).shape_of(shaped("p + s", "p+s+1", "2*s", "t - s", "t//3")) == (8, 9, 6, 5, 2)


def test_unknown_lengths_are_unknown(model):
    lengths = Lengths(model, CHUNK)
    for dim in ("elsewhere", "p + elsewhere", "p ** s", "not a term", None):
        assert lengths.shape_of(shaped("b", dim)) is None
    assert lengths.shape_of(onnx_ir.Value(name="v")) is None
    assert lengths.shape_of(shaped("n")) is not None


def test_a_fixed_length_counts_for_what_depends_on_it(parsed):
    model = parsed(
        """g (int64[b,1] input_ids, int64[b,t] attention_mask, float[b,2,p,4] "past.0.key") => (int64[b,1] out)
        { out = Abs(input_ids) }"""
    )
    assert Lengths(model, CHUNK).shape_of(shaped("b", "p", "t")) == (2, 5, 6)


def test_the_padding_mask_holds_left_padding(model):
    mask = sampler(model, CHUNK).sample("attention_mask", INT64, (2, 8))
    assert mask.dtype == np.int64
    assert mask.tolist() == [[1] * 8, [0, 0, *[1] * 6]]


def test_positions_count_what_is_no_padding(model):
    positions = sampler(model, CHUNK).sample("position_ids", INT64, (2, 3))
    assert positions.tolist() == [[5, 6, 7], [3, 4, 5]]
    assert sampler(model, CHUNK).sample("cache_position", INT64, (3,)).tolist() == [5, 6, 7]


@pytest.mark.parametrize("draw", DRAWS)
def test_an_additive_mask_is_causal_and_padded_and_leaves_no_row_undefined(model, draw):
    total = draw.past + draw.seq
    mask = sampler(model, draw).sample("causal_mask", FLOAT, (draw.batch, 1, draw.seq, total))
    lowest = np.finfo(np.float32).min
    assert set(np.unique(mask)) <= {0.0, -np.inf, lowest}
    for row, padding in enumerate(draw.padding[: draw.batch]):
        assert (mask[row, 0, :, :padding] == lowest).all()
        for query in range(draw.seq):
            later = mask[row, 0, query, max(padding, draw.past + query + 1) :]
            assert np.isneginf(later).all()
            assert np.isfinite(mask[row, 0, query]).any()


def test_a_boolean_mask_says_what_is_seen(model):
    mask = sampler(model, CHUNK).sample("mask", BOOL, (2, 1, 3, 8))
    assert mask.dtype == bool
    assert mask[0, 0].sum(axis=-1).tolist() == [6, 7, 8]
    assert mask[1, 0].sum(axis=-1).tolist() == [4, 5, 6]


def test_ids_index_the_smallest_table_that_they_are_used_for(parsed, model):
    graph = parsed(
        """g (int64[b,s] ids, float[5,2] t) => (float[b,s,2] out) <float[9,2] w = random> {
            a = Gather(w, ids) c = Gather(t, ids) out = Add(a, c) }"""
    ).graph
    bounds = index_bounds(graph, {})
    assert bounds == {"ids": 5}
    assert index_bounds(graph, {5: 4}) == {"ids": 4}
    ids = sampler(model, CHUNK, bounds).sample("ids", INT64, (40, 7))
    assert set(np.unique(ids)) == set(range(5))


def test_draws_are_seeded_and_differ_by_name(model):
    one, same, other = (sampler(model, TOKEN).sample(name, FLOAT, (2, 5)) for name in ("x", "x", "y"))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_rows_of_one_draw_differ_in_scale(model):
    rows = np.abs(sampler(model, TOKEN).sample("x", FLOAT, (40, 7))).max(axis=-1)
    assert rows.max() / rows.min() > 100


def test_a_decoder_of_our_own_has_all_its_lengths():
    model = tiny_decoder()
    for draw in DRAWS:
        lengths = Lengths(model, draw)
        assert all(lengths.shape_of(value) is not None for value in (*model.graph.inputs, *model.graph.outputs))
