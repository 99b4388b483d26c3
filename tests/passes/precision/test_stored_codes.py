"""int8{from=CALIB}: codes that were calibrated are taken, at every degree, in any order, and through packed weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from passopt.calibration.calibrate import calibrate
from passopt.calibration.meter import Meter
from passopt.calibration.parts import Settings
from passopt.calibration.targets import subject_of
from passopt.ir.calibration.calibration import Calibration
from passopt.ir.calibration.entries import CodesEntry, WeightEntry
from passopt.ir.calibration.keys import fingerprint, weight_key
from passopt.ir.calibration.writer import CalibrationWriter
from passopt.ir.errors import CalibrationError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.lazy_weight import expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.precision.stored_codes import stored_codes
from passopt.testing.checking import read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder

RANDOM = np.random.default_rng(5)
NUMBERS = RANDOM.standard_normal((12, 6)).astype(np.float32)
WEIGHT = Literal.of(NUMBERS)
CODES = RANDOM.integers(-127, 128, (12, 6)).astype(np.int8)
SCALES = RANDOM.uniform(1e-3, 2e-3, 12).astype(np.float32)


def folder_of(root: Path, weight: Expression = WEIGHT, along: int = 0, **changes: object) -> Path:
    """A calibration that holds codes of one weight."""
    folder = root / "calib"
    folder.mkdir()
    codes, scales = (CODES, SCALES) if along == 0 else (CODES, SCALES[:6])
    entry = CodesEntry("w.codes", "w.scales", along, **changes)  # type: ignore[arg-type]
    writer = CalibrationWriter(folder, "key")
    known = WeightEntry("w", "w.safetensors", fingerprint(weight), codes=(entry,))
    writer.add("w", {"w.codes": codes, "w.scales": scales}, {weight_key(weight): known})
    writer.finish({}, {})
    return folder


def values(weight: Expression, folder: Path, axis: int = 0, rank: int = 0) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = stored_codes(weight, axis, Calibration.open(folder), "int8")
    assert codes.shape == weight.shape
    assert scales.shape == (weight.shape[axis],)
    with Evaluator(rank) as evaluator:
        return evaluator.array(codes), evaluator.array(scales)


def test_a_slice_of_a_packed_weight_takes_its_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    codes, scales = values(WEIGHT.slice(0, 4, 9), folder)
    np.testing.assert_array_equal(codes, CODES[4:9])
    np.testing.assert_array_equal(scales, SCALES[4:9])
    codes, scales = values(WEIGHT.slice(1, 1, 4), folder)
    np.testing.assert_array_equal(codes, CODES[:, 1:4])
    np.testing.assert_array_equal(scales, SCALES)


def test_transpositions_casts_shards_and_padding_are_those_of_the_codes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    codes, scales = values(WEIGHT.transpose(), folder, axis=1)
    np.testing.assert_array_equal(codes, CODES.T)
    np.testing.assert_array_equal(scales, SCALES)
    codes, scales = values(WEIGHT.cast(DataType.FLOAT16), folder)
    np.testing.assert_array_equal(codes, CODES)
    np.testing.assert_array_equal(scales, SCALES.astype(np.float16))
    codes, scales = values(WEIGHT.pad(0, 15, segments=3).shard(0, 5, segments=3), folder, rank=4)
    np.testing.assert_array_equal(codes, np.zeros((3, 6)))
    np.testing.assert_array_equal(scales, np.ones(3))
    codes, scales = values(WEIGHT.pad(1, 8).shard(1, 2), folder, rank=1)
    np.testing.assert_array_equal(codes, np.pad(CODES, ((0, 0), (0, 2)))[:, 4:])
    np.testing.assert_array_equal(scales, SCALES)


def test_a_weight_stored_as_in_out_has_its_channels_along_its_columns(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, along=1)
    codes, scales = values(WEIGHT.transpose(), folder)
    np.testing.assert_array_equal(codes, CODES.T)
    np.testing.assert_array_equal(scales, SCALES[:6])
    with pytest.raises(CalibrationError, match="with a scale per index of axis 1, here it is read along axis 0"):
        values(WEIGHT, folder)


def test_what_is_not_in_the_folder_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(CalibrationError, match=r"int8: .*calib knows nothing of normalize_rows\(literal"):
        values(WEIGHT.normalize_rows(1e-5), folder)
    with pytest.raises(CalibrationError, match=r"knows nothing of pad\("):
        values(WEIGHT.pad(0, 15, value=1.0), folder)


def test_statistics_without_codes_say_how_to_make_them(tmp_path: Path) -> None:
    folder = tmp_path / "calib"
    folder.mkdir()
    writer = CalibrationWriter(folder, "key")
    known = WeightEntry("w", "w.safetensors", fingerprint(WEIGHT), rows=3, absmax="w.absmax")
    writer.add("w", {"w.absmax": SCALES}, {weight_key(WEIGHT): known})
    writer.finish({}, {})
    with pytest.raises(CalibrationError, match="what was measured on the input of literal.*and no codes. Make them"):
        values(WEIGHT, folder)


def test_codes_of_other_bits_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, bits=4, group=3)
    with pytest.raises(
        CalibrationError, match=r"holds codes of 4 bits of literal.*, expected 8 bits. Calibrate for these: passopt"
    ):
        values(WEIGHT, folder)


def test_gptq_without_a_calibration_says_what_to_run() -> None:
    model = read_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[b,6] x) => (float[b,4] y) { y = Identity(x) }'
    )
    with pytest.raises(CalibrationError, match=r"method=gptq needs codes .*calibrate MODEL --data FILE -o CALIB"):
        QuantizeWeights(method="gptq").run(model)
    with pytest.raises(CalibrationError, match=r"method=mse needs codes .*MODEL --method mse --collect codes"):
        QuantizeWeights(method="mse").run(model)
    with pytest.raises(CalibrationError, match="none: holds no calibration"):
        QuantizeWeights(from_="none").run(model)


def test_codes_of_another_method_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model = read_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[b,6] x) => (float[b,4] y) { y = Identity(x) }'
    )
    QuantizeWeights(method="gptq", from_=str(folder)).run(model)
    with pytest.raises(CalibrationError, match="are of the method gptq, not of mse"):
        QuantizeWeights(method="mse", from_=str(folder)).run(model)


EMPTY = '<ir_version: 10, opset_import: ["" : 21]> g (float[b,6] x) => (float[b,6] y) { y = Identity(x) }'
SPELLINGS = {
    "transposed": "<float[4,6] w = random> { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }",
    "direct": "<float[6,4] w = random> { y = MatMul(x, w) }",
    "gemm": "<float[6,4] w = random, float[4] b = {1, 2, 3, 4}> { y = Gemm(x, w, b) }",
    "turned gemm": "<float[4,6] w = random> { y = Gemm<transB = 1>(x, w) }",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_linear_takes_the_codes_of_its_weight(tmp_path: Path, spelling: str) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[b,6] x) => (float[b,4] y) {SPELLINGS[spelling]}'
    model = read_model(text)
    subject = subject_of(model)
    (target,) = subject.targets
    assert (target.weight.shape, target.inputs) == ((4, 6), ("x",))
    settings = Settings(method="mse", inputs=False, cache=False)
    folder = tmp_path / "calib"
    calibrate(subject, np.zeros((1, 1), np.int64), settings, folder, {}, {}, Meter(), lambda note: None)
    entry = Calibration.open(folder).weights[target.key].codes[0]
    assert entry.along == int(target.is_turned) == int(spelling in {"direct", "gemm"})
    taken = model.clone()
    QuantizeWeights(from_=str(folder)).run(taken)
    found = taken.graph.initializers["w.codes"]
    assert expression_of(found).shape == (4, 6)  # type: ignore[union-attr]
    with Evaluator() as evaluator:
        numbers = (
            evaluator.array(expression_of(found))
            * evaluator.array(  # type: ignore[arg-type]
                expression_of(taken.graph.initializers["w.scales"])  # type: ignore[arg-type]
            )[:, None]
        )
        np.testing.assert_allclose(numbers, evaluator.array(target.weight), atol=0.02)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The weights of a tiny decoder, and its calibration."""
    root = tmp_path_factory.mktemp("stored")
    model = tiny_decoder(DecoderSpec(), checkpoint=root / "w.safetensors")
    ids = np.random.default_rng(1).integers(0, 34, (4, 16))
    calibrate(subject_of(model), ids, Settings(), root / "calib", {}, {}, Meter(), lambda note: None)
    return root / "w.safetensors", root / "calib"


def quantised(checkpoint: Path, pipeline: str) -> onnx_ir.Model:
    model = tiny_decoder(DecoderSpec(), checkpoint=checkpoint)
    for item in resolve(pipeline).passes:
        item.run(model)
    return model


@pytest.mark.parametrize("degree", [2, 3])
def test_codes_are_equal_at_every_degree_and_in_any_order(calibrated: tuple[Path, Path], degree: int) -> None:
    checkpoint, folder = calibrated
    shard, int8 = f"tp{{degree={degree},pad=true}}", f"int8{{from={folder}}}"
    models = [quantised(checkpoint, text) for text in (f"{shard},{int8}", f"{int8},{shard}")]
    one, other = (model.graph.initializers for model in models)
    names = [name for name in one if name.endswith((".codes", ".scales"))]
    assert len(names) == 2 * 12
    for name in names:
        first, second = (expression_of(side[name]) for side in (one, other))
        assert first is not None
        assert second is not None
        assert first.text() == second.text()
        assert first.depends_on_rank or name.endswith(("o_proj.weight.scales", "down_proj.weight.scales"))
        for rank in range(degree):
            with Evaluator(rank) as evaluator:
                np.testing.assert_array_equal(evaluator.array(first), evaluator.array(second))
