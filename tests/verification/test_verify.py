"""Verification finds nothing where nothing is wrong, and each kind of defect in the scenario that shows it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.generation.tokenizer import load_tokenizer
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import decoder_of, positions_of
from passopt.ir.graph.editor import Editor
from passopt.ir.relative_error import relative_error
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.framework.accuracy import QualityBar
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.predictions.divergence import divergence
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checkpoints import ROTARY, evaluation_text, make_checkpoint
from passopt.testing.decoders import DecoderSpec, tiny_decoder
from passopt.verification import sliced_head
from passopt.verification.comparisons import NUMPY_TWIN, ORIGINAL, suspects, weigh_own_roundings
from passopt.verification.decoder_cut import cut_decoder
from passopt.verification.dequantised_twin import dequantised_twin, has_dynamic_activations
from passopt.verification.divergence import judged_rows
from passopt.verification.quantised_weights import ON_CODES
from passopt.verification.report import Row, VerifyReport
from passopt.verification.sampling.shaken import nudged_model
from passopt.verification.scenarios import Step, make_scenarios, perplexity, surprise, text_windows
from passopt.verification.verify import VerifyOptions, verify

FP16, BF16 = DataType.FLOAT16, DataType.BFLOAT16
TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, 34, 100))
WHOLE = VerifyOptions(tokens=TOKENS, window=24, stride=12)
LAYERWISE = dataclasses.replace(WHOLE, layerwise=True)
BOTH = pytest.mark.parametrize("options", [WHOLE, LAYERWISE], ids=["whole", "layerwise"])

Array = np.ndarray
Change = Callable[[onnx_ir.Model], None]


def changed(change: Change, spec: DecoderSpec | None = None) -> onnx_ir.Model:
    model = tiny_decoder(spec)
    change(model)
    return model


def node_of(model: onnx_ir.Model, output: str) -> onnx_ir.Node:
    return next(node for node in model.graph if any(value.name == output for value in node.outputs))


def outputs_of(report: VerifyReport) -> list[Row]:
    """The rows of logits and cache."""
    return [row for row in report.rows if row.output == "logits" or row.output.startswith(("present", "hidden"))]


def failed(report: VerifyReport) -> set[str]:
    assert not report.ok
    return {row.scenario for row in report.rows if not row.ok}


@BOTH
@pytest.mark.parametrize("dtype", [DataType.FLOAT, FP16, BF16])
def test_a_model_equals_itself_exactly(options: VerifyOptions, dtype: DataType) -> None:
    spec = DecoderSpec(dtype=dtype)
    report = verify(tiny_decoder(spec), tiny_decoder(spec), options=options)
    assert report.ok
    assert {row.error for row in report.rows} == {0.0}
    assert ("reference: bf16, run through its fp32 twin" in report.notes) == (dtype == BF16)


@BOTH
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_ranks_equal_the_unsplit_model(options: VerifyOptions, degree: int) -> None:
    report = verify(tiny_decoder(), tiny_decoder(DecoderSpec(degree=degree)), options=options)
    assert report.ok
    assert report.worst.error < 1e-6
    assert f"candidate: {degree} ranks, joined in one graph" in report.notes


@BOTH
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_narrower_dtypes_have_their_own_tolerance(options: VerifyOptions, dtype: DataType) -> None:
    report = verify(tiny_decoder(), tiny_decoder(DecoderSpec(dtype=dtype, degree=2)), options=options)
    assert report.ok
    assert 1e-4 < report.worst.error < report.worst.tolerance
    assert not verify(
        tiny_decoder(), tiny_decoder(DecoderSpec(dtype=dtype)), options=dataclasses.replace(options, tolerance=1e-5)
    ).ok


@BOTH
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dtype", [DataType.FLOAT, FP16, BF16])
def test_int8_is_compared_twice(options: VerifyOptions, degree: int, dtype: DataType) -> None:
    spec = DecoderSpec(dtype=dtype)
    candidate = tiny_decoder(dataclasses.replace(spec, degree=degree, quantized=True))
    report = verify(tiny_decoder(spec), candidate, options=options)
    assert report.ok, report.to_text()
    worst = {
        kind: max(row.error for row in outputs_of(report) if row.comparison.startswith(kind))
        for kind in (NUMPY_TWIN, ORIGINAL)
    }
    assert report.verdict == "ok: lossy as declared (int8)"
    assert worst[NUMPY_TWIN] < (2e-3 if dtype == FP16 else 2e-6)
    assert 1e-3 < worst[ORIGINAL] < 1e-1
    assert any(row.output == "perplexity" and row.error > 0 for row in report.rows)


@BOTH
@pytest.mark.parametrize("dtype", [DataType.FLOAT, FP16, BF16])
def test_dynamic_activations_are_compared_twice(options: VerifyOptions, dtype: DataType) -> None:
    candidate = tiny_decoder(DecoderSpec(dtype=dtype, quantized=True))
    assert QuantizeActivations().run(candidate).modified
    report = verify(tiny_decoder(DecoderSpec(dtype=dtype)), candidate, options=options)
    assert report.ok, report.to_text()
    assert any(note.startswith("int8 activations: declared lossy") for note in report.notes)
    assert report.verdict == "ok: lossy as declared (int8 activations)"
    worst = {
        kind: max(row.error for row in outputs_of(report) if row.comparison.startswith(kind))
        for kind in (NUMPY_TWIN, ORIGINAL)
    }
    assert worst[NUMPY_TWIN] < worst[ORIGINAL] / 2
    assert 1e-3 < worst[ORIGINAL] < 1e-1


def test_a_wrong_code_of_a_dynamic_linear_is_found() -> None:
    """The twin is made of the graph's own codes, so that a wrong code shows against the original only."""
    model = tiny_decoder(DecoderSpec(quantized=True))
    QuantizeActivations().run(model)
    name = "model.layers.0.mlp.down_proj.weight.codes"
    codes = np.array(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
    codes[0] *= -1
    model.graph.initializers[name].const_value = LazyWeight(Literal.of(codes), name)
    report = verify(tiny_decoder(), model, options=WHOLE)
    assert failed(report)
    assert {row.comparison for row in report.rows if not row.ok} == {ORIGINAL}


@pytest.mark.parametrize("factor", [2.0, 1.1, 0.5])
@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations"])
def test_one_wrong_scale_is_worse_than_declared(factor: float, dynamic: bool) -> None:
    """On an untrained model it hardly moves the predictions, so the weights are compared, too."""
    model = tiny_decoder(DecoderSpec(quantized=True))
    name = "model.layers.1.mlp.up_proj.weight.scales"
    scales = np.array(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
    scales[7] *= factor
    model.graph.initializers[name].const_value = LazyWeight(Literal.of(scales), name)
    if dynamic:
        QuantizeActivations().run(model)
    report = verify(tiny_decoder(), model)
    assert not report.ok
    assert report.costliest.startswith("model.layers.1.mlp.up_proj.weight, output channel 7: off by ")
    assert report.verdict.startswith(f"FAILED: worse than declared (int8{' activations' if dynamic else ''}), ")
    assert report.to_json()["costliest"] == report.costliest


@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.post_attention_layernorm.weight", lambda array: array * np.float32(1.05)),
        ("model.embed.weight", lambda array: array + np.float32(0.002)),
        ("lm_head.weight", lambda array: array * np.float32(1.001)),
    ],
)
def test_parts_that_int8_does_not_touch_must_agree(
    name: str, change: Callable[[np.ndarray], np.ndarray], dynamic: bool
) -> None:
    """Predictions of a lossy model may move by more than these faults move them."""

    def faulty(model: onnx_ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = LazyWeight(Literal.of(change(np.array(value.const_value.numpy()))), name)  # type: ignore[union-attr]
        if dynamic:
            QuantizeActivations().run(model)

    report = verify(tiny_decoder(), changed(faulty, DecoderSpec(quantized=True)), options=WHOLE)
    assert report.verdict.startswith("FAILED: worse than declared")
    assert ON_CODES in {row.comparison for row in report.rows if not row.ok}


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("name", ["model.layers.1.post_attention_layernorm.weight", "model.embed.weight"])
def test_weights_of_narrower_dtypes_are_the_rounded_ones(dtype: DataType, name: str) -> None:
    def faulty(model: onnx_ir.Model) -> None:
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array.flat[3] *= 1.05
        value.const_value = LazyWeight(Literal.of(array), name)

    report = verify(tiny_decoder(), changed(faulty, DecoderSpec(dtype=dtype)))
    assert name in {row.output for row in report.rows if not row.ok}


def test_the_end_of_tables_is_read_where_a_cache_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_caches(monkeypatch, 44, 45)

    def blank(model: onnx_ir.Model) -> None:
        name = "positions.weight"
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[-3:] = 0
        value.const_value = LazyWeight(Literal.of(array), name)

    options = VerifyOptions()
    assert verify(tiny_decoder(), tiny_decoder(), options=options).ok
    report = verify(tiny_decoder(), changed(blank), options=options)
    assert any(scenario.startswith(("spread over", "near the end")) for scenario in failed(report))
    assert any("run without a cache" in note for note in report.notes)


def test_a_layer_that_loses_most_is_named() -> None:
    """Here the codes are those of the weights, and yet a layer loses the predictions."""

    def blunt(model: onnx_ir.Model) -> None:
        name = "model.layers.1.input_layernorm.weight"
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        value.const_value = LazyWeight(Literal.of(array * np.linspace(-9, 9, array.size, dtype=np.float32)), name)
        head = model.graph.initializers["lm_head.weight"]
        numbers = np.array(head.const_value.numpy())  # type: ignore[union-attr]
        head.const_value = LazyWeight(Literal.of(numbers * 20), head.name)

    reference = tiny_decoder()
    head = reference.graph.initializers["lm_head.weight"]
    head.const_value = LazyWeight(Literal.of(np.array(head.const_value.numpy()) * 20), head.name)  # type: ignore[union-attr]
    report = verify(reference, changed(blunt, DecoderSpec(quantized=True)))
    assert report.verdict.startswith("FAILED: worse than declared (int8), ")
    assert report.costliest.startswith("layer 1, ")


def test_divergence_of_distributions() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal((5, 7)).astype(np.float32)
    other = random.standard_normal((5, 7)).astype(np.float32)
    p, q = (np.exp(item) / np.exp(item).sum(-1, keepdims=True) for item in (one, other))
    found = divergence([(one[:2], other[:2]), (one[2:], other[2:])])
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-5)
    assert found.top1 == (one.argmax(-1) == other.argmax(-1)).mean()
    assert divergence([(one, one + 3)]).mean == pytest.approx(0, abs=1e-6), "a shift of all logits is no difference"
    assert math.isnan(divergence([(one, one * np.nan)]).mean)
    few = judged_rows("c", QualityBar(0.1, 0.5, 0.9), found, "text")
    assert [row.judged for row in few] == [True, False, False]
    many = judged_rows("c", QualityBar(0.1, 0.5, 0.9), divergence([(np.tile(one, (60, 1)),) * 2]), "random tokens")
    assert [(row.judged, row.ok) for row in many] == [(True, True), (True, True), (False, True)]


def test_twin_of_a_dynamic_linear_multiplies_numbers(tmp_path: Path) -> None:
    model = tiny_decoder(DecoderSpec(quantized=True))
    QuantizeActivations().run(model)
    assert has_dynamic_activations(model)
    twin = dequantised_twin(model, tmp_path)
    kinds = {node.op_type for node in twin.graph}
    assert not {"MatMulInteger", "DequantizeLinear"} & kinds
    assert "Round" in kinds
    assert not any(value.dtype == DataType.INT8 for value in twin.graph.initializers.values())


def test_two_int8_models_are_held_to_the_tight_tolerance() -> None:
    one, two = tiny_decoder(DecoderSpec(quantized=True)), tiny_decoder(DecoderSpec(quantized=True, degree=3))
    report = verify(one, two, options=WHOLE)
    assert report.ok
    logits = [row for row in report.rows if row.comparison == ORIGINAL and row.output == "logits"]
    assert {row.tolerance for row in logits if not row.scenario.startswith("near the end")} == {1e-5}


def nudge(name: str) -> Change:
    """One element of a weight is off by 1 %."""

    def change(model: onnx_ir.Model) -> None:
        value = model.graph.initializers[name]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array.flat[np.abs(array).argmax()] *= 1.01
        value.const_value = LazyWeight(Literal.of(array), name)

    return change


@pytest.mark.parametrize("row", [0, -1])
def test_the_ends_of_the_vocabulary_are_fed(row: int) -> None:
    def turn(model: onnx_ir.Model) -> None:
        value = model.graph.initializers["model.embed.weight"]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[row] = -array[row]
        value.const_value = LazyWeight(Literal.of(array), value.name)

    options = VerifyOptions(lengths=(1,))
    assert "near the end, 48" in failed(verify(tiny_decoder(), changed(turn), options=options))


def test_one_perturbed_element_is_found() -> None:
    candidate = changed(nudge("model.layers.1.mlp.down_proj.weight"))
    report = verify(tiny_decoder(), candidate)
    assert len(failed(report)) > 3
    # The cache of the second layer lies before the defect.
    assert {row.output for row in report.rows if not row.ok} == {"logits"}


@pytest.mark.parametrize(
    ("weight", "piece", "output"),
    [
        ("model.embed.weight", "embedding", "hidden"),
        ("model.layers.0.self_attn.o_proj.weight", "layer 0", "hidden"),
        ("model.layers.1.self_attn.k_proj.weight", "layer 1", "present.1.key"),
        ("lm_head.weight", "head", "logits"),
    ],
)
def test_layerwise_says_where(weight: str, piece: str, output: str) -> None:
    report = verify(tiny_decoder(), changed(nudge(weight)), options=LAYERWISE)
    by_piece = [row for row in report.rows if "each layer" in row.comparison and not row.ok]
    assert {row.scenario for row in by_piece} == {piece}
    assert output in {row.output for row in by_piece}
    assert {row.comparison for row in report.rows if not row.ok} >= {f"{ORIGINAL}, end to end"}


def forget_padding(model: onnx_ir.Model) -> None:
    """Every column counts as shown."""
    node = node_of(model, "shown")
    editor = Editor(model, "test")
    builder = editor.builder("shown")
    everything = builder.Or(builder.Cast(node.inputs[0], to=9), np.array(True))
    editor.replace({node.outputs[0]: everything}, builder.built, [node])


@BOTH
def test_a_forgotten_padding_mask_shows_in_the_padded_batch_only(options: VerifyOptions) -> None:
    report = verify(tiny_decoder(), changed(forget_padding), options=options)
    ends = {row.scenario for row in report.rows if not row.ok and "each layer" not in row.comparison}
    assert ends == {"left padding, then decode"}


def forget_past(model: onnx_ir.Model) -> None:
    """Rows of the causal mask start at 0 even if there is a cache."""
    node_of(model, "rows").replace_input_with(0, model.graph.initializers["zero"])
    node_of(model, "rows").replace_input_with(1, node_of_length(model))


def node_of_length(model: onnx_ir.Model) -> onnx_ir.Value:
    editor = Editor(model, "test")
    builder = editor.builder("length")
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    length = builder.Squeeze(builder.Shape(ids, start=1, end=2))
    editor.insert(builder.built, node_of(model, "rows"))
    return length  # type: ignore[no-any-return]


def test_a_mask_that_forgets_the_past_shows_with_a_cache_only() -> None:
    report = verify(tiny_decoder(), changed(forget_past))
    assert failed(report) == {"decode with cache", "chunked prefill", "left padding, then decode", "near the end, 48"}


def test_swapped_ranks_show_in_the_cache() -> None:
    ranks = rank_models(tiny_decoder(DecoderSpec(degree=3)))
    report = verify(tiny_decoder(), join_ranks([ranks[1], ranks[0], ranks[2]], heads=3))
    assert "present.0.key" in {row.output for row in report.rows if not row.ok}


def test_key_and_value_caches_swapped() -> None:
    def swap(model: onnx_ir.Model) -> None:
        key, value = (
            next(out for out in model.graph.outputs if out.name == f"present.1.{x}") for x in ("key", "value")
        )
        key.name, value.name = value.name, key.name

    assert "prefill 7" in failed(verify(tiny_decoder(), changed(swap)))


def test_slopes_of_the_local_head_count_are_found() -> None:
    from passopt.ir.graph.alibi import alibi_slopes

    def local(model: onnx_ir.Model) -> None:
        slopes = np.tile(alibi_slopes(2), 2).reshape(4, 1, 1)
        value = model.graph.initializers["alibi.slopes"]
        value.const_value = LazyWeight(Literal.of(slopes).shard(0, 2), value.name)

    report = verify(tiny_decoder(), changed(local, DecoderSpec(degree=2)))
    assert "prefill 7" in failed(report)
    assert "prefill 1" not in failed(report)


def slice_last_token(model: onnx_ir.Model) -> None:
    node = node_of(model, "nf")
    node_of(model, "logits").replace_input_with(0, _last(model, node))
    logits = model.graph.outputs[0]
    logits.shape = onnx_ir.Shape(["batch", 1, 34])


def _last(model: onnx_ir.Model, node: onnx_ir.Node) -> onnx_ir.Value:
    editor = Editor(model, "test")
    builder = editor.builder("last")
    last = builder.Slice(node.outputs[0], [-1], [1 << 62], [1])
    editor.insert(builder.built, node_of(model, "logits"))
    return last  # type: ignore[no-any-return]


@BOTH
def test_logits_of_the_last_token_are_compared_with_the_last_column(options: VerifyOptions) -> None:
    report = verify(tiny_decoder(), changed(slice_last_token), options=options)
    assert report.ok, report.to_text()
    assert report.worst.error < 1e-6
    assert "text: no perplexity, since a model gives logits of the last position only" in report.notes
    assert not any(row.output == "perplexity" for row in report.rows)

    def both(model: onnx_ir.Model) -> None:
        slice_last_token(model)
        nudge("lm_head.weight")(model)

    assert not verify(tiny_decoder(), changed(both), options=options).ok


def test_nan_never_passes() -> None:
    def poison(model: onnx_ir.Model) -> None:
        value = model.graph.initializers["model.layers.0.mlp.up_proj.weight"]
        array = np.array(value.const_value.numpy())  # type: ignore[union-attr]
        array[3, 3] = np.nan
        value.const_value = LazyWeight(Literal.of(array), value.name)

    report = verify(changed(poison), changed(poison), options=WHOLE)
    assert not report.ok
    assert report.to_json()["rows"][0]["error"] is None  # type: ignore[index]
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DecoderSpec(heads=4), "kv_heads 4, the reference 3"),
        (DecoderSpec(layers=1), "layers 1, the reference 2"),
        (DecoderSpec(vocab=35), "35 logits, the reference 34"),
    ],
)
def test_other_models_are_refused(spec: DecoderSpec, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        verify(tiny_decoder(), tiny_decoder(spec))


def test_one_rank_of_many_is_refused() -> None:
    rank = rank_models(tiny_decoder(DecoderSpec(degree=2)))[0]
    del rank.metadata_props["passopt.degree"]
    with pytest.raises(ModelError, match="only one rank's weights"):
        verify(tiny_decoder(), rank)


def narrow_caches(monkeypatch: pytest.MonkeyPatch, whole: int, layer: int) -> None:
    """Let only so many positions fit into a cache of all layers, and of one."""
    decoder = decoder_of(tiny_decoder())
    position = 2 * decoder.kv_heads * decoder.head_dim * 4
    monkeypatch.setattr("passopt.verification.verify._LARGEST_CACHE", whole * decoder.layers * position)
    monkeypatch.setattr("passopt.verification.verify._LARGEST_LAYER", layer * position)


@BOTH
@pytest.mark.parametrize("layer", [46, 100])
def test_a_cache_that_is_too_large_for_the_end_is_told(
    monkeypatch: pytest.MonkeyPatch, options: VerifyOptions, layer: int
) -> None:
    narrow_caches(monkeypatch, 44, layer)
    report = verify(tiny_decoder(), tiny_decoder(), options=options)
    assert report.ok
    assert "spread over 48" in {row.scenario for row in report.rows}
    name = "near the end, 48" if layer >= 48 else "late, 46 of 48"
    if options.layerwise:
        assert name in {row.scenario for row in report.rows}
    else:
        assert "late, 44 of 48" in {row.scenario for row in report.rows}
        assert f"{ORIGINAL}, {name}, layer by layer" in {row.comparison for row in report.rows}
    end = min(layer, 48)
    told = [f"positions from 44 to {end}: run layer by layer, since a cache of all layers takes 0 MiB"]
    told = [] if options.layerwise else told
    told += ["positions from 46 to 48: run without a cache, which takes 0 MiB a layer"] if layer < 48 else []
    assert [note for note in report.notes if note.startswith("positions")] == told


def forget_late_keys(model: onnx_ir.Model) -> None:
    """Columns from 46 on are hidden, which only a cache that long shows."""
    node = node_of(model, "shown")
    editor = Editor(model, "test")
    builder = editor.builder("shown")
    columns = builder.CumSum(builder.Abs(builder.Cast(node.inputs[0], to=7)), np.array(1))
    everything = builder.And(builder.Cast(node.inputs[0], to=9), builder.Less(columns, np.array(46)))
    editor.replace({node.outputs[0]: everything}, builder.built, [node])


@pytest.mark.parametrize("spec", [DecoderSpec(), DecoderSpec(quantized=True)], ids=["fp32", "int8"])
def test_far_positions_run_layer_by_layer_where_a_whole_cache_is_too_large(
    monkeypatch: pytest.MonkeyPatch, spec: DecoderSpec
) -> None:
    narrow_caches(monkeypatch, 44, 100)
    options = VerifyOptions(lengths=(1, 7))
    assert verify(tiny_decoder(), tiny_decoder(spec), options=options).ok
    report = verify(tiny_decoder(), changed(forget_late_keys, spec), options=options)
    failed_rows = {row.comparison for row in report.rows if not row.ok}
    assert failed_rows == {f"{ON_CODES if spec.quantized else ORIGINAL}, near the end, 48, layer by layer"}


def test_the_report_has_one_line_per_scenario() -> None:
    report = verify(tiny_decoder(), tiny_decoder(DecoderSpec(quantized=True)), options=WHOLE)
    lines = report.to_text().splitlines()
    for comparison, first, last in ((NUMPY_TWIN, [], []), (ORIGINAL, ["predictions"] * 3, ["codes"])):
        start = lines.index(f"{comparison}:")
        table = list(itertools.takewhile(bool, lines[start + 2 :]))
        assert [line.split("  ")[1] for line in table] == [
            *first,
            "prefill 1",
            "prefill 7",
            "prefill 33",
            "left padding, then decode",
            "decode with cache",
            "chunked prefill",
            "near the end, 48",
            "text",
            *last,
        ]
    assert lines[-1] == "ok: lossy as declared (int8)"
    assert VerifyReport(report.rows, report.notes).to_json()["ok"] is True
    bad = dataclasses.replace(report, rows=(*report.rows, Row(ORIGINAL, "x", "y", 1.0, 0.5)))
    assert bad.to_text().endswith(f"FAILED: worse than declared (int8), 1 of {len(bad.rows)} checks")


# Parts


def test_relative_error() -> None:
    one = np.array([[4.0, 1.0], [100.0, 0.0]], np.float32)
    other = one + np.array([[0.0, 0.5], [50.0, 0.0]], np.float32)
    assert relative_error(one, other) == 0.5
    assert relative_error(one, other, np.array([True, False])) == 0.125
    assert relative_error(one, other[:1]) == math.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.ones(2)) == math.inf
    assert relative_error(one, one * np.nan) == math.inf
    assert relative_error(one * np.nan, one * np.nan) == math.inf


def test_scenarios_fit_the_positions() -> None:
    for limit in (1, 4, 6, 9, 16, 40):
        for scenario in make_scenarios(34, limit, (1, 7, 33), seed=0):
            assert sum(step.input_ids.shape[1] for step in scenario.steps) <= limit
            assert all(step.position_ids.max() < limit for step in scenario.steps)
    assert [s.name for s in make_scenarios(34, 6, (1, 7, 33), 0)] == ["prefill 1", "prefill 6", "decode with cache"]
    assert positions_of(tiny_decoder()) == 48


def test_padding_shifts_positions() -> None:
    padded = next(s for s in make_scenarios(34, 40, (1,), 0) if s.name.startswith("left padding"))
    first, second = padded.steps[:2]
    assert first.position_ids[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3]
    assert first.valid[1].tolist() == [False] * 5 + [True] * 4
    assert second.position_ids[:, 0].tolist() == [9, 4, 7]


@pytest.mark.parametrize(("count", "window", "stride"), [(2, 5, 2), (5, 5, 2), (6, 5, 2), (31, 7, 3), (40, 8, 1)])
def test_windows_score_every_token_once(count: int, window: int, stride: int) -> None:
    tokens = list(range(100, 100 + count))
    scored: list[int] = []
    for index, scenario in enumerate(text_windows(tokens, window, stride)):
        (step,) = scenario.steps
        assert step.input_ids.shape[1] <= window
        if index:
            assert step.input_ids.shape[1] - scenario.scored >= window - stride
        scored += step.input_ids[0, -scenario.scored :].tolist()
    assert scored == tokens[1:]


def test_surprise_is_the_negative_log_likelihood() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 4, 5)).astype(np.float32)
    step = Step(np.array([[0, 3, 1, 4]]), np.ones((1, 4), np.int64), np.arange(4)[None])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert surprise(logits, step, 2) == pytest.approx(-(log_p[0, 1, 1] + log_p[0, 2, 4]))
    assert surprise(logits[:, -1:], step, 2) is None


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    def flat(model: onnx_ir.Model) -> None:
        value = model.graph.initializers["lm_head.weight"]
        value.const_value = LazyWeight(Literal.of(np.zeros((34, 10), np.float32)), value.name)

    from passopt.verification.scenarios import observe

    windows = text_windows(TOKENS, 24, 12)
    assert perplexity(windows, observe(changed(flat), windows, Session)) == pytest.approx(34)


def test_numpy_twin_of_any_axis_and_zero_point(tmp_path: Path) -> None:
    model = parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        chain (float[n,2] x) => (float[n,4] y)
        <int8[2,3] a = {1, -2, 3, 127, -128, 6}, float[3] sa = {0.5, 2.0, 0.25}, int8[3] za = {1, 0, -3},
         int8[3,4] b = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] sb = {3.0, 0.5, 1.5}, float sc = {0.125}> {
            wa = DequantizeLinear <axis = -1> (a, sa, za)
            wb = DequantizeLinear <axis = 0> (b, sb)
            wc = DequantizeLinear (b, sc)
            h = MatMul(x, wa)
            w = Add(wb, wc)
            y = MatMul(h, w)
        }""")
    twin = dequantised_twin(model, tmp_path)
    assert not any(node.op_type == "DequantizeLinear" for node in twin.graph)
    assert set(twin.graph.initializers) == {"wa.dequantised", "wb.dequantised", "wc.dequantised"}
    weights = twin.graph.initializers
    assert weights["wa.dequantised"].const_value.numpy().tolist() == [[0, -4, 1.5], [63, -256, 2.25]]  # type: ignore[union-attr]
    feeds = {"x": np.array([[1.0, 2.0], [3.0, -1.0]], np.float32)}
    np.testing.assert_allclose(Session(model).run(feeds)["y"], Session(twin).run(feeds)["y"], rtol=1e-6)


def test_layers_are_cut_at_the_residual_stream() -> None:
    cut = cut_decoder(tiny_decoder())
    assert cut.boundaries == ("x0", "x1", "x2")
    assert set(cut.shared) == {"scores_bias", "position"}
    pieces = cut.pieces([0, 1, 2])
    assert [piece.name for piece in pieces] == ["embedding", "layer 0", "layer 1", "head"]
    given = {name: np.zeros((1, 1), np.float32) for name in ("x1", *cut.shared)}
    layer = cut.graph(pieces[2], given)
    weights = {name for name in layer.graph.initializers if "weight" in name}
    assert len(weights) == 8
    assert all(name.startswith("model.layers.1.") for name in weights)
    assert {value.name for value in layer.graph.outputs} == {"x2", "present.1.key", "present.1.value"}
    assert [piece.name for piece in cut.pieces([1])] == ["embedding to layer 0", "layer 1 to head"]


def test_a_joined_graph_is_cut_like_the_unsplit_one() -> None:
    split = join_ranks(rank_models(tiny_decoder(DecoderSpec(degree=2))), heads=3)
    assert cut_decoder(split).boundaries == ("x0", "x1", "x2")


def test_layers_that_reach_around_each_other_cannot_be_cut() -> None:
    def skip(model: onnx_ir.Model) -> None:
        node_of(model, "h1").replace_input_with(0, node_of(model, "x0").outputs[0])

    with pytest.raises(ModelError, match="candidate: cannot cut the graph before layer 1"):
        verify(tiny_decoder(), changed(skip), options=LAYERWISE)


def test_layerwise_holds_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    create = Session.__init__

    def measured(self: Session, model: onnx_ir.Model, **options: object) -> None:
        sizes.append(sum(value.const_value.nbytes for value in model.graph.initializers.values()))  # type: ignore[union-attr]
        create(self, model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "__init__", measured)
    spec = DecoderSpec(layers=12)
    verify(tiny_decoder(spec), tiny_decoder(spec), options=dataclasses.replace(LAYERWISE, tokens=()))
    whole = sum(value.const_value.nbytes for value in tiny_decoder(spec).graph.initializers.values())  # type: ignore[union-attr]
    assert max(sizes) < whole / 8


def normalise_head(model: onnx_ir.Model) -> None:
    """Rows divided by their norm, which is expanded to the weight's shape, a constant, as torch exports it."""
    weight = model.graph.initializers["lm_head.weight"]
    (transposition,) = weight.consumers()
    editor = Editor(model, "test")
    builder = editor.builder("norm")
    norm = builder.Expand(builder.ReduceL2(weight, [1], keepdims=1), list(weight.shape))  # type: ignore[arg-type]
    norm.shape = weight.shape
    scaled = builder.Transpose(builder.Div(weight, norm), perm=[1, 0])
    editor.replace({transposition.outputs[0]: scaled}, builder.built, [transposition])


@pytest.mark.parametrize(("degree", "normalised"), [(1, False), (1, True), (3, False), (4, False)])
def test_a_large_head_runs_in_slices(monkeypatch: pytest.MonkeyPatch, degree: int, normalised: bool) -> None:
    reference, candidate = tiny_decoder(), changed(nudge("model.norm.weight"), DecoderSpec(degree=degree))
    if normalised:
        normalise_head(reference)
        normalise_head(candidate)
    whole = verify(reference, candidate, options=LAYERWISE)
    widths = []
    monkeypatch.setattr(sliced_head, "SLICE_BYTES", 300)
    add = sliced_head.Logits.add

    def measured(self: sliced_head.Logits, part: sliced_head.Part, found: np.ndarray) -> None:
        widths.append(found.shape[-1])
        add(self, part, found)

    monkeypatch.setattr(sliced_head.Logits, "add", measured)
    sliced = verify(reference, candidate, options=LAYERWISE)
    assert max(widths) < 12
    for one, other in zip(whole.rows, sliced.rows, strict=True):
        assert dataclasses.replace(one, error=0, note="") == dataclasses.replace(other, error=0, note="")
        assert one.error == pytest.approx(other.error, rel=1e-3, abs=1e-6)


def test_a_head_that_mixes_columns_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(model: onnx_ir.Model) -> None:
        node = node_of(model, "logits")
        editor = Editor(model, "test")
        builder = editor.builder("doubled")
        product = builder.MatMul(*node.inputs)
        logits = builder.Slice(builder.Concat(product, product, axis=2), [0], [34], [2])
        editor.replace({node.outputs[0]: logits}, builder.built, [node])

    monkeypatch.setattr(sliced_head, "SLICE_BYTES", 300)
    assert verify(tiny_decoder(), changed(double), options=LAYERWISE).ok


def test_a_single_layer_joins_the_head() -> None:
    spec = DecoderSpec(layers=1)
    report = verify(tiny_decoder(spec), tiny_decoder(spec), options=LAYERWISE)
    assert report.ok
    assert {row.scenario for row in report.rows if "each layer" in row.comparison} == {"embedding", "layer 0 to head"}


# Real exports


@pytest.mark.slow
def test_an_exported_graph_equals_itself(tmp_path: Path) -> None:
    from passopt.frontends.checkpoint import open_checkpoint
    from passopt.frontends.export import export_graph
    from passopt.frontends.options import ExportOptions

    folder = make_checkpoint(tmp_path / "checkpoint", ROTARY)
    model = export_graph(open_checkpoint(folder), ExportOptions(dtype=BF16, trust_remote_code=True), tmp_path)
    tokens = tuple(load_tokenizer(folder).encode_text(evaluation_text())[:400])
    for layerwise in (False, True):
        report = verify(model, model, options=VerifyOptions(tokens=tokens, layerwise=layerwise))
        assert report.ok, report.to_text()
        assert {row.error for row in report.rows} == {0.0}
        text = next(row for row in report.rows if row.output == "perplexity")
        assert 1 < float(text.note.split()[1]) < 12


def offset_scores(model: onnx_ir.Model, number: float) -> onnx_ir.Model:
    """Add a number to all scores of attention: softmax takes it away again, but fp32 scores are rounded at its size."""
    value = model.graph.initializers["bias.shown"]
    value.const_value = onnx_ir.tensor(np.array(number, np.float32), name="bias.shown")
    return model


def scale_norm(model: onnx_ir.Model, factor: float) -> onnx_ir.Model:
    value = model.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    array = np.array(value.const_value.numpy()) * np.float32(factor)  # type: ignore[union-attr]
    value.const_value = LazyWeight(Literal.of(array), value.name)
    return model


@BOTH
@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_that_magnifies_roundings_is_known_no_better_than_they_allow(seed: int, options: VerifyOptions) -> None:
    ranks = rank_models(offset_scores(tiny_decoder(DecoderSpec(degree=3), seed=seed), 3000))
    report = verify(offset_scores(tiny_decoder(seed=seed), 3000), join_ranks(ranks, heads=3), options=options)
    assert report.ok, report
    raised = [row for row in report.rows if row.tolerance > 1e-5 and row.output not in {"top-1", "perplexity"}]
    assert all("roundings of its weights move the original by" in row.note for row in raised)


@BOTH
def test_roundings_excuse_no_fault(options: VerifyOptions) -> None:
    report = verify(tiny_decoder(), scale_norm(tiny_decoder(), 1.0001), options=options)
    assert failed(report)
    faulty = scale_norm(offset_scores(tiny_decoder(seed=1), 3000), 1.01)
    assert failed(verify(offset_scores(tiny_decoder(seed=1), 3000), faulty, options=options))


def test_a_failure_is_weighed_by_the_movement_of_its_own_output() -> None:
    def row(output: str, error: float, comparison: str = ORIGINAL) -> Row:
        return Row(comparison, "prefill 7", output, error, 1e-5)

    near, far, other, own = (
        row("logits", 3e-5),
        row("logits", 2e-4),
        row("present.0.key", 3e-5),
        row("logits", 3e-5, "x"),
    )
    moved = [row("logits", 1e-5), row("logits", 2e-5)]
    assert [item.ok for item in weigh_own_roundings([near, far, other, own], moved)] == [True, False, False, True]
    assert [item.ok for item in weigh_own_roundings([near], moved[:1])] == [False]
    assert suspects([near, far]) == {"prefill 7"}
    shown = dataclasses.replace(near, judged=False)
    predicted = dataclasses.replace(near, scenario="predictions")
    assert not suspects([far, shown, predicted, row("top-1", 3e-5), row("logits", 1e-6)])


def test_a_nudged_model_keeps_masks_and_constants() -> None:
    largest = np.finfo(np.float32).max
    weight = np.array([0, 1, -2, largest, -largest, -np.inf, np.nan], np.float32)
    model = tiny_decoder()
    value = model.graph.initializers["model.norm.weight"]
    value.const_value = LazyWeight(Literal.of(weight), value.name)
    nudged = [nudged_model(model, turn) for turn in range(2)]
    for one in nudged:
        found = np.array(one.graph.initializers["model.norm.weight"].const_value.numpy())  # type: ignore[union-attr]
        assert np.array_equal(found[[0, 5, 6]], weight[[0, 5, 6]], equal_nan=True)
        assert np.isfinite(found[1:5]).all()
        assert (found[1:3] != weight[1:3]).all()
        assert np.allclose(found[:3], weight[:3], rtol=6e-7)
        assert one.graph.initializers["heads.scale"].const_value is model.graph.initializers["heads.scale"].const_value
