"""Tiny GGUF files, written by the package gguf as llama.cpp's converter writes them, of models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import gguf
import numpy as np
import pytest
import torch
import transformers

State: TypeAlias = Mapping[str, torch.Tensor]
Kind: TypeAlias = gguf.GGMLQuantizationType

#: Rows are as long as a block of every type; heads, groups and widths differ.
HIDDEN, HEADS, GROUPS, INNER, LAYERS, VOCAB, POSITIONS = 256, 8, 2, 512, 2, 84, 96

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def build(architecture: str, **settings: Any) -> Any:
    """Return a model of transformers with random weights, of which no two norms or biases are equal."""
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": True,
    }
    settings.setdefault("head_dim", HIDDEN // settings.get("num_attention_heads", HEADS))
    config = transformers.AutoConfig.for_model(architecture, **(sizes | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.08 if weight.ndim > 1 else 0.5 + torch.rand_like(weight))
    return model


def write(path: Path, model: Any, kind: Kind = Kind.F32, *, change: Callable[[Any], None] | None = None) -> State:
    """Write a model to a GGUF file; return its weights as the file's rounding leaves them.

    Args:
        path: The file.
        model: The model.
        kind: The type in which matrices are stored.
        change: Is called with the writer before the file is written, to add or override what it holds.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if change is not None:
        change(writer)
    rounded = {}
    for name, weight in model.named_parameters():
        rounded[name] = _add(writer, config, name, weight.detach().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def _add(writer: Any, config: Any, name: str, values: Any, kind: Kind) -> torch.Tensor:
    stored = kind if values.ndim > 1 else Kind.F32
    data = _blocks(values, stored)
    expected = gguf.dequantize(data, stored).reshape(values.shape)
    if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        data = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    writer.add_tensor(_gguf_name(name), data, raw_dtype=stored)
    return torch.from_numpy(np.array(expected, np.float32))


def _blocks(values: Any, kind: Kind) -> Any:
    if kind != Kind.Q6_K:
        return gguf.quantize(values, kind)
    # The package does not quantise to this type. These are valid blocks: codes, eight-bit scales, and an fp16 factor.
    blocks = np.random.default_rng(values.size).integers(0, 256, (len(values), values.shape[1] // 256, 210), np.uint8)
    blocks[..., 208:] = np.frombuffer(np.float16(3e-5).tobytes(), np.uint8)
    return blocks.reshape(len(values), -1)


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output."}
    for start, own in whole.items():
        if name.startswith(start):
            return name.replace(start, own)
    _, _, layer, rest = name.split(".", 3)
    module, _, part = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{part}"


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Return the functions of this file, which tests cannot import."""
    return SimpleNamespace(build=build, write=write)


@pytest.fixture(scope="session")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that no test may change: Llama with grouped keys and a tied head in Q4_1, without a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    write(path, build("llama"), Kind.Q4_1)
    return path
