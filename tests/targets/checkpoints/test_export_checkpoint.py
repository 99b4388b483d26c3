"""export-checkpoint: codes of a calibration or of a graph become checkpoints that are read back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from passopt.api.export_checkpoint import export_checkpoint
from passopt.api.model import load, save
from passopt.cli.main import main
from passopt.frontends.checkpoint import open_checkpoint
from passopt.ir.calibration.entries import CodesEntry, WeightEntry
from passopt.ir.calibration.keys import fingerprint, weight_key
from passopt.ir.calibration.writer import CalibrationWriter
from passopt.ir.errors import UsageError
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.sources import safetensors_sources
from passopt.passes.attention.split_packed_qkv import SplitPackedQkv
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import read_model
from passopt.testing.quantised_checkpoints import quantise_checkpoint, words_of

RNG = np.random.default_rng(18)
PACKED, DOWN, ROUTER = "model.layers.0.W_pack", "model.layers.1.down", "model.layers.1.router"
TENSORS = {
    f"{PACKED}.weight": RNG.normal(size=(12, 8)).astype(np.float32),
    f"{DOWN}.weight": RNG.normal(size=(8, 4)).astype(np.float32),
    f"{ROUTER}.weight": RNG.normal(size=(3, 8)).astype(np.float32),
    "model.norm.weight": RNG.uniform(0.5, 1.5, 8).astype(np.float32),
    "model.embed_tokens.weight": RNG.normal(size=(5, 8)).astype(np.float32),
    "lm_head.weight": RNG.normal(size=(5, 8)).astype(np.float32),
}
FORMATS = ["int-quantized", "pack-quantized", "gptq"]


def rounded(weight: Any) -> tuple[Any, Any]:
    scales = (np.abs(weight).max(axis=1) / 127).astype(np.float16)
    return np.rint(weight / scales[:, None].astype(np.float32)).astype(np.int8), scales


CODES = {name: rounded(TENSORS[f"{name}.weight"]) for name in (PACKED, DOWN)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float32", "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_x.py").write_text("# code")
    (folder / "model.safetensors.index.json").write_text("not copied")
    return folder


def calibration(folder: Path, weights: dict[str, tuple[Expression, Any, Any]], **kind: int) -> Path:
    """A calibration folder with codes and scales of weights."""
    folder.mkdir()
    writer = CalibrationWriter(folder, "key")
    tensors, entries = {}, {}
    for name, (weight, codes, scales) in weights.items():
        tensors |= {f"{name}.codes": codes, f"{name}.scales": scales}
        made = (CodesEntry(f"{name}.codes", f"{name}.scales", 0, **kind),)  # type: ignore[arg-type]
        entries[weight_key(weight)] = WeightEntry(name, "all.safetensors", fingerprint(weight), codes=made)
    writer.add("all", tensors, entries)
    writer.finish({}, {})
    return folder


@pytest.fixture
def calib(tmp_path: Path, checkpoint: Path) -> Path:
    """Codes of the packed weight in two slices, and of another one as it is."""
    found = safetensors_sources(checkpoint / "model.safetensors")
    packed, (codes, scales) = found[f"{PACKED}.weight"], CODES[PACKED]
    return calibration(
        tmp_path / "calib",
        {
            "kv": (packed.slice(0, 4, 12), codes[4:], scales[4:]),
            "q": (packed.slice(0, 0, 4), codes[:4], scales[:4]),
            "down": (found[f"{DOWN}.weight"].transpose(), *CODES[DOWN]),
        },
    )


def read_back(folder: Path) -> dict[str, tuple[Any, Any]]:
    with Evaluator() as evaluator:
        return {
            name.removesuffix(".weight"): (evaluator.array(weight.codes), evaluator.array(weight.scales))
            for name, weight in open_checkpoint(folder).tensors.items()
            if isinstance(weight, Dequantized)
        }


@pytest.mark.parametrize("form", FORMATS)
def test_codes_of_a_calibration_are_read_back(tmp_path: Path, checkpoint: Path, calib: Path, form: Any) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "out", codes=calib, format=form)
    found = read_back(tmp_path / "out")
    assert found.keys() == CODES.keys()
    for name, (codes, scales) in CODES.items():
        np.testing.assert_array_equal(found[name][0], codes)
        np.testing.assert_array_equal(found[name][1], scales)
    assert (result.quantised, result.left_out, result.dtype) == (2, ("lm_head", ROUTER), "fp16")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", f"{ROUTER}.weight"):
        np.testing.assert_array_equal(tensors[name], TENSORS[name].astype(np.float16))
    assert not any("padding" in name for name in tensors)
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_files_are_those_that_loaders_expect(tmp_path: Path, checkpoint: Path, calib: Path) -> None:
    """The layouts are written down here once more: [out, in] bytes; words of four inputs, transposed; 127 for 128."""
    codes, scales = CODES[DOWN]
    for form in FORMATS:
        export_checkpoint(checkpoint, tmp_path / form, codes=calib, format=form)
    plain, packed, gptq = (load_file(tmp_path / form / "model.safetensors") for form in FORMATS)
    np.testing.assert_array_equal(plain[f"{DOWN}.weight"], codes)
    np.testing.assert_array_equal(plain[f"{DOWN}.weight_scale"], scales[:, None])
    np.testing.assert_array_equal(packed[f"{DOWN}.weight_packed"], words_of(codes))
    assert packed[f"{DOWN}.weight_shape"].tolist() == [8, 4]
    np.testing.assert_array_equal(gptq[f"{DOWN}.qweight"], words_of(codes).T)
    np.testing.assert_array_equal(gptq[f"{DOWN}.qzeros"].view(np.uint8), np.full((1, 8), 127))
    np.testing.assert_array_equal(gptq[f"{DOWN}.scales"], scales[None])
    assert gptq[f"{DOWN}.g_idx"].tolist() == [0] * 4
    config = json.loads((tmp_path / "int-quantized/config.json").read_text())
    assert (config["torch_dtype"], config["hidden_size"], "dtype" in config) == ("float16", 8, False)
    settings = config["quantization_config"]
    assert (settings["format"], settings["ignore"]) == ("int-quantized", ["lm_head", ROUTER])
    settings = json.loads((tmp_path / "gptq/quantize_config.json").read_text())
    assert settings == json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert list(settings["dynamic"]) == [r"-:^model\.layers\.1\.router$"]
    names = {path.name for path in (tmp_path / "gptq").iterdir()}
    assert names == {"config.json", "quantize_config.json", "model.safetensors", "tokenizer.json", "modeling_x.py"}


@pytest.mark.parametrize("form", FORMATS)
def test_the_format_of_a_quantised_checkpoint_is_changed(tmp_path: Path, checkpoint: Path, form: Any) -> None:
    save_file({k: v for k, v in TENSORS.items() if k != f"{ROUTER}.weight"}, checkpoint / "model.safetensors")
    expected = quantise_checkpoint(checkpoint, tmp_path / "theirs", form)
    (tmp_path / "theirs/model.safetensors.index.json").unlink(missing_ok=True)
    for other in FORMATS:
        export_checkpoint(tmp_path / "theirs", tmp_path / f"{other}", format=other)  # type: ignore[arg-type]
        for name, (codes, scales) in read_back(tmp_path / f"{other}").items():
            np.testing.assert_array_equal(codes, expected[f"{name}.weight"][0])
            np.testing.assert_array_equal(scales, expected[f"{name}.weight"][1])


GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,8] x, float[batch,4] z) => (float[batch,4] q, float[batch,2] k, float[batch,6] v, float[batch,8] y)
<float[12,8] W = random, float[8,4] D = random, int64[3] sizes = {4, 2, 6}> {
    t = Transpose<perm=[1,0]>(W)
    p = MatMul(x, t)
    q, k, v = Split<axis=-1>(p, sizes)
    u = Transpose<perm=[1,0]>(D)
    y = MatMul(z, u)
}"""


@pytest.mark.parametrize("is_split", [False, True])
def test_codes_of_a_graph_are_those_of_the_checkpoint(tmp_path: Path, checkpoint: Path, is_split: bool) -> None:
    """A pass that splits the packed weight leaves codes of its parts."""
    model = read_model(GRAPH)
    found = safetensors_sources(checkpoint / "model.safetensors")
    for short, name in (("W", PACKED), ("D", DOWN)):
        value = model.graph.initializers[short]
        value.const_value = LazyWeight(found[f"{name}.weight"], f"{name}.weight")
        value.name = f"{name}.weight"
    if is_split:
        SplitPackedQkv().run(model)
    QuantizeWeights().run(model)
    save(model, tmp_path / "int8")
    assert (f"{PACKED}.weight.k.codes" in load(tmp_path / "int8").ir.graph.initializers) == is_split
    result = export_checkpoint(checkpoint, tmp_path / "out", codes=tmp_path / "int8")
    assert (result.quantised, result.dtype) == (2, "fp32")
    for name, (codes, scales) in read_back(tmp_path / "out").items():
        weight = TENSORS[f"{name}.weight"]
        np.testing.assert_array_equal(scales, np.abs(weight).max(axis=1) / np.float32(127))
        assert np.abs(codes * scales[:, None] - weight).max() <= 0.51 * scales.max()


@pytest.mark.parametrize("form", ["pack-quantized", "gptq"])
def test_codes_of_four_bits_are_read_back(tmp_path: Path, checkpoint: Path, form: Any) -> None:
    weight = RNG.normal(size=(16, 64)).astype(np.float32)
    save_file({f"{DOWN}.weight": weight, "model.norm.weight": np.ones(4, np.float32)}, checkpoint / "model.safetensors")
    codes, scales = quantise_checkpoint(checkpoint, tmp_path / "theirs", form, group=32)[f"{DOWN}.weight"]
    source = safetensors_sources(checkpoint / "model.safetensors")[f"{DOWN}.weight"]
    calib = calibration(tmp_path / "calib", {"d": (source, codes, scales)}, bits=4, group=32)
    result = export_checkpoint(checkpoint, tmp_path / "out", codes=calib, format=form)
    assert str(result).startswith(f"1 weights of 4 bits, {form}, other tensors fp16")
    found = read_back(tmp_path / "out")[DOWN]
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], scales)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
    with pytest.raises(UsageError, match="int-quantized has a scale per channel; take `format=pack-quantized`"):
        export_checkpoint(checkpoint, tmp_path / "no", codes=calib)


def test_rounded_scales_are_counted_and_lost_ones_refused(tmp_path: Path, checkpoint: Path) -> None:
    found = safetensors_sources(checkpoint / "model.safetensors")[f"{DOWN}.weight"]
    codes, scales = CODES[DOWN]
    fine = calibration(tmp_path / "fine", {"d": (found, codes, scales.astype(np.float32) * np.float32(1.0001))})
    result = export_checkpoint(checkpoint, tmp_path / "out", codes=fine, format="gptq")
    assert "8 scales are rounded to fp16" in str(result)
    assert export_checkpoint(checkpoint, tmp_path / "wide", codes=fine, format="gptq", dtype="fp32").rounded == 0
    small = dict(TENSORS) | {f"{DOWN}.weight": TENSORS[f"{DOWN}.weight"] * np.float32(1e-5)}
    save_file(small, checkpoint / "model.safetensors")
    tiny = calibration(tmp_path / "tiny", {"d": (found, codes, scales.astype(np.float32) * np.float32(1e-5))})
    with pytest.raises(UsageError, match=rf"FLOAT16 does not hold the scales of {DOWN}.*`dtype=fp32`"):
        export_checkpoint(checkpoint, tmp_path / "no", codes=tiny, format="gptq")


def test_what_does_not_fit_is_refused(tmp_path: Path, checkpoint: Path, calib: Path) -> None:
    found = safetensors_sources(checkpoint / "model.safetensors")
    down, packed = found[f"{DOWN}.weight"], found[f"{PACKED}.weight"]
    codes, scales = CODES[DOWN]
    cases: list[tuple[dict[str, tuple[Expression, Any, Any]], str]] = [
        ({"d": (down, codes[::-1].copy(), scales)}, rf"the codes of {DOWN}\.weight are \d+\.\d% off the weight"),
        ({"q": (packed.slice(0, 0, 4), CODES[PACKED][0][:4], CODES[PACKED][1][:4])}, r"codes \[4, 8\] of .*\[12, 8\]"),
        ({"d": (packed.slice(1, 0, 4), codes, scales)}, "no weight .out, in. of a checkpoint, nor rows of one"),
        ({"d": (packed.normalize_rows(1e-6), *CODES[PACKED])}, "Calibrate the exported model without passes"),
        ({"e": (found["model.embed_tokens.weight"], codes[:5], scales[:5])}, "holds no codes of linears"),
    ]
    for index, (weights, says) in enumerate(cases):
        folder = calibration(tmp_path / f"calib-{index}", weights)
        with pytest.raises(UsageError, match=says):
            export_checkpoint(checkpoint, tmp_path / "no", codes=folder)
    with pytest.raises(UsageError, match="holds floats. Name the codes: `codes=CALIB`"):
        export_checkpoint(checkpoint, tmp_path / "no")
    with pytest.raises(UsageError, match="gptq has no quantised activations; take `format=int-quantized`"):
        export_checkpoint(checkpoint, tmp_path / "no", codes=calib, format="gptq", activations="dynamic")
    with pytest.raises(UsageError, match="output exists"):
        export_checkpoint(checkpoint, calib, codes=calib)
    export_checkpoint(checkpoint, tmp_path / "out", codes=calib)
    with pytest.raises(UsageError, match="is quantised itself; leave out `codes`"):
        export_checkpoint(tmp_path / "out", tmp_path / "no", codes=calib)
    odd = dict(TENSORS) | {f"{DOWN}.weight": TENSORS[f"{DOWN}.weight"][:6]}
    save_file(odd, checkpoint / "model.safetensors")
    six = safetensors_sources(checkpoint / "model.safetensors")[f"{DOWN}.weight"]
    folder = calibration(tmp_path / "six", {"d": (six, codes[:6], scales[:6])})
    with pytest.raises(UsageError, match="4 inputs and 6 outputs, and GPTQ holds multiples of 4 only"):
        export_checkpoint(checkpoint, tmp_path / "no", codes=folder, format="gptq")
    assert not (tmp_path / "no").exists()


def test_codes_of_another_checkpoint_are_named(tmp_path: Path, checkpoint: Path, calib: Path) -> None:
    save_file({"model.norm.weight": TENSORS["model.norm.weight"]}, checkpoint / "model.safetensors")
    with pytest.raises(UsageError, match=rf"codes of {PACKED}\.weight, {DOWN}\.weight, which .* does not have"):
        export_checkpoint(checkpoint, tmp_path / "no", codes=calib)


def test_the_command_says_what_it_wrote(
    tmp_path: Path, checkpoint: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-checkpoint", str(checkpoint), "-o"]
    assert main([*command, str(tmp_path / "out"), "--codes", str(calib), "--activations", "dynamic"]) == 0
    first, left, last = capsys.readouterr().out.splitlines()
    assert first.startswith("2 weights of 8 bits, int-quantized, other tensors fp16, ")
    assert left == f"not quantised: lm_head, {ROUTER}"
    assert last == f"→ {tmp_path / 'out'}"
    assert open_checkpoint(tmp_path / "out").scheme.quantises_activations  # type: ignore[union-attr]
    assert main([*command, str(tmp_path / "no")]) == 2
    assert "Name the codes: --codes" in capsys.readouterr().err
