"""Samples are true: lengths that the graph does not tie differ, values are in their ranges, shapes come from runs."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.testing.checking import read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder
from passopt.verification.sampling.lengths import Lengths, assignments, roles_of, symbols_of, takes_empty
from passopt.verification.sampling.trace import trace
from passopt.verification.sampling.values import Sampler, Style, index_bounds

FLOAT, INT64, BOOL = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL
HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
DECODER = """g (int64[b,s] input_ids, int64[b,t] attention_mask, float[b,2,p,4] "past_key_values.0.key",
    float[n,7] other)
    => (float[n,7] out) { out = Abs(other) }"""


def parsed(text):
    return read_model(HEADER + text)


def runs_of(text):
    found = trace(parsed(text))
    assert not found.problem
    return found.runs


def test_a_decoder_ties_what_its_contract_ties_and_nothing_else():
    model = parsed(DECODER)
    assert roles_of(model) == {"b": "batch", "s": "seq", "t": "total", "p": "past"}
    found = list(assignments(model))
    assert all(item.known["t"] == item.known["p"] + item.known["s"] for item in found)
    assert any(item.known["p"] == 0 for item in found)
    assert len({(item.known["n"], item.known["b"]) for item in found}) > 5


def test_arithmetic_on_symbols_is_computed():
    lengths = Lengths({"p": 5, "s": 3})
    assert [lengths.length(dim) for dim in ("p + s", "p+s+1", "2*s", "p - s", "p//3", 9)] == [8, 9, 6, 2, 1, 9]
    assert [lengths.length(dim) for dim in ("q", "p + q", "p ** s", "no term", "s - p")] == [None] * 5


def test_unnamed_dimensions_are_symbols_of_their_own():
    model = parsed("g (float[?,?] x, float[?] y) => (float[?,?] z) { z = Abs(x) }")
    assert symbols_of(model) == ["x[0]", "x[1]", "y[0]"]
    assert any(len(set(item.known.values())) == 3 for item in assignments(model))


def test_lengths_that_the_graph_ties_are_found_by_running_it():
    runs = runs_of("g (float[a,b] x, float[b2,c] y) => (float[?,?] z) { z = MatMul(x, y) }")
    lengths = [run.sample.lengths.known for run in runs]
    assert all(item["b"] == item["b2"] for item in lengths)
    assert len({tuple(item.values()) for item in lengths}) > 3
    assert any(len({item["a"], item["b"], item["c"]}) > 1 for item in lengths)


def test_kernels_that_may_crash_get_no_empty_axes():
    assert takes_empty(tiny_decoder())
    model = parsed(
        "g (float[n,3,h] x) => (float[n,3,h] y) <float[3] s = {1, 2, 3}> { y = InstanceNormalization(x, s, s) }"
    )
    assert not takes_empty(model)
    assert all(all(item.known.values()) for item in assignments(model))


def test_targets_of_a_reshape_are_legal_and_hold_zeros():
    runs = runs_of("g (float[2,3,4] x, int64[2] to) => (float[?,?] y) { y = Reshape(x, to) }")
    targets = {tuple(run.arrays["to"].tolist()) for run in runs}
    assert {(0, -1), (-1, 1)} <= targets


def test_inputs_that_change_stated_outputs_are_not_meant():
    runs = runs_of("g (float[2,3] x, int64[2] to) => (float[6,1] y) { y = Reshape(x, to) }")
    assert {run.shapes["y"] for run in runs} == {(6, 1)}


def test_shapes_come_from_runs_and_not_from_what_is_stated():
    model = parsed("g (float[n] x) => (float[?] y) <int64[1] one = {1}> { e = Expand(x, one) y = Neg(e) }")
    model.graph[0].outputs[0].shape = onnx_ir.Shape([1])
    assert {run.shapes["e"] == run.shapes["x"] for run in trace(model).runs} == {True}


def test_large_weights_are_stood_in_for_by_zeros(monkeypatch):
    from passopt.verification.sampling import traced_graph

    monkeypatch.setattr(traced_graph, "_LARGEST", 100)
    found = trace(tiny_decoder())
    assert not found.real
    assert found.has("x1")
    assert "x1" not in found.runs[0].arrays


def test_narrow_types_and_sequences_are_no_starting_points():
    found = trace(
        parsed(
            """g (float[n] x) => (float[n] y) { c = Cast <to = 17> (x) s = SequenceConstruct(x, x) w = Cast <to = 1> (c)
            i = Constant <value_int = 0> () a = SequenceAt(s, i) y = Add(w, a) }"""
        )
    )
    assert [found.has(name) for name in ("x", "c", "s", "w", "a")] == [True, False, False, True, True]


def test_a_graph_of_ranks_and_one_in_bf16_run_alone():
    for spec in (DecoderSpec(degree=2), DecoderSpec(dtype=onnx_ir.DataType.BFLOAT16)):
        found = trace(tiny_decoder(spec))
        assert not found.problem
        assert found.has("x1")


# Values


def sampler(mask="left", past=0, bounds=(), **style):
    return Sampler(Style(mask, **style), past, dict(bounds))


def test_masks_of_every_kind():
    shape = (2, 6)
    masks = {
        kind: sampler(kind).sample("mask", BOOL, shape).tolist() for kind in ("left", "right", "none", "holes", "row")
    }
    assert masks["left"] == [[True] * 6, [False] * 2 + [True] * 4]
    assert masks["right"] == [[True] * 6, [True] * 4 + [False] * 2]
    assert masks["none"] == [[True] * 6] * 2
    assert [any(row) for row in masks["row"]] == [False, True]
    assert len({str(mask) for mask in masks.values()}) == 5


@pytest.mark.parametrize("kind", ["left", "right"])
def test_an_additive_mask_is_causal_and_leaves_no_row_undefined(kind):
    mask = sampler(kind).sample("causal_mask", FLOAT, (2, 1, 3, 5))
    lowest = np.finfo(np.float32).min
    assert set(np.unique(mask)) <= {0.0, -np.inf, lowest}
    assert np.isneginf(mask[0, 0, 0, 3:]).all()
    assert np.isfinite(mask).any(axis=-1).all()


def test_positions_count_what_is_no_padding():
    assert sampler(past=5).sample("position_ids", INT64, (2, 3)).tolist() == [[5, 6, 7], [3, 4, 5]]
    assert sampler(past=5).sample("cache_position", INT64, (3,)).tolist() == [5, 6, 7]
    assert sampler(past=5, bounds={"position_ids": 7}).sample("position_ids", INT64, (1, 3)).max() < 7


def test_ids_index_the_smallest_table_that_they_are_used_for():
    graph = parsed(
        """g (int64[b,s] ids, float[5,2] t) => (float[b,s,2] out) <float[9,2] w = random> {
            i = Identity(ids) a = Gather(w, i) c = Gather(t, ids) out = Add(a, c) }"""
    ).graph
    bounds = index_bounds(list(graph.inputs[:1]), lambda value, axis: value.shape[axis])
    assert bounds == {"ids": 5}
    ids = sampler(bounds=bounds, integers="signed").sample("ids", INT64, (40, 7))
    assert set(np.unique(ids)) == set(range(5)), "ids are never negative"
    assert sampler(integers="signed").sample("at", INT64, (40, 7)).min() < 0


def test_draws_are_seeded_and_differ_by_name():
    one, same, other = (sampler().sample(name, FLOAT, (2, 5)) for name in ("x", "x", "y"))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_styles_of_floats():
    rows = np.abs(sampler(floats="rows").sample("x", FLOAT, (40, 7))).max(axis=-1)
    assert rows.max() / rows.min() > 100
    coarse = sampler(floats="coarse").sample("x", FLOAT, (40, 7))
    assert len(np.unique(coarse)) < 20
    assert np.abs(sampler(floats="huge").sample("x", FLOAT, (40, 7))).max() > 57_344, "beyond the widest 8-bit float"


def test_lengths_of_an_encoder_are_its_own():
    """The cache of cross attention is named like the cache of the decoder, and has the length of the encoder."""
    model = parsed("""g (int64[b,s] input_ids, int64[b,encoder_length] encoder_attention_mask,
        float[b,2,p,4] "past_key_values.0.decoder.key", float[b,2,encoder_out,4] "past_key_values.0.encoder.key")
        => (float[?,?,?,?] out) {
        k = Transpose <perm = [0, 1, 3, 2]> ("past_key_values.0.encoder.key")
        m = Cast <to = 1> (encoder_attention_mask) a = Constant <value_ints = [1, 2]> () u = Unsqueeze(m, a)
        out = Mul(k, u) }""")
    assert roles_of(model) == {"b": "batch", "s": "seq", "p": "past"}
    found = [run.sample.lengths.known for run in trace(model).runs]
    assert len({item["encoder_length"] / (item["p"] + item["s"]) for item in found}) > 2
    assert any(item["encoder_length"] > 1 and item["b"] > 1 for item in found)


def test_lengths_that_a_concat_cannot_join_are_no_samples() -> None:
    """onnxruntime joins an empty tensor of any other lengths, and returns memory that it has not written."""
    for text in (
        "g (float[a,b,c] x, float[d,e,f] y) => (float[?,b,c] z) { z = Concat<axis=0>(x, y) }",
        "g (float[a,b,c] x, float[d,e,f] y) => (float[?,b,c] z) { p = Neg(x) q = Abs(y) z = Concat<axis=-3>(p, q) }",
    ):
        found = trace(read_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}'))
        assert len(found.runs) > 3
        assert all(run.shapes["x"][1:] == run.shapes["y"][1:] for run in found.runs)
        assert "Neg" in text or any(len(set(run.shapes["x"])) == 3 for run in found.runs)
        assert any(run.shapes["x"][0] != run.shapes["y"][0] for run in found.runs)
    one = "g (float[a,4,c] x, float[d,e,f] y, float[3,e,c] w) => (float[?,4,c] z) { z = Concat<axis=0>(x, y, w) }"
    found = trace(read_model(f'<ir_version: 10, opset_import: ["" : 18]> {one}'))
    assert {run.shapes["y"][1] for run in found.runs} == {4}
