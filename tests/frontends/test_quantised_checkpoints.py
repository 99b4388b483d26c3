"""Checkpoints quantised elsewhere: real formats are read exactly, and what cannot be is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from safetensors.numpy import save_file

from passopt.api.export import export
from passopt.api.run import run
from passopt.frontends.checkpoint import Checkpoint, open_checkpoint
from passopt.frontends.quantised.scheme import rounded_scales
from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.evaluator import Evaluator
from passopt.testing.families import make_family_checkpoint
from passopt.testing.quantised_checkpoints import quantise_checkpoint, words_of

RNG = np.random.default_rng(18)
CODES = RNG.integers(-128, 128, (12, 8)).astype(np.int8)
SCALES = RNG.uniform(1e-3, 1e-2, 12).astype(np.float16)
NORM = RNG.uniform(0.5, 1.5, 8).astype(np.float16)
BF16 = ml_dtypes.bfloat16

CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
GROUP = {"targets": ["Linear"], "weights": CHANNELS, "input_activations": None}
INT_QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True, "desc_act": True}


def written(folder: Path, settings: Any, tensors: Mapping[str, Any], name: str = "model.safetensors") -> Path:
    """Write a checkpoint of one linear, `m`, and a norm."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama"} | ({} if settings is None else {"quantization_config": settings})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"norm.weight": NORM, **{f"m.{part}": value for part, value in tensors.items()}}, folder / name)
    return folder


def gptq_tensors(stored: int = 127, **changed: Any) -> dict[str, Any]:
    """Return the tensors of the linear, with another zero point as it is stored, or other tensors; None leaves out."""
    tensors = {
        "qweight": np.ascontiguousarray(words_of(CODES).T),
        "qzeros": words_of(np.full((1, 12), stored - 128, np.int8)),
        "scales": SCALES[None],
        "g_idx": np.zeros(8, np.int32),
        **changed,
    }
    return {name: value for name, value in tensors.items() if value is not None}


def packed_tensors(**changed: Any) -> dict[str, Any]:
    tensors = {
        "weight_packed": words_of(CODES),
        "weight_scale": SCALES[:, None],
        "weight_shape": np.array([12, 8]),
        **changed,
    }
    return {name: value for name, value in tensors.items() if value is not None}


def weight_of(checkpoint: Checkpoint) -> Any:
    weight = checkpoint.tensors["m.weight"]
    assert isinstance(weight, Dequantized)
    with Evaluator() as evaluator:
        np.testing.assert_array_equal(evaluator.array(weight.codes), CODES)
        return evaluator.array(weight)


EXPECTED = CODES.astype(np.float16) * SCALES[:, None]


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        (INT_QUANTIZED, {"weight": CODES, "weight_scale": SCALES[:, None]}),
        (INT_QUANTIZED | {"format": "naive-quantized"}, {"weight": CODES, "weight_scale": SCALES}),
        (INT_QUANTIZED, {"weight": CODES, "weight_scale": SCALES, "weight_zero_point": np.zeros((12, 1), np.int8)}),
        (INT_QUANTIZED | {"format": "pack-quantized"}, packed_tensors()),
        (INT_QUANTIZED | {"format": "pack-quantized"}, packed_tensors(weight_shape=None)),
        (GPTQ, gptq_tensors()),
        (GPTQ | {"checkpoint_format": "gptq"}, gptq_tensors(g_idx=None)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq_tensors(128)),
    ],
)
def test_codes_and_scales_are_those_of_the_file(tmp_path: Path, settings: Any, tensors: Any) -> None:
    checkpoint = open_checkpoint(written(tmp_path / "c", settings, tensors))
    np.testing.assert_array_equal(weight_of(checkpoint), EXPECTED)
    assert set(checkpoint.tensors) == {"norm.weight", "m.weight"}
    assert "quantization_config" not in checkpoint.config


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: Any) -> None:
    scales = SCALES.astype(dtype)
    checkpoint = open_checkpoint(written(tmp_path / "c", GPTQ, gptq_tensors(scales=scales[None])))
    weight = weight_of(checkpoint)
    assert weight.dtype == dtype
    wide = CODES.astype(np.float32) * scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(weight, wide.astype(dtype))


NIBBLES = RNG.integers(-8, 8, (16, 64)).astype(np.int8)
COUNTED = RNG.uniform(1e-3, 1e-2, (16, 2)).astype(np.float16)
GROUPS_OF_4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED_4 = INT_QUANTIZED | {"format": "pack-quantized", "config_groups": {"g": GROUP | {"weights": GROUPS_OF_4}}}


def four_bits(stored: int = 7, **changed: Any) -> dict[str, Any]:
    """Return the tensors of a linear of GPTQ in two groups of 32 inputs."""
    tensors = {
        "qweight": np.ascontiguousarray(words_of(NIBBLES, 4).T),
        "qzeros": words_of(np.full((2, 16), stored - 8, np.int8), 4),
        "scales": np.ascontiguousarray(COUNTED.T),
        "g_idx": np.arange(64, dtype=np.int32) // 32,
        **changed,
    }
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        (GPTQ | {"bits": 4, "group_size": 32}, four_bits()),
        (GPTQ | {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, four_bits(8, g_idx=None)),
        (
            PACKED_4,
            {"weight_packed": words_of(NIBBLES, 4), "weight_scale": COUNTED, "weight_shape": np.array([16, 64])},
        ),
        (
            PACKED_4,
            {
                "weight_packed": words_of(NIBBLES, 4),
                "weight_scale": COUNTED,
                "weight_g_idx": np.arange(64, dtype=np.int32) // 32,
            },
        ),
    ],
)
def test_codes_of_four_bits_have_scales_of_groups(tmp_path: Path, settings: Any, tensors: Any) -> None:
    weight = open_checkpoint(written(tmp_path / "c", settings, tensors)).tensors["m.weight"]
    assert isinstance(weight, Dequantized)
    assert weight.group == 32
    expected = NIBBLES.astype(np.float16) * np.repeat(COUNTED, 32, axis=1)
    with Evaluator() as evaluator:
        np.testing.assert_array_equal(evaluator.array(weight.codes), NIBBLES)
        np.testing.assert_array_equal(evaluator.array(weight), expected)
        np.testing.assert_array_equal(evaluator.read(weight, ((3, 9), (20, 45))), expected[3:9, 20:45])


@pytest.mark.parametrize(
    ("settings", "tensors", "says"),
    [
        (
            GPTQ | {"bits": 4},
            four_bits(g_idx=np.arange(64, dtype=np.int32) % 2),
            r"'m\.g_idx' gives inputs that are not neighbours to one group.*static_groups=true",
        ),
        (GPTQ | {"bits": 4}, four_bits(8), "zero points from 9 to 9, and symmetric codes have 8"),
        (
            GPTQ | {"bits": 4},
            four_bits(scales=np.repeat(COUNTED.T, 2, 0), g_idx=None),
            "'m.scales' has 4 groups of 64 inputs",
        ),
        (PACKED_4, {"weight_packed": words_of(NIBBLES, 4), "weight_scale": COUNTED.repeat(3, 1)}, "has 6 groups of 64"),
    ],
)
def test_groups_that_cannot_be_kept_are_refused(tmp_path: Path, settings: Any, tensors: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        open_checkpoint(written(tmp_path / "c", settings, tensors))


def test_rows_that_do_not_fill_words_are_cut(tmp_path: Path) -> None:
    codes = CODES[:, :6]
    words = words_of(np.pad(codes, ((0, 0), (0, 2)), constant_values=77))
    tensors = packed_tensors(weight_packed=words, weight_shape=np.array([12, 6]))
    weight = open_checkpoint(written(tmp_path / "c", INT_QUANTIZED | {"format": "pack-quantized"}, tensors)).tensors
    with Evaluator() as evaluator:
        np.testing.assert_array_equal(evaluator.array(weight["m.weight"]), EXPECTED[:, :6])


def test_one_scale_of_a_whole_weight_is_that_of_each_channel(tmp_path: Path) -> None:
    tensors = {"weight": CODES, "weight_scale": SCALES[:1]}
    settings = INT_QUANTIZED | {"config_groups": {"g": GROUP | {"weights": CHANNELS | {"strategy": "tensor"}}}}
    weight = weight_of(open_checkpoint(written(tmp_path / "c", settings, tensors)))
    np.testing.assert_array_equal(weight, CODES.astype(np.float16) * SCALES[0])


def test_settings_and_weights_of_older_gptq_files_are_found(tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json, and called the file after its settings."""
    folder = written(tmp_path / "c", None, gptq_tensors(), "gptq_model-8bit--1g.safetensors")
    (folder / "quantize_config.json").write_text('{"bits": 8, "group_size": -1, "desc_act": false, "sym": true}')
    np.testing.assert_array_equal(weight_of(open_checkpoint(folder)), EXPECTED)


def group(**changed: Any) -> dict[str, Any]:
    return INT_QUANTIZED | {"config_groups": {"group_0": GROUP | changed}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (INT_QUANTIZED | {"format": "float-quantized"}, 'the format "float-quantized", and not one of int-quantized'),
        (INT_QUANTIZED | {"format": "marlin-24"}, 'the format "marlin-24"'),
        (INT_QUANTIZED | {"quantization_status": "frozen"}, 'quantization_status "frozen"'),
        (INT_QUANTIZED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (INT_QUANTIZED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (INT_QUANTIZED | {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        (INT_QUANTIZED | {"config_groups": {}}, "no config_groups"),
        (group(weights=CHANNELS | {"num_bits": 3}), r"weights of 3 bits .*\(in group_0\)"),
        (group(weights=CHANNELS | {"type": "float"}), 'of the type "float"'),
        (group(weights=CHANNELS | {"symmetric": False}), "weights with zero points"),
        (group(weights=CHANNELS | {"strategy": "block"}), "a scale per block, and not per output channel"),
        (group(output_activations={"num_bits": 8}), "quantised output_activations"),
        (group(input_activations={"num_bits": 8, "dynamic": False}), "static input_activations"),
        (GPTQ | {"bits": 3}, "gptq, 3 bits, which cannot be kept exactly: codes of 3 bits, and not of 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, 'the checkpoint_format "marlin"'),
        ({"quant_method": "awq", "bits": 8}, "says awq, 8 bits. Export takes compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "says bitsandbytes, 8 bits. Export takes"),
        ({"quant_method": "fp8"}, "says fp8. Export takes"),
    ],
)
def test_settings_that_cannot_be_taken_exactly_are_refused(tmp_path: Path, settings: Any, says: str) -> None:
    with pytest.raises(ModelError, match=f"{says}.* take the checkpoint from which it was made, and quantise"):
        open_checkpoint(written(tmp_path / "c", settings, {}))


@pytest.mark.parametrize(
    ("settings", "tensors", "says"),
    [
        (INT_QUANTIZED, {"weight": CODES}, "codes 'm.weight' and no m.weight_scale"),
        (INT_QUANTIZED, packed_tensors(weight_scale=None), "codes 'm.weight_packed' and no m.weight_scale"),
        (INT_QUANTIZED, {"weight_scale": SCALES}, "m.weight_scale, and neither weight nor weight_packed"),
        (INT_QUANTIZED, {"weight": EXPECTED, "weight_scale": SCALES}, r"'m.weight' is FLOAT16\[12, 8\], expected a ma"),
        (INT_QUANTIZED, {"weight": CODES, "weight_scale": SCALES[:5]}, r"FLOAT16\[5\], expected .* \[12, 1\] or \[12"),
        (
            INT_QUANTIZED,
            {"weight": CODES, "weight_scale": SCALES, "weight_zero_point": np.eye(12, 1, dtype=np.int8)},
            "'m.weight_zero_point' has zero points that are not 0",
        ),
        (INT_QUANTIZED, packed_tensors(weight_shape=np.array([12, 3])), r"holds \[12, 8\] codes, .* are \[12, 3\]"),
        (INT_QUANTIZED, packed_tensors(weight_packed=CODES), "'m.weight_packed' is INT8"),
        (INT_QUANTIZED, {}, "says compressed-tensors, and no weight is quantised. Remove quantization_config"),
        (GPTQ, gptq_tensors(qzeros=None), "holds 'm.qweight' and no m.qzeros"),
        (GPTQ, gptq_tensors(scales=SCALES[None, :5]), r"'m.scales' is FLOAT16\[1, 5\], expected .*\[1, 12\]"),
        (
            GPTQ,
            gptq_tensors(scales=np.repeat(SCALES[None], 2, 0)),
            "'m.scales' has 2 groups of 8 inputs. Export takes codes of 4 bits in groups of 32, 64",
        ),
        (GPTQ, gptq_tensors(g_idx=np.arange(8, dtype=np.int32)), "'m.g_idx' names groups 0 to 7, there are 1"),
        (GPTQ, gptq_tensors(g_idx=np.zeros(5, np.int32)), r"'m.g_idx' is INT32\[5\], expected .*\[8\]"),
        (GPTQ, gptq_tensors(qzeros=np.zeros((1, 2), np.int32)), r"'m.qzeros' is INT32\[1, 2\], expected .*\[1, 3\]"),
        (GPTQ, gptq_tensors(128), "zero points from 129 to 129, .* have 128 .*is checkpoint_format wrong"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq_tensors(127), "zero points from 127 to 127, .* have 128. "),
        (
            GPTQ,
            gptq_tensors(qzeros=words_of(np.arange(12, dtype=np.int8)[None])),
            r"zero points from 129 to 140.*symmetrically \(sym=true\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, settings: Any, tensors: Any, says: str) -> None:
    folder = written(tmp_path / "c", settings, tensors)
    with pytest.raises(ModelError, match=says) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_scales_that_a_dtype_does_not_hold_are_counted_or_refused(tmp_path: Path) -> None:
    scales = np.array([*np.linspace(1e-3, 2e-3, 11), 2e-7], np.float32).astype(BF16)
    found = open_checkpoint(written(tmp_path / "c", GPTQ, gptq_tensors(scales=scales[None])))
    where = found.directory
    assert rounded_scales(found.tensors, onnx_ir.DataType.FLOAT, where) == (0, 12)
    with pytest.raises(ModelError, match=r"FLOAT16 does not hold the scale 2e-07 of 'm\.weight'.* `dtype=fp32`"):
        rounded_scales(found.tensors, onnx_ir.DataType.FLOAT16, where)
    fine = open_checkpoint(written(tmp_path / "d", GPTQ, gptq_tensors(scales=np.float32([np.linspace(1, 2, 12)]))))
    rounded, total = rounded_scales(fine.tensors, onnx_ir.DataType.BFLOAT16, where)
    assert (0 < rounded < 12, total) == (True, 12)
    bad = open_checkpoint(written(tmp_path / "e", GPTQ, gptq_tensors(scales=np.full((1, 12), np.nan, np.float16))))
    with pytest.raises(ModelError, match=r"the scales of 'm\.weight' hold NaN"):
        rounded_scales(bad.tensors, onnx_ir.DataType.FLOAT, where)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_family_checkpoint(tmp_path_factory.mktemp("llama") / "checkpoint", "llama")


def initializer(model: onnx_ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.slow
def test_an_export_keeps_the_codes(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = quantise_checkpoint(llama, tmp_path / "gptq", "gptq")
    extra = {"model.layers.0.mlp.up_proj.bias": np.zeros(76, np.float16)}  # As AutoGPTQ writes for every linear.
    from safetensors.numpy import load_file

    save_file(load_file(tmp_path / "gptq/model.safetensors") | extra, tmp_path / "gptq/model.safetensors")
    result = export(tmp_path / "gptq", tmp_path / "q", self_check=False)
    assert result.codes == len(codes) == 14
    model = load_model(tmp_path / "q")
    for name, (expected, scales) in codes.items():
        np.testing.assert_array_equal(initializer(model, f"{name}.codes"), expected)
        np.testing.assert_array_equal(initializer(model, f"{name}.scales"), scales)
    assert min(expected.min() for expected, _ in codes.values()) == -128

    dequantised = export(tmp_path / "gptq", tmp_path / "ref", self_check=False, weights="reference", dequantize=True)
    assert not dequantised.codes
    run(tmp_path / "ref", "fuse,tp{degree=2,pad=true},int8", tmp_path / "one")
    run(tmp_path / "q", "fuse,tp{degree=2,pad=true}", tmp_path / "other")
    one, other = (load_model(tmp_path / name / "rank1") for name in ("one", "other"))
    for name in codes:
        for part in ("codes", "scales"):
            np.testing.assert_array_equal(initializer(one, f"{name}.{part}"), initializer(other, f"{name}.{part}"))


def test_biases_that_are_not_zero_are_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from passopt.frontends.export import export_graph
    from passopt.frontends.options import ExportOptions

    quantise_checkpoint(llama, tmp_path / "gptq", "gptq")
    extra = {"model.layers.0.mlp.up_proj.bias": np.eye(1, 76, 75, dtype=np.float16)[0]}
    save_file(load_file(tmp_path / "gptq/model.safetensors") | extra, tmp_path / "gptq/model.safetensors")
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.0\.mlp\.up_proj\.bias"):
        export_graph(open_checkpoint(tmp_path / "gptq"), ExportOptions(), tmp_path)


def test_a_tied_head_with_codes_of_its_own_is_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from passopt.frontends.export import export_graph
    from passopt.frontends.options import ExportOptions

    folder = tmp_path / "int8"
    quantise_checkpoint(llama, folder, "int-quantized")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight").astype(np.float32)
    scales = np.abs(head).max(axis=1, keepdims=True) / 127
    codes = np.rint(head / scales).astype(np.int8)
    save_file(tensors | {"lm_head.weight": codes, "lm_head.weight_scale": scales}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="differ, though config.json ties them; set tie_word_embeddings to false"):
        export_graph(open_checkpoint(folder), ExportOptions(), tmp_path)
