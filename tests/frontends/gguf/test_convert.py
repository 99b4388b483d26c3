"""GGUF files as checkpoints: weights to the bit, configurations, what is exported, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import passopt
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.gguf.architectures import ARCHITECTURES
from passopt.frontends.gguf.configuration import config_of
from passopt.frontends.gguf.convert import check_gguf, write_checkpoint
from passopt.frontends.gguf.reader import GgufFile, open_gguf
from passopt.frontends.options import MODEL_TYPES
from passopt.ir.errors import ModelError, UsageError

Kind = gguf.GGMLQuantizationType
KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q6_K)


def converted(path: Path, folder: Path) -> Checkpoint:
    return write_checkpoint(open_gguf(path), folder, lambda message: None, lambda count: None)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_gguf(open_gguf(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def with_keys(
    tiny: SimpleNamespace, path: Path, change: Callable[[Any], None], architecture: str = "llama"
) -> GgufFile:
    """Return a file whose metadata, or tensors, are changed."""
    tiny.write(path, tiny.build(architecture, num_hidden_layers=1), change=change)
    return open_gguf(path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_those_of_the_file_in_the_order_of_transformers(
    kind: Any, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    expected = tiny.write(tmp_path / "m.gguf", tiny.build("llama"), kind)
    converted(tmp_path / "m.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight.float(), expected[name]), name
    matrix = found["model.layers.0.mlp.up_proj.weight"]
    assert matrix.dtype == {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, own head": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_compute_what_the_model_computed(case: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.build(case.partition(",")[0], **CASES[case])
    load(model, tiny.write(tmp_path / "m.gguf", model, Kind.Q8_0))
    converted(tmp_path / "m.gguf", tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_reads_the_same_model_from_the_file(
    architecture: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    def add_vocabulary(writer: Any) -> None:  # Without one, transformers does not open the file.
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([chr(0x100 + index) for index in range(84)])
        writer.add_token_merges([])
        writer.add_name("tiny")
        writer.add_rope_dimension_count(32)

    tiny.write(tmp_path / "m.gguf", tiny.build(architecture), Kind.Q4_0, change=add_vocabulary)
    converted(tmp_path / "m.gguf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_exports_compute_what_transformers_computes(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.build("llama", attention_bias=True)
    load(model, tiny.write(tmp_path / "m.gguf", model, Kind.Q4_1))
    result = passopt.export(tmp_path / "m.gguf", tmp_path / "out", dtype="fp32", self_check=False)
    ids = torch.randint(1, model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    found = run(result.output, ids.numpy())
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    manifest = json.loads((result.output / "manifest.json").read_text())
    assert manifest["source"]["checkpoint"] == "m.gguf"
    assert [entry["name"] for entry in manifest["source"]["files"]] == ["m.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def load(model: Any, weights: Any) -> None:
    model.load_state_dict(weights, strict=False)
    model.tie_weights()


def run(folder: Path, ids: Any) -> Any:
    """Return the logits of an exported model for a prompt without padding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batch, length = ids.shape
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = np.tile(np.arange(length), (batch, 1))
        elif value.name.startswith("past."):
            feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


def test_every_architecture_is_of_a_kind_that_export_knows() -> None:
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} <= MODEL_TYPES


def test_configuration_says_what_the_metadata_says(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)
        writer.add_pad_token_id(3)

    model = tiny.build("llama", num_hidden_layers=1, head_dim=48, rope_parameters={"rope_theta": 3e4})
    tiny.write(tmp_path / "m.gguf", model, change=change)
    config = converted(tmp_path / "m.gguf", tmp_path / "out").config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "max_position_embeddings": 96,
        "rms_norm_eps": 3e-5,
        "rope_theta": 3e4,
        "rope_scaling": None,
        "vocab_size": 84,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 3,
    }
    assert {name: config[name] for name in expected} == expected
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}


def test_linear_scaling(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    assert config_of(with_keys(tiny, tmp_path / "m.gguf", change))["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 2.5,
    }


def test_yarn_scaling_gives_the_frequencies_of_llama_cpp(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(24)

    config = config_of(with_keys(tiny, tmp_path / "m.gguf", change, "qwen2"))
    found, scale = ROPE_INIT_FUNCTIONS["yarn"](transformers.AutoConfig.for_model(**config), "cpu")

    width, base, length, factor = 32, config["rope_theta"], 24, 4.0
    index = np.arange(width // 2)
    low, high = (width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1))
    low, high = max(0, np.floor(low)), min(width - 1, np.ceil(high))
    ramp = 1 - np.clip((index - low) / max(0.001, high - low), 0, 1)
    plain = base ** (-2 * index / width)
    expected = plain / factor * (1 - ramp) + plain * ramp
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert scale == pytest.approx(1 + 0.1 * np.log(factor))


@pytest.mark.parametrize(
    "settings", [(32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192), (3.0, 0.7, 2.9, 900)], ids=["3.2", "3.1", "own"]
)
def test_factors_are_those_of_llama_3(settings: tuple[float, ...], tiny: SimpleNamespace, tmp_path: Path) -> None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **dict(zip(names, settings, strict=True))}
    model = tiny.build("llama", num_hidden_layers=1, head_dim=64, num_attention_heads=4, rope_parameters=rope)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = np.float32(plain / model.model.rotary_emb.inv_freq.double().numpy())
    tiny.write(tmp_path / "m.gguf", model, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    config = transformers.AutoConfig.for_model(**converted(tmp_path / "m.gguf", tmp_path / "out").config)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq, rtol=2e-5, atol=0)


def test_other_factors_are_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    path = tmp_path / "m.gguf"
    with_keys(tiny, path, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    assert "factors that are not those of Llama 3's formula" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "llama.expert_count = 8, expected 0"),
        (lambda writer: writer.add_rope_dimension_count(16), "rope.dimension_count is 16, where heads are 32 wide"),
        (lambda writer: writer.add_value_length(16), "attention.value_length is 16, where heads are 32 wide"),
        (
            lambda writer: writer.add_float32("llama.embedding_scale", 12.0),
            "llama.embedding_scale = 12.0, which is not",
        ),
        (lambda writer: writer.add_rope_scaling_factor(float("nan")), "rope scaling with settings that are no numbers"),
        (lambda writer: writer.add_key_length(33), "heads are 33 wide, which does not split into the halves"),
        (
            lambda writer: writer.add_string("tokenizer.ggml.eos_token_id", "2"),
            "is '2', expected the number of a token",
        ),
        (lambda writer: writer.add_sliding_window(64), "llama.attention.sliding_window = 64, expected 0"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope scaling of type 'longrope' (supported: none, linear, yarn",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((3, 5), np.float32)),
            "llama with tensors blk.0.ffn_gate_inp.weight is not supported",
        ),
        (lambda writer: writer.add_uint16("split.count", 3), "is one of 3 parts; join them with"),
        (lambda writer: writer.add_type("adapter"), "holds the adapter, expected a model"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_k.scale", np.ones(4, np.int32)),
            "tensor 'blk.0.attn_k.scale' is stored as I32, which the package gguf cannot dequantise",
        ),
    ],
)
def test_refuses_what_may_change_the_result(
    change: Callable[[Any], None], message: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    tiny.write(path, tiny.build("llama", num_hidden_layers=1), change=change)
    assert message in refused(path)


def test_refuses_other_architectures_with_the_list(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((3, 5), np.float32))
    finish(writer)
    assert "its architecture is 'mamba'; export supports GGUF files of llama, qwen2, qwen3" in refused(
        tmp_path / "m.gguf"
    )


def test_refuses_settings_that_differ_between_layers(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((3, 5), np.float32))
    writer.add_embedding_length(64)
    writer.add_array("llama.attention.head_count", [4, 2])
    finish(writer)
    assert "llama.attention.head_count differs between layers" in refused(tmp_path / "m.gguf")


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ODD: tuple[Any, ...] = (
    *(None, "x", "", -1, 0, 1, 2.5, float("nan"), float("inf"), -3.0, 1e30, 2**63),
    *([], [1], ["a"], [None], True, False, [[1]], [-1, 2]),
)


def test_odd_values_end_in_a_model_or_in_a_message(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    model = with_keys(tiny, tmp_path / "m.gguf", change)
    for key in model.metadata:
        for value in ODD:
            try:
                check_gguf(dataclasses.replace(model, metadata={**model.metadata, key: value}))
            except ModelError as error:
                assert str(tmp_path) in str(error), (key, value)  # noqa: PT017 - most raise, some need not


def test_damaged_files_are_refused_and_named(llama_file: Path, tmp_path: Path) -> None:
    data = llama_file.read_bytes()
    header = data.index(b"blk.1.ffn_down.weight") + 200
    path, random = tmp_path / "damaged.gguf", np.random.default_rng(5)
    for length in [0, 3, 4, 20, *random.integers(24, len(data), 30)]:
        path.write_bytes(data[:length])
        assert str(path) in refused(path)
    messages = []
    for place in random.integers(4, header, 150):
        damaged = bytearray(data)
        damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            check_gguf(open_gguf(path))  # Some bytes, as of a name, change nothing.
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)


def test_the_disk_is_asked_first(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match="bytes for the time of the export, the disk has 1,000 free"):
        converted(llama_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_file_names_it(llama_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"has no config.json; name the file .*{llama_file.name}"):
        passopt.export(llama_file.parent, tmp_path / "out")
    with pytest.raises(ModelError, match=r"nosuch\.gguf: cannot be read: No such file"):
        passopt.export(tmp_path / "nosuch.gguf", tmp_path / "out")


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(path)


def test_an_unknown_tokenizer_is_left_out_and_told(tiny: SimpleNamespace, tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("nosuch")
        writer.add_token_list(["a", "b"])

    tiny.write(tmp_path / "m.gguf", tiny.build("llama", num_hidden_layers=1), change=change)
    told: list[str] = []
    write_checkpoint(open_gguf(tmp_path / "m.gguf"), tmp_path / "out", told.append, lambda count: None)
    assert len(told) == 1
    assert "splits words by the rule 'nosuch', so the output has no tokenizer; supported are" in told[0]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_big_endian_files_are_refused(llama_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + b"\0\0\0\3" + llama_file.read_bytes()[8:])
    assert "big-endian" in refused(path)


def test_a_missing_tensor_is_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((3, 5), np.float32))
    for name in ("embedding_length", "head_count", "feed_forward_length", "block_count", "context_length"):
        getattr(writer, f"add_{name}")(4 if name == "head_count" else 64)
    writer.add_layer_norm_rms_eps(1e-5)
    finish(writer)
    assert "has no tensor token_embd.weight" in refused(tmp_path / "m.gguf")


def test_memory_does_not_grow_with_tensors(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", np.zeros((rows, 18 * 64), np.uint8), raw_dtype=Kind.Q4_0)
        finish(writer)
        tensor = open_gguf(path).tensors["token_embd.weight"]
        order = np.arange(rows).reshape(-1, 2, 16).swapaxes(1, 2).ravel()
        tracemalloc.start()
        try:
            assert sum(len(piece) for piece in tensor.pieces(path, order)) == rows * 2048 * 4
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(4 * 2048) < 1.1 * peak(2048)


def test_weights_cannot_be_referred_to(llama_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dequantised and lie in no file to refer to"):
        passopt.export(llama_file, tmp_path / "out", weights="reference")


def test_nothing_is_left_of_a_refused_export(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="damaged or truncated"):
        passopt.export(tmp_path / "m.gguf", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
