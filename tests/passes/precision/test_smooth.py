"""smooth: the same function with the scales of SmoothQuant wherever they fold in, and errors without statistics."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from passopt.ir.calibration.calibration import InputStatistics
from passopt.ir.calibration.entries import MANIFEST_NAME, WeightEntry
from passopt.ir.calibration.keys import fingerprint, weight_key
from passopt.ir.calibration.writer import CalibrationWriter
from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.linears import find_linear
from passopt.ir.graph.lm_head import is_head
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.rotate_residual import RotateResidual
from passopt.passes.precision.smooth import Smooth, smoothing_scales
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.testing.checking import check, compare_numbers, read_model
from passopt.verification.rewrites.check import NumericCheck

WEIGHTS = """float[9,12] embed = random, float[12] g0 = random, float[12] b0 = random, float[8,12] up = random,
    float[8,12] gate = random, float[8,12] down = random, float[8] b = random, float[12] gf = random,
    float[9,12] head = random"""
PARTS = {
    "norm": "x0 = Gather(embed, ids) n0 = RMSNormalization(x0, g0)",
    "readers": "gt = Transpose<perm=[1,0]>(gate) ut = Transpose<perm=[1,0]>(up) g = MatMul(n0, gt)",
    "up": "u = MatMul(n0, ut)",
    "gated": "s = Sigmoid(g) h = Mul(s, u)",
    "end": "d = MatMul(h, down) x1 = Add(x0, d) nf = RMSNormalization(x1, gf)",
    "head": "ht = Transpose<perm=[1,0]>(head) logits = MatMul(nf, ht)",
}


def text(outputs="", **parts):
    assert parts.keys() <= PARTS.keys()
    body = " ".join({**PARTS, **parts}.values())
    return (
        f'<ir_version: 11, opset_import: ["" : 23]> g (int64[batch,seq] ids) => (float[batch,seq,9] logits{outputs}) '
        f"<{WEIGHTS}> {{ {body} }}"
    )


def calibrated(folder, model, *, head=False, with_weights=True):
    """Write a calibration of all linears of a model but the head, with inputs of very unequal channels."""
    folder.mkdir()
    writer = CalibrationWriter(folder, "key")
    tensors, entries, inputs = {}, {}, {}
    for node in model.graph:
        linear = find_linear(node)
        if linear is None or (is_head(node) and not head):
            continue
        weight, name = linear.weight.expression(), linear.weight.value.name
        width = weight.shape[1]
        random = np.random.default_rng(len(inputs))
        absmax = inputs.setdefault(linear.input, np.exp2(random.uniform(-6, 6, width)).astype(np.float32))
        tensors[f"{name}.absmax"] = absmax
        with Evaluator() as evaluator:
            tensors[f"{name}.weight"] = np.abs(evaluator.array(weight)).astype(np.float32).max(axis=0)
        of_weight = f"{name}.weight" if with_weights else ""
        mark = fingerprint(weight)
        entries[weight_key(weight)] = WeightEntry(name, "all.safetensors", mark, 5, f"{name}.absmax", {}, (), of_weight)
    writer.add("all", tensors, entries)
    writer.finish({"passes": "fuse"}, {})
    return tensors


@pytest.fixture
def smooth(tmp_path):
    """Run the pass with a calibration of the model, check all that holds for passes, and return the changed model."""

    def run(source, **options):
        model = read_model(source)
        calibrated(tmp_path / "calib", model)
        changed, result = check(Smooth(from_=str(tmp_path / "calib"), **options), model)
        assert result.modified
        return changed, result

    return run


def values(model, name):
    with Evaluator() as evaluator:
        return evaluator.array(expression_of(model.graph.initializers[name]))


def test_scales_move_into_norms_writers_and_readers(check_pass, tmp_path):
    model = read_model(text())
    calibrated(tmp_path / "calib", model)
    check_pass(Smooth(from_=str(tmp_path / "calib")), model, matches=2)


def test_the_numbers_are_those_of_smoothquant(tmp_path):
    model = read_model(text())
    before = {name: values(model, name) for name in ("g0", "gate", "up", "down")}
    found = calibrated(tmp_path / "calib", model)
    Smooth(alpha=0.6, from_=str(tmp_path / "calib")).run(model)
    largest = np.maximum(np.abs(before["gate"]).max(axis=0), np.abs(before["up"]).max(axis=0))
    s = found["gate.absmax"] ** 0.6 / largest**0.4
    t = found["down.absmax"] ** 0.6 / np.abs(before["down"]).max(axis=1) ** 0.4
    expected = {
        "g0.smoothed": before["g0"] / s,
        "gate.smoothed": before["gate"] * s,
        "up.smoothed.smoothed": before["up"] * s / t[:, None],
        "down.smoothed": before["down"].T * t,
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(values(model, name), numbers, rtol=1e-5)


@pytest.mark.parametrize("targets", ["norm", "down"])
def test_targets_are_chosen(smooth, targets):
    model, result = smooth(text(), targets=targets)
    assert result.matches == 1
    names = {name for name in model.graph.initializers if "smoothed" in name}
    assert (
        names
        == {"norm": {"g0.smoothed", "gate.smoothed", "up.smoothed"}, "down": {"up.smoothed", "down.smoothed"}}[targets]
    )


SPELLINGS = {
    "a layer norm with a bias": {"norm": "x0 = Gather(embed, ids) n0 = LayerNormalization(x0, g0, b0)"},
    "a bias behind the writer": {"up": "v = MatMul(n0, ut) u = Add(b, v)"},
    "casts and identities": {
        "norm": "x0 = Gather(embed, ids) m = RMSNormalization(x0, g0) n0 = Identity(m)",
        "up": "v = MatMul(n0, ut) u = Cast<to=1>(v)",
        "gated": "s = Sigmoid(g) k = Mul(u, s) h = Cast<to=1>(k)",
    },
    "a product of two linears": {"gated": "h = Mul(g, u)"},
    "readers that are one weight": {
        "readers": "gt = Transpose<perm=[1,0]>(gate) g = MatMul(n0, gt)",
        "up": "z = MatMul(n0, gt) u = Identity(z)",
    },
}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_spellings(smooth, spelling):
    _, result = smooth(text(**SPELLINGS[spelling]))
    assert result.matches == 2


def test_gemms_and_their_biases(smooth):
    parts = {"up": "u = Gemm<transB=1>(n0, up, b)", "end": PARTS["end"].replace("MatMul(h", "Gemm(h")}
    model, result = smooth(text(**parts).replace("batch,", ""))
    assert result.matches == 2
    assert "b.smoothed" in model.graph.initializers


def test_16_bits_stay_16_bits(tmp_path):
    source = text().replace("float[", "float16[")
    model = read_model(source)
    calibrated(tmp_path / "calib", model)
    changed = model.clone()
    Smooth(from_=str(tmp_path / "calib")).run(changed)
    assert expression_of(changed.graph.initializers["gate.smoothed"]).dtype == model.graph.initializers["gate"].dtype
    compare_numbers(model, changed, 5e-3, {}, {})


REFUSED = {
    "a norm that is an output": ({"outputs": ", float[batch,seq,12] n0"}, "n0 is an output of the graph"),
    "a norm that something else reads": (
        {"end": "e = MatMul(h, down) d = Add(e, n0) x1 = Add(x0, d) nf = RMSNormalization(x1, gf)"},
        "Add .* reads n0, expected a linear with a float weight",
    ),
    "a computed weight of a norm": (
        {"norm": "x0 = Gather(embed, ids) q = Mul(g0, b0) n0 = RMSNormalization(x0, q)"},
        r"reads q \[12\], expected a constant of shape \[12\]",
    ),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_is_in_the_way_is_said(smooth, what):
    parts, message = REFUSED[what]
    model, result = smooth(text(**parts))
    assert result.matches == 1  # what is behind the gate
    refusals = list(Smooth().explain(read_model(text(**parts))))
    assert any(re.search(message, refusal.reason) for refusal in refusals), refusals
    assert "g0.smoothed" not in model.graph.initializers


@pytest.mark.parametrize("other", ["y = Relu(u)", "y = Identity(h)"])
def test_a_factor_or_product_with_other_readers_stays(smooth, other):
    source = text(outputs=", float[batch,seq,8] y", gated=f"{PARTS['gated']} {other}")
    model, result = smooth(source)
    assert result.matches == 1
    assert "down.smoothed" not in model.graph.initializers


def test_a_factor_that_is_rounded_stays(smooth):
    model, result = smooth(text(up="v = MatMul(n0, ut) i = Cast<to=7>(v) u = Cast<to=1>(i)"), targets="all")
    assert result.matches == 1
    assert "down.smoothed" not in model.graph.initializers


def test_a_calibrated_head_is_smoothed_too(tmp_path):
    model = read_model(text())
    calibrated(tmp_path / "calib", model, head=True)
    _, result = check(Smooth(from_=str(tmp_path / "calib")), model)
    assert result.matches == 3


def test_a_channel_without_outliers_or_weights_keeps_its_scale():
    found = InputStatistics(np.array([0, 2, 4, 0], np.float32), {}, 1, np.array([1, 0, 1, 0], np.float32))
    assert smoothing_scales([found], 0.5).tolist() == [1, 1, 2, 1]
    other = dataclasses.replace(found, absmax=np.array([16, 0, 0, 0], np.float32))
    assert smoothing_scales([found, other], 0.5).tolist() == [4, 1, 2, 1]
    assert smoothing_scales([found], 1.0).tolist() == [1, 1, 4, 1]


def test_numeric_checks_hold_and_shards_compute_the_same(tmp_path):
    model, numeric = read_model(text()), NumericCheck()
    original = model.clone()
    calibrated(tmp_path / "calib", model)
    run_passes(model, [Smooth(from_=str(tmp_path / "calib"))], instruments=[numeric])
    assert numeric.summaries[0].sites
    assert not numeric.summaries[0].unchecked
    for degree in (2, 3, 4):
        ranks = model.clone()
        run_passes(ranks, resolve(f"tp{{degree={degree},pad=true}}").passes)
        compare_numbers(original, join_ranks(rank_models(ranks)), 1e-5, {}, {})


def test_rotated_models_are_smoothed_by_their_own_statistics(tmp_path):
    model = read_model(text())
    original = model.clone()
    calibrated(tmp_path / "plain", model)
    RotateResidual().run(model)
    with pytest.raises(PassError, match=r"knows nothing of rotate\(scale\(.* with the passes that stand before smooth"):
        Smooth(from_=str(tmp_path / "plain")).run(model)
    calibrated(tmp_path / "calib", model)
    assert Smooth(from_=str(tmp_path / "calib")).run(model).matches == 2
    compare_numbers(original, model, 1e-5, {}, {})


def test_without_statistics_it_says_what_to_run(tmp_path):
    model = read_model(text())
    with pytest.raises(PassError, match="needs what linears read. Measure it: passopt calibrate MODEL"):
        Smooth().run(model)
    with pytest.raises(PassError, match="holds no calibration. Make one: passopt calibrate"):
        Smooth(from_=str(tmp_path / "none")).run(model)
    calibrated(tmp_path / "old", model, with_weights=False)
    with pytest.raises(PassError, match="lacks the magnitudes of weights. Calibrate again"):
        Smooth(from_=str(tmp_path / "old")).run(model)
    assert not any("smoothed" in name for name in model.graph.initializers)


def test_statistics_of_another_model_are_refused(tmp_path):
    model = read_model(text())
    calibrated(tmp_path / "calib", model)
    path = tmp_path / "calib" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for entry in manifest["weights"].values():
        entry["fingerprint"] = "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(PassError, match="was made of another model: its weight 'gate' has other numbers"):
        Smooth(from_=str(tmp_path / "calib")).run(model)


def test_wrong_options_are_named(tmp_path):
    model = read_model(text())
    calibrated(tmp_path / "calib", model)
    folder = str(tmp_path / "calib")
    with pytest.raises(UsageError, match="alpha is 1.5, expected a number from 0 to 1"):
        Smooth(alpha=1.5, from_=folder).run(model)
    Smooth(targets="norm", from_=folder).run(model)
    with pytest.raises(UsageError, match="norm is smoothed already with alpha 0.5, asked for 0.7"):
        Smooth(alpha=0.7, from_=folder).run(model)
    assert Smooth(alpha=0.7, targets="down", from_=folder).run(model).matches == 1
    assert not Smooth(targets="norm").run(model).modified


def test_shards_and_models_without_sites_are_refused(tmp_path):
    model = read_model(text())
    calibrated(tmp_path / "calib", model)
    run_passes(model, resolve("tp{pad=true}").passes)
    with pytest.raises(PassError, match="the model is sharded; smooth before tp"):
        Smooth(from_=str(tmp_path / "calib")).run(model)
    parts = {"norm": "x0 = Gather(embed, ids) n0 = Relu(x0)", "gated": "h = Add(g, u)"}
    with pytest.raises(PassError, match="found nothing to smooth"):
        Smooth(from_=str(tmp_path / "calib")).run(read_model(text(**parts)))
