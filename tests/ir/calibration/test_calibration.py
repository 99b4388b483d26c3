"""A calibration folder gives back what was written, under the weight that was calibrated and under no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passopt.ir.calibration.calibration import Calibration
from passopt.ir.calibration.entries import CacheEntry, CodesEntry, WeightEntry
from passopt.ir.calibration.keys import fingerprint, weight_key
from passopt.ir.calibration.writer import CalibrationWriter, write_tensors
from passopt.ir.errors import CalibrationError, ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Source
from passopt.ir.weights.sources import safetensors_sources

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((6, 4)).astype(np.float32)
CODES = RANDOM.integers(-127, 128, (6, 4)).astype(np.int8)
SCALES = RANDOM.uniform(1e-3, 2e-3, 6).astype(np.float32)


def checkpoint(folder: Path, weight: np.ndarray = WEIGHT) -> Source:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "weights.safetensors", {"w": weight})
    return safetensors_sources(folder / "weights.safetensors")["w"]


def write(folder: Path, weight: Source) -> None:
    folder.mkdir()
    writer = CalibrationWriter(folder, "key")
    entry = WeightEntry(
        "w",
        "layer-0.safetensors",
        fingerprint(weight),
        rows=32,
        absmax="w.absmax",
        percentiles={"99.9": 2.5},
        codes=(CodesEntry("w.codes", "w.scales", 0, damp=0.01),),
        weight_absmax="w.weight_absmax",
    )
    tensors = {"w.absmax": np.arange(4, dtype=np.float32), "w.codes": CODES, "w.scales": SCALES}
    tensors["w.weight_absmax"] = np.abs(WEIGHT).max(axis=0)
    tensors["present.0.key"] = np.ones((2, 3), np.float32)
    cache = {"present.0.key": CacheEntry("layer-0.safetensors", "present.0.key", 32)}
    writer.add("layer-0", tensors, {weight_key(weight): entry}, cache)
    writer.finish({"passes": "fuse"}, {"digest": "d"})


def test_what_was_written_is_found_by_the_weight(tmp_path: Path) -> None:
    weight = checkpoint(tmp_path / "model")
    write(tmp_path / "calib", weight)
    calibration = Calibration.open(tmp_path / "calib")
    found = calibration.statistics(weight_key(weight.transpose().cast(DataType.FLOAT16)))
    assert found is not None
    assert (found.absmax.tolist(), found.percentiles, found.rows) == ([0, 1, 2, 3], {"99.9": 2.5}, 32)
    np.testing.assert_array_equal(found.weight_absmax, np.abs(WEIGHT).max(axis=0))
    stored = calibration.codes(weight_key(weight))
    assert stored is not None
    with Evaluator() as evaluator:
        np.testing.assert_array_equal(evaluator.array(stored.codes), CODES)
        np.testing.assert_array_equal(evaluator.array(stored.scales), SCALES)
    assert (stored.entry.along, stored.entry.damp) == (0, 0.01)
    assert calibration.codes(weight_key(weight), bits=4, group=64) is None
    absmax = calibration.cache_absmax("present.0.key")
    assert absmax is not None
    assert absmax.shape == (2, 3)
    assert calibration.cache_absmax("present.1.key") is None
    assert calibration.required(weight, "smooth").rows == 32


def test_a_weight_that_was_not_calibrated_says_what_to_run(tmp_path: Path) -> None:
    weight = checkpoint(tmp_path / "model")
    write(tmp_path / "calib", weight)
    calibration = Calibration.open(tmp_path / "calib")
    assert calibration.statistics("other") is None
    with pytest.raises(CalibrationError, match=r"smooth: .*knows nothing of slice\(w.*passes fuse.*calibrate MODEL"):
        calibration.required(weight.slice(0, 1, 3), "smooth")


def test_the_weight_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "calib", checkpoint(tmp_path / "model"))
    other = WEIGHT.copy()
    other[3, 2] += 1e-3
    with pytest.raises(CalibrationError, match="made of another model: its weight 'w' has other numbers"):
        Calibration.open(tmp_path / "calib").required(checkpoint(tmp_path / "other", other), "smooth")


def test_a_folder_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no calibration. Make one: passopt calibrate"):
        Calibration.open(tmp_path / "none")
    write(tmp_path / "calib", checkpoint(tmp_path / "model"))
    manifest, part = tmp_path / "calib" / "manifest.json", tmp_path / "calib" / "layer-0.safetensors"
    text = manifest.read_text()
    for changed, message in (
        (text.replace('"version": 1', '"version": 2'), "is of format passopt-calibration 2, expected"),
        (text[:-9], "is not the manifest of a calibration"),
        (json.dumps({**json.loads(text), "weights": {"w": {}}}), "w: has no name"),
        (json.dumps({**json.loads(text), "weights": {"w": {"name": 1}}}), "name is 1, expected a text"),
    ):
        manifest.write_text(changed)
        with pytest.raises(ModelError, match=message):
            Calibration.open(tmp_path / "calib")
    manifest.write_text(text)
    part.write_bytes(part.read_bytes()[:-64])
    with pytest.raises(
        ModelError, match=r"layer-0.safetensors: has \d+ bytes, expected \d+; the calibration is damaged"
    ):
        Calibration.open(tmp_path / "calib")
    part.unlink()
    with pytest.raises(ModelError, match="layer-0.safetensors: is missing"):
        Calibration.open(tmp_path / "calib")


def test_a_writer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    one, two = {"a": np.arange(3.0)}, {"b": np.arange(5, dtype=np.int8)}
    first = CalibrationWriter(tmp_path, "key")
    first.add("layer-0", one, more={"hidden": "h"})
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"part": "lay')
    second = CalibrationWriter(tmp_path, "key")
    assert [(part["part"], part["more"]) for part in second.finished] == [("layer-0", {"hidden": "h"})]
    second.add("layer-1", two)
    assert len(CalibrationWriter(tmp_path, "key").finished) == 2
    assert not CalibrationWriter(tmp_path, "another").finished
    assert not (tmp_path / "layer-0.safetensors").exists()


def test_a_part_that_was_cut_off_is_not_taken_over(tmp_path: Path) -> None:
    CalibrationWriter(tmp_path, "key").add("layer-0", {"a": np.arange(3.0)})
    path = tmp_path / "layer-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not CalibrationWriter(tmp_path, "key").finished
