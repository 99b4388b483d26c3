"""Make tiny checkpoints, with random weights, of model families whose code is part of transformers.

All sizes are different, the number of heads is no power of two, and keys are grouped where the family groups them.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS, _HEADS, _HIDDEN, _INNER, _POSITIONS = 2, 6, 60, 76, 64
_SIZES = {"num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "hidden_size": _HIDDEN}
_LLAMA = {**_IDS, **_SIZES, "intermediate_size": _INNER, "max_position_embeddings": _POSITIONS}

#: The config.json of each family, by name: its `model_type`, and settings that distinguish variants of one type.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama", "num_key_value_heads": 2},
    "mistral": {**_LLAMA, "model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 8},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 14},
    "phi3": {
        **_LLAMA,
        "model_type": "phi3",
        "num_key_value_heads": 3,
        "original_max_position_embeddings": _POSITIONS,
    },
    "gemma2": {
        **_LLAMA,
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 14,
        "query_pre_attn_scalar": 14,
        "sliding_window": 8,
    },
    "gpt-neox": {**_LLAMA, "model_type": "gpt_neox", "num_attention_heads": 3, "hidden_size": 72, "rotary_pct": 0.25},
    "falcon-mqa": {**_IDS, **_SIZES, "model_type": "falcon", "ffn_hidden_size": _INNER, "multi_query": True},
    "falcon-gqa": {
        **_IDS,
        **_SIZES,
        "model_type": "falcon",
        "ffn_hidden_size": _INNER,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "opt": {
        **_IDS,
        **_SIZES,
        "model_type": "opt",
        "ffn_dim": _INNER,
        "word_embed_proj_dim": _HIDDEN,
        "max_position_embeddings": _POSITIONS,
    },
    "gpt2": {
        **_IDS,
        "model_type": "gpt2",
        "n_layer": _LAYERS,
        "n_head": _HEADS,
        "n_embd": _HIDDEN,
        "n_inner": _INNER,
        "n_positions": _POSITIONS,
    },
    "bloom": {**_IDS, "model_type": "bloom", "n_layer": _LAYERS, "n_head": _HEADS, "hidden_size": _HIDDEN},
    "mpt": {
        **_IDS,
        "model_type": "mpt",
        "n_layers": _LAYERS,
        "n_heads": _HEADS,
        "d_model": _HIDDEN,
        "expansion_ratio": 2,
        "max_seq_len": _POSITIONS,
    },
}


def make_family_checkpoint(directory: Path, family: str) -> Path:
    """Write config.json and fp32 safetensors as transformers saves them, and return `directory`."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[family])
    with contextlib.redirect_stdout(sys.stderr):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_drawn(name, weight.shape, random))
    model.save_pretrained(directory)
    return directory


def _drawn(name: str, shape: Any, random: Any) -> Any:
    """Return values under which activations keep their size and attention is far from uniform."""
    import torch

    if len(shape) > 1:
        return torch.randn(shape, generator=random) / math.sqrt(shape[-1])
    if "norm" in name.lower() or "ln" in name:
        return 0.6 + 0.8 * torch.rand(shape, generator=random)
    return 0.2 * torch.randn(shape, generator=random)
