"""Codes of 4 bits in groups: by rounding as int4 makes them, by GPTQ against a plain loop, and under tp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

pytest.importorskip("threadpoolctl")

import passopt
from passopt.calibration.codes import Order, round_weight
from passopt.calibration.inverse_factor import factor_inverse
from passopt.calibration.parts import Settings
from passopt.calibration.rounding import Codes, dequantised
from passopt.calibration.tiles import TileRunner
from passopt.ir.errors import CalibrationError, UsageError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.decoders import DecoderSpec, tiny_decoder

SPEC = DecoderSpec(layers=1, heads=4, head_dim=32, hidden=96, intermediate=192)
Array = np.ndarray


def test_columns_are_rounded_as_a_plain_loop_does() -> None:
    """Static groups: each column is rounded by the scale of its group in the weight as it is stored."""
    random = np.random.default_rng(1)
    rows = random.standard_normal((300, 64)) * np.exp(random.standard_normal(64))
    weight = random.standard_normal((5, 64)).astype(np.float32)
    hessian = (2 * rows.T @ rows / len(rows)).astype(np.float32)
    scales = np.abs(weight.reshape(5, 4, 16)).max(2).astype(np.float32) / np.float32(7)
    order = Order.of(hessian.diagonal(), by_activity=True)
    columns = order.columns
    with TileRunner(1) as runner:
        factor = factor_inverse(hessian[columns][:, columns].copy(), 0.01, runner, "x")
        found = round_weight(weight[:, columns].copy(), scales, factor, order, 7, runner)
    damped = hessian[columns][:, columns].astype(np.float64)
    damped += 0.01 * np.mean(hessian.diagonal()) * np.eye(64)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, expected = weight[:, columns].astype(np.float64), np.zeros((5, 64), np.int8)
    for place, column in enumerate(columns):
        scale = scales[:, column // 16]
        code = np.clip(np.rint(left[:, place] / scale), -7, 7)
        expected[:, column] = code
        error = (left[:, place] - code * scale) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    assert (found != expected).mean() < 0.02, "a value near a half may round the other way in fp32"
    loss = [np.square(rows @ (weight.T - dequantised(Codes(codes, scales)))).mean() for codes in (found, expected)]
    assert loss[0] == pytest.approx(loss[1], rel=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, and its calibrations by GPTQ and by rounding."""
    from passopt.calibration.calibrate import calibrate
    from passopt.calibration.meter import Meter
    from passopt.calibration.targets import subject_of

    root = tmp_path_factory.mktemp("groups")
    ids = np.random.default_rng(3).integers(0, SPEC.vocab, (4, 40))
    found = {"checkpoint": root / "w.safetensors"}
    for method in ("gptq", "rtn"):
        subject = subject_of(tiny_decoder(SPEC, checkpoint=found["checkpoint"]))
        settings = Settings(method=method, bits=4, group=32)
        calibrate(subject, ids, settings, root / method, {}, {}, Meter(), lambda note: None)
        found[method] = root / method
    return found


def codes_of(folders: dict[str, Path], pipeline: str, degree: int = 1) -> dict[str, list[Array]]:
    model = tiny_decoder(SPEC, checkpoint=folders["checkpoint"])
    run_passes(model, resolve(pipeline).passes)
    found = {}
    for name, value in model.graph.initializers.items():
        if name.endswith((".codes", ".scales")):
            found[name] = [read(value, rank) for rank in range(degree)]
    return found


def read(value: onnx_ir.Value, rank: int) -> Array:
    with Evaluator(rank) as evaluator:
        return evaluator.array(expression_of(value))


def test_rounded_codes_are_those_of_the_pass(folders) -> None:
    one = codes_of(folders, "int4{group=32}")
    two = codes_of(folders, f"int4{{group=32,method=rtn,from={folders['rtn']}}}")
    assert one.keys() == two.keys()
    assert len(one) == 12
    for name, (expected,) in one.items():
        assert np.array_equal(two[name][0], expected), name


def test_codes_by_gptq_keep_the_scales_and_the_dtype(folders) -> None:
    one = codes_of(folders, "int4{group=32}")
    two = codes_of(folders, f"int4{{group=32,method=gptq,from={folders['gptq']}}}")
    differ = 0.0
    for name, (expected,) in one.items():
        (found,) = two[name]
        assert found.dtype == expected.dtype
        if name.endswith(".scales"):
            assert np.array_equal(found, expected), name
        else:
            assert np.abs(found.astype(np.int8)).max() <= 7
            differ += np.mean(found != expected)
    assert differ > 0.1


def test_calibrated_codes_are_equal_in_either_order_and_at_every_degree(folders) -> None:
    int4 = f"int4{{group=32,from={folders['gptq']}}}"
    whole = codes_of(folders, int4)
    first, last = codes_of(folders, f"{int4},tp{{degree=2}}", 2), codes_of(folders, f"tp{{degree=2}},{int4}", 2)
    for name, (expected,) in whole.items():
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        for parts in (first[name], last[name]):
            assert np.array_equal(np.concatenate(parts, axis), expected), name


@pytest.mark.parametrize(
    ("pipeline", "error", "message"),
    [
        ("int4{group=64,from=CALIB}", UsageError, "groups of 64 do not divide the 96 inputs"),
        (
            "int8{from=CALIB}",
            CalibrationError,
            r"holds codes of 4 bits of .*, expected 8 bits. Calibrate for these: passopt calibrate MODEL --bits 8 …, "
            "or quantise with int4",
        ),
        ("int4{group=32,method=rtn,from=CALIB}", CalibrationError, "of the method gptq, not of rtn"),
    ],
)
def test_codes_of_another_kind_are_refused(folders, pipeline: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        codes_of(folders, pipeline.replace("CALIB", str(folders["gptq"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "codes of 4 bits need groups of 128, 64, 32 inputs, not 0"),
        ({"group": 64}, "codes of 8 bits have a scale per output channel"),
        ({"bits": 3, "group": 64}, "`bits` is 8 or 4, not 3"),
        ({"bits": 4, "group": 32, "embedding": True}, "a table of 4 bits would be dequantised whole"),
        ({"bits": 4, "group": 64}, "groups of 64 do not fill the 96 inputs of model.layers.0"),
    ],
)
def test_kinds_without_a_pass_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        passopt.calibrate(tiny_decoder(SPEC), tmp_path / "calib", method="rtn", **options)
    assert not (tmp_path / "calib").exists()
