"""Opening checkpoints: both formats, whole and in shards, and what is said about damaged ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from passopt.frontends.checkpoint import open_checkpoint
from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.testing.checkpoints import ODD, make_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", ODD, trained=False, shards=3)


def bytes_by_name(directory: Path) -> dict[str, bytes]:
    with Evaluator() as evaluator:
        return {name: evaluator.array(source).tobytes() for name, source in open_checkpoint(directory).tensors.items()}


def test_formats_and_shards_hold_the_same_bytes(tmp_path: Path, sharded: Path) -> None:
    expected = bytes_by_name(make_checkpoint(tmp_path / "whole", ODD, trained=False))
    assert expected.keys() == ODD.shapes().keys()
    assert bytes_by_name(sharded) == expected
    assert bytes_by_name(make_checkpoint(tmp_path / "bin", ODD, trained=False, format="bin")) == expected
    assert bytes_by_name(make_checkpoint(tmp_path / "bins", ODD, trained=False, format="bin", shards=2)) == expected


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "both", ODD, trained=False)
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(directory).config["num_attention_heads"] == ODD.heads


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "blobs", ODD, trained=False)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in whole.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert bytes_by_name(snapshot) == bytes_by_name(whole)


def test_relative_directories_become_absolute(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    assert open_checkpoint(Path(sharded.name)).directory == sharded


def test_opening_needs_no_torch() -> None:
    code = "import sys, passopt.frontends.checkpoint; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such checkpoint directory"):
        open_checkpoint(tmp_path / "absent")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


def test_config_that_is_not_json(sharded: Path) -> None:
    (sharded / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        open_checkpoint(sharded)


def test_config_without_weights_names_what_was_looked_for(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "empty", ODD, weights=False)
    with pytest.raises(ModelError, match=r"looked for model\.safetensors, .*, pytorch_model\.bin\.index\.json"):
        open_checkpoint(directory)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"00002-of-00003.*shard is missing"):
        open_checkpoint(sharded)


def test_tensor_that_its_shard_does_not_hold(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lm_head\.weight not in the shard"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', "{}", '{"weight_map": []}'])
def test_index_without_a_weight_map(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ModelError, match='no "weight_map"'):
        open_checkpoint(sharded)


def test_index_that_leaves_the_directory(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="refused"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    directory = make_checkpoint(tmp_path / "pointers", ODD, weights=False)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        open_checkpoint(directory)


class Foreign:
    """What a hostile pickle does: name a function to be called while it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pickle-ran",)


def test_pickle_with_foreign_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    directory = make_checkpoint(tmp_path / "hostile", ODD, weights=False)
    torch.save({"lm_head.weight": Foreign()}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="which is not part of a state dict of tensors"):
        open_checkpoint(directory)
    assert not (tmp_path / "pickle-ran").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            "quantization_config of config.json says gptq, 3",
        ),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "says fp8"),
        ({"compression_config": {"quant_method": "sparseml"}}, "compression_config of config.json says sparseml"),
        ({"quantization_config": {"load_in_8bit": False, "quant_method": "gptq", "bits": 2}}, "says gptq, 2 bits"),
        (
            {"quantization_config": {"load_in_8bit": False, "bits": 4}},
            "says bitsandbytes, 4 bits|says no method, 4 bits",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "says awq"),
        ({"quantization_bit": 4}, "quantization_bit of config.json says 4 bits"),
    ],
)
def test_quantised_checkpoints_say_so_before_anything_else(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    directory = make_checkpoint(tmp_path / "c", ODD, weights=False)
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"quantised checkpoint: .*{says}.*take the checkpoint from which"):
        open_checkpoint(directory)


@pytest.mark.parametrize("settings", [None, {}, {"load_in_4bit": False, "load_in_8bit": False}])
def test_settings_that_quantise_nothing_are_no_hindrance(sharded: Path, settings: object) -> None:
    config = json.loads((sharded / "config.json").read_text()) | {"quantization_config": settings}
    (sharded / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(sharded).tensors


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantised_checkpoints_of_older_tools_say_so(sharded: Path, name: str) -> None:
    (sharded / name).write_text('{"w_bit": 4}')
    with pytest.raises(ModelError, match=f"quantised checkpoint: {name} says no method, 4 bits"):
        open_checkpoint(sharded)


def test_an_adapter_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    with pytest.raises(ModelError, match=r"holds a LORA adapter \(adapter_config\.json\) of a/b.*Merge it first"):
        open_checkpoint(tmp_path)


def test_a_merged_checkpoint_may_keep_the_configuration_of_its_adapter(sharded: Path) -> None:
    (sharded / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert open_checkpoint(sharded).tensors
    (sharded / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="Merge it first"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": ["llama"]}, r'model_type is \["llama"\], expected a text'),
        ({"architectures": [1]}, r"architectures is \[1\], expected a list of texts"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is .*, expected a list of texts"),
        ({"auto_map": ["modeling.X"]}, "auto_map is .*, expected an object"),
        ({"auto_map": {"AutoModelForCausalLM": 5}}, "auto_map.AutoModelForCausalLM is 5, expected MODULE.CLASS"),
        ({"auto_map": {"AutoModelForCausalLM": []}}, r"auto_map.AutoModelForCausalLM is \[\], expected MODULE.CLASS"),
        ({"text_config": "none"}, 'text_config is "none", expected an object'),
        ({"attn_config": 5}, "attn_config is 5, expected an object"),
        ({"transformers_version": 5.1}, "transformers_version is 5.1, expected a text"),
        ({"model_max_length": "4096"}, 'model_max_length is "4096", expected a whole number'),
        ({"model_max_length": True}, "model_max_length is true, expected a whole number"),
        ({"quantization_config": []}, r"quantization_config is \[\], expected an object"),
        ({"quantization_config": "gptq"}, 'quantization_config is "gptq", expected an object'),
        ({"compression_config": 1}, "compression_config is 1, expected an object"),
        (
            {"quantization_config": {"load_in_4bit": "no"}},
            'quantization_config: load_in_4bit is "no", expected true or',
        ),
        ({"quantization_config": {"quant_method": 4}}, "quantization_config: quant_method is 4, expected a text"),
        ({"quantization_bit": "4"}, 'quantization_bit is "4", expected a whole number'),
    ],
)
def test_values_of_another_kind_are_named(sharded: Path, settings: dict[str, object], says: str) -> None:
    config = json.loads((sharded / "config.json").read_text()) | settings
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"config\.json: {says}"):
        open_checkpoint(sharded)
