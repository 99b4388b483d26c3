"""passopt.calibration.calibrate: what is measured, the codes, and the same bytes however it ran."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from passopt.calibration.meter import Meter
from passopt.calibration.parts import Settings
from passopt.calibration.targets import subject_of
from passopt.ir.calibration.calibration import Calibration
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.cache_inputs import empty_cache

Array = np.ndarray
ORIGINAL = Settings(true_sequential=False)


def run(model: onnx_ir.Model, pipeline: str) -> onnx_ir.Model:
    for item in resolve(pipeline).passes:
        item.run(model)
    return model


def stored(model: onnx_ir.Model, ending: str, rank: int = 0) -> dict[str, Array]:
    """The codes or scales that a model holds, by the name of the weight."""
    values = {name: value for name, value in model.graph.initializers.items() if name.endswith(ending)}
    with Evaluator(rank) as evaluator:
        return {name: evaluator.array(expression_of(value)) for name, value in values.items()}


def inputs_of(model: onnx_ir.Model, ids: Array) -> dict[str, Array]:
    """What each linear of the decoder reads for all windows [n, k], by the name of its weight: a run of the whole."""
    subject = subject_of(model, head=True)
    graph = subject.graph.graph
    names = {target.inputs[0] for target in subject.targets}
    known = {value.name for value in graph.outputs}
    graph.outputs.extend(
        value for node in graph for value in node.outputs if value.name in names and value.name not in known
    )
    session = Session(subject.graph, threads=1, optimize=False)
    length = ids.shape[1]
    same = {
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        **empty_cache(model),
    }
    runs = [session.run({"input_ids": row[None], **same}) for row in ids]
    return {
        target.name: np.concatenate([found[target.inputs[0]].reshape(-1, target.weight.shape[1]) for found in runs])
        for target in subject.targets
    }


def squared_errors(model: onnx_ir.Model, tiny: Any) -> dict[str, float]:
    """How far the codes of each linear are from its weight."""
    codes, scales = stored(model, ".codes"), stored(model, ".scales")
    found = {}
    with Evaluator() as evaluator:
        for target in subject_of(tiny.model()).targets:
            made = codes[f"{target.name}.codes"] * scales[f"{target.name}.scales"][:, None]
            found[target.name] = float(np.square(made - evaluator.array(target.weight)).sum(dtype=np.float64))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_inputs_are_measured_as_in_a_run_of_the_whole_model(tiny: Any) -> None:
    folder, report = tiny.calibrate("calib", ORIGINAL, head=True)
    calibration = Calibration.open(folder)
    expected = inputs_of(tiny.model(), tiny.ids)
    assert len(expected) == 2 * 6 + 1 == len(report.weights)
    for target in subject_of(tiny.model(), head=True).targets:
        found = calibration.statistics(target.key)
        assert found is not None
        rows = np.abs(expected[target.name])
        np.testing.assert_allclose(found.absmax, rows.max(axis=0), rtol=1e-4)
        with Evaluator() as evaluator:
            assert np.array_equal(found.weight_absmax, np.abs(evaluator.array(target.weight)).max(axis=0))
        assert found.rows == tiny.ids.size == len(rows)
        for share, value in found.percentiles.items():
            assert value == pytest.approx(np.percentile(rows, float(share), method="higher"), rel=0.02)


def test_keys_and_values_are_measured(tiny: Any) -> None:
    folder, report = tiny.calibrate("calib", ORIGINAL)
    assert sorted(report.cache) == [f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    found = Calibration.open(folder).cache_absmax("present.1.key")
    model, ids = tiny.model(), tiny.ids
    session = Session(model, threads=1)
    feeds = {"attention_mask": np.ones_like(ids[:1]), "position_ids": np.arange(ids.shape[1])[None]}
    feeds |= empty_cache(model)
    keys = [session.run({"input_ids": row[None], **feeds})["present.1.key"] for row in ids]
    np.testing.assert_allclose(found, np.abs(np.concatenate(keys)).max(axis=(0, 2)), rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"head": True}, {"embedding": True}, {"head": True, "embedding": True}])
def test_rounded_codes_are_those_of_int8(tiny: Any, options: dict[str, bool]) -> None:
    folder, _ = tiny.calibrate("calib", Settings(method="rtn"), **options)
    text = ",".join(f"{key}=true" for key in options)
    plain, taken = run(tiny.model(), f"int8{{{text}}}"), run(tiny.model(), f"int8{{from={folder},{text}}}")
    for ending in (".codes", ".scales"):
        expected, found = stored(plain, ending), stored(taken, ending)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    text_of = [str([node.op_type for node in model.graph]) for model in (plain, taken)]
    assert text_of[0] == text_of[1]


@pytest.mark.parametrize("settings", [ORIGINAL, Settings(), Settings(act_order=False)])
def test_gptq_keeps_the_outputs_of_linears_better_than_rounding(tiny: Any, settings: Settings) -> None:
    folder, _ = tiny.calibrate("calib", settings)
    rows = inputs_of(tiny.model(), tiny.ids)
    errors = {}
    for name, model in (("gptq", run(tiny.model(), f"int8{{from={folder}}}")), ("rtn", run(tiny.model(), "int8"))):
        codes, scales = stored(model, ".codes"), stored(model, ".scales")
        with Evaluator() as evaluator:
            for target in subject_of(tiny.model()).targets:
                made = codes[f"{target.name}.codes"] * scales[f"{target.name}.scales"][:, None]
                difference = rows[target.name] @ (made - evaluator.array(target.weight)).T
                errors[target.name, name] = float(np.square(difference).sum())
    ratios = [errors[name, "gptq"] / errors[name, "rtn"] for name, kind in errors if kind == "rtn"]
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.7


def test_the_number_of_threads_changes_no_byte(tiny: Any) -> None:
    one, _ = tiny.calibrate("one", Settings(threads=1))
    four, _ = tiny.calibrate("four", Settings(threads=4))
    assert bytes_of(one) == bytes_of(four)


@pytest.mark.parametrize("stop", [3, 9, 40, 100])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tiny: Any, stop: int) -> None:
    class Stopping(Meter):
        calls = itertools.count()

        def add(self, work: float) -> None:
            if next(self.calls) == stop:
                raise KeyboardInterrupt

    whole, _ = tiny.calibrate("whole")
    with pytest.raises(KeyboardInterrupt):
        tiny.calibrate("stopped", meter=Stopping())
    assert not (tiny.root / "stopped").exists()
    folder, report = tiny.calibrate("stopped")
    assert report.resumed == {3: 0, 9: 1, 40: 1, 100: 2}[stop]  # the embedding is a piece of its own
    assert bytes_of(folder) == bytes_of(whole)
    assert not list(tiny.root.glob(".*"))


def test_an_interrupted_run_of_other_settings_is_not_gone_on_with(tiny: Any) -> None:
    class Stopping(Meter):
        def end_piece(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.calibrate("calib", meter=Stopping())
    _, report = tiny.calibrate("calib", Settings(damp=0.2))
    assert report.resumed == 0


def test_lost_activations_let_a_run_begin_anew(tiny: Any) -> None:
    class Stopping(Meter):
        def end_piece(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.calibrate("calib", meter=Stopping())
    (hidden,) = (tiny.root / ".calib.partial").glob("*.hidden")
    hidden.write_bytes(hidden.read_bytes()[:-1])
    _, report = tiny.calibrate("calib")
    assert report.resumed == 0


def test_codes_alone_need_no_data(tiny: Any) -> None:
    only = Settings(method="mse", inputs=False, cache=False)
    folder, report = tiny.calibrate("calib", only, head=True, embedding=True)
    assert {entry.codes[0].method for entry in report.weights.values()} == {"mse"}
    assert len(report.weights) == 2 * 6 + 3  # the table of positions counts as an embedding
    found, plain = (run(tiny.model(), f"int8{{{text}}}") for text in (f"from={folder}", "method=rtn"))
    errors = [squared_errors(model, tiny) for model in (found, plain)]
    assert all(errors[0][name] <= errors[1][name] for name in errors[0])
    assert sum(errors[0].values()) < sum(errors[1].values())


def test_statistics_alone_make_no_codes(tiny: Any) -> None:
    folder, report = tiny.calibrate("calib", Settings(codes=False))
    assert not any(entry.codes for entry in report.weights.values())
    calibration = Calibration.open(folder)
    assert all(calibration.statistics(key) is not None for key in calibration.weights)


def test_fewer_tokens_than_channels_and_dead_channels_are_said(tiny: Any) -> None:
    tiny.ids = tiny.ids[:1, :7]
    _, report = tiny.calibrate("calib")
    assert any("7 tokens are fewer than its 10 channels" in note for note in report.notes)
    assert tiny.said == report.notes


def test_a_channel_that_is_always_zero_is_rounded_to_the_nearest(tiny: Any) -> None:
    model = tiny.model()
    norm = model.graph.initializers["model.layers.0.input_layernorm.weight"]
    scale = np.array(norm.const_value.numpy())
    scale[[2, 5]] = 0
    changed = Literal.of(scale)
    tiny.model = lambda: _with(model.clone(), norm.name, changed)
    folder, report = tiny.calibrate("calib")
    assert any("2 of 10 channels are 0 in all of the data" in note for note in report.notes)
    codes, plain = (stored(run(tiny.model(), text), ".codes") for text in (f"int8{{from={folder}}}", "int8"))
    name = "model.layers.0.self_attn.q_proj.weight.codes"
    np.testing.assert_array_equal(codes[name][:, [2, 5]], plain[name][:, [2, 5]])
    assert (codes[name] != plain[name]).any()


def test_inputs_that_are_all_zero_are_rounded_to_the_nearest(tiny: Any) -> None:
    model = tiny.model()
    name = "model.layers.1.input_layernorm.weight"
    tiny.model = lambda: _with(model.clone(), name, Literal.of(np.zeros(10, np.float32)))
    folder, report = tiny.calibrate("calib")
    assert any("10 of 10 channels are 0 in all of the data" in note for note in report.notes)
    codes, plain = (stored(run(tiny.model(), text), ".codes") for text in (f"int8{{from={folder}}}", "int8"))
    key = "model.layers.1.self_attn.v_proj.weight.codes"
    np.testing.assert_array_equal(codes[key], plain[key])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.1.input_layernorm.weight",
            r"the input of model.layers.1.*q_proj.weight: NaN or infinity",
        ),
        ("model.layers.1.mlp.up_proj.weight", r"weight 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"),
    ],
)
def test_numbers_that_are_none_are_named_and_nothing_is_left(tiny: Any, name: str, message: str) -> None:
    model = tiny.model()
    array = np.array(model.graph.initializers[name].const_value.numpy())
    array.reshape(-1)[5] = np.nan
    tiny.model = lambda: _with(model.clone(), name, Literal.of(array))
    with pytest.raises(ModelError, match=message):
        tiny.calibrate("calib")
    assert not list(tiny.root.glob("*calib*"))


def test_a_model_that_is_quantised_has_nothing_to_calibrate(tiny: Any) -> None:
    tiny.model = lambda: run(type(tiny).model(tiny), "int8")
    with pytest.raises(ModelError, match="int8 finds no linear in this model that it would quantise"):
        tiny.calibrate("calib")


def test_a_model_that_is_sharded_is_calibrated_before(tiny: Any) -> None:
    tiny.model = lambda: run(type(tiny).model(tiny), "tp{degree=2,pad=true}")
    with pytest.raises(ModelError, match="the model is sharded; calibrate it before, and shard it with the codes"):
        tiny.calibrate("calib")


def test_a_folder_that_exists_is_not_written_to(tiny: Any) -> None:
    (tiny.root / "calib").mkdir()
    with pytest.raises(UsageError, match="output exists"):
        tiny.calibrate("calib")


@pytest.mark.parametrize("dtype", [DataType.FLOAT16, DataType.BFLOAT16])
def test_weights_in_16_bits_have_scales_of_their_own_dtype(tiny: Any, dtype: DataType) -> None:
    tiny.spec = dataclasses.replace(tiny.spec, dtype=dtype)
    folder, _ = tiny.calibrate("calib", Settings(method="rtn"))
    plain, taken = run(tiny.model(), "int8"), run(tiny.model(), f"int8{{from={folder}}}")
    for ending in (".codes", ".scales"):
        for name, array in stored(plain, ending).items():
            np.testing.assert_array_equal(stored(taken, ending)[name], array)
            assert stored(taken, ending)[name].dtype == array.dtype


def _with(model: onnx_ir.Model, name: str, content: Literal) -> onnx_ir.Model:
    model.graph.initializers[name].const_value = LazyWeight(content, name)
    return model
