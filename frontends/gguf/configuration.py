"""Write the configuration of a GGUF file's model as transformers' config.json says it."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from passopt.frontends.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, Architecture
from passopt.frontends.gguf.reader import GgufFile
from passopt.frontends.gguf.rope import llama3_scaling, scaling
from passopt.ir.errors import ModelError

#: What a key must say, if it is there, because the class of transformers computes nothing else.
_FIXED = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "pooling_type": 0,
    "tensor_data_layout": "Meta AI original pth",  # llama.cpp reads and writes all files alike.
    "use_parallel_residual": False,
}
_ROPE_SCALING = "rope.scaling."


class _Settings:
    """The keys of the architecture, of which every one must be asked for."""

    def __init__(self, model: GgufFile) -> None:
        self._where = model.path
        self._prefix = f"{model.architecture}."
        self._left = {
            key.removeprefix(self._prefix): value
            for key, value in model.metadata.items()
            if key.startswith(self._prefix)
        }

    def take(self, name: str, default: float | None = None) -> float:
        """Return a number; a list, as of one per layer, must repeat it."""
        value = self._left.pop(name, default)
        values = value if isinstance(value, list) else [value]
        if value is None:
            raise ModelError(f"{self._where}: its metadata lacks {self._prefix}{name}")
        if not values or not all(_is_number(each) for each in values):
            raise ModelError(f"{self._where}: {self._prefix}{name} is {_short(value)}, expected a number")
        if any(each != values[0] for each in values):
            raise ModelError(f"{self._where}: {self._prefix}{name} differs between layers, which is not supported")
        return float(values[0])

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a number above 0, without the digits that fp32 does not hold."""
        number = self.take(name, default)
        if not number > 0:
            raise ModelError(f"{self._where}: {self._prefix}{name} is {number}, expected a positive number")
        return _tidy(number)

    def size(self, name: str, default: float | None = None) -> int:
        """Return a number that is whole and positive."""
        number = self.take(name, default)
        if number != int(number) or number <= 0:
            raise ModelError(f"{self._where}: {self._prefix}{name} is {number}, expected a positive whole number")
        return int(number)

    def take_all(self, prefix: str) -> dict[str, Any]:
        """Return what lies below a prefix, by the rest of its name."""
        names = [name for name in self._left if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._left.pop(name) for name in names}

    def end(self) -> None:
        """Raise ModelError if a key is left that is not known to change nothing."""
        for name, value in self._left.items():
            if name not in _FIXED or value != _FIXED[name]:
                expected = f", expected {_FIXED[name]!r}" if name in _FIXED else ", which is not supported"
                raise ModelError(f"{self._where}: its metadata has {self._prefix}{name} = {_short(value)}{expected}")


def architecture_of(model: GgufFile) -> Architecture:
    """Return what is known of the file's architecture.

    Raises:
        ModelError: If it is none of those that are supported; the message lists them.
    """
    found = ARCHITECTURES.get(model.architecture)
    if found is None:
        raise ModelError(
            f"{model.path}: its architecture is {model.architecture!r}; export supports GGUF files of "
            f"{', '.join(ARCHITECTURES)}. Export the model's Hugging Face checkpoint instead."
        )
    return found


def config_of(model: GgufFile) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        ModelError: If the architecture, or a setting in the metadata, is not supported, or if one is missing.
    """
    architecture = architecture_of(model)
    settings = _Settings(model)
    hidden, heads = settings.size("embedding_length"), settings.size("attention.head_count")
    width = settings.size("attention.key_length", hidden / heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := settings.size(name, width)) != width:
            raise ModelError(
                f"{model.path}: {model.architecture}.{name} is {found}, where heads are {width} wide; not supported"
            )
    if width % 2:
        raise ModelError(
            f"{model.path}: heads are {width} wide, which does not split into the halves of rotary positions"
        )
    base = settings.positive("rope.freq_base", 10000.0)
    config = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": settings.size("feed_forward_length"),
        "num_hidden_layers": settings.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.size("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": settings.size("context_length"),
        "rms_norm_eps": settings.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        "rope_scaling": _scaling(model, settings, base),
        "vocab_size": _vocabulary(model),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        **_biases(model, architecture),
        **token_ids(model),
        "torch_dtype": "float32",
    }
    settings.take("vocab_size", 0)  # The rows of the embedding say how many there are.
    settings.end()
    return config


def _vocabulary(model: GgufFile) -> int:
    embedding = model.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{model.path}: has no tensor token_embd.weight")
    return embedding.rows


def _scaling(model: GgufFile, settings: _Settings, base: float) -> dict[str, Any] | None:
    given = settings.take_all(_ROPE_SCALING)
    if (linear := settings.take("rope.scale_linear", 1.0)) != 1.0:  # An older spelling.
        given.setdefault("factor", linear)
    try:
        found = scaling({name: _tidy(value) if isinstance(value, float) else value for name, value in given.items()})
        if ROPE_FACTORS not in model.tensors:
            return found
        if found is not None:
            raise ValueError(f"{found['rope_type']} together with factors in {ROPE_FACTORS}")
        return llama3_scaling(model.values(ROPE_FACTORS), base)
    except ValueError as error:
        raise ModelError(f"{model.path}: rope scaling {error}, which is not supported") from error


def _biases(model: GgufFile, architecture: Architecture) -> dict[str, bool]:
    """Return the options for biases of classes that have such; other classes always have them, or never."""
    if not architecture.biases:
        return {}
    found = {"attention_bias": "blk.0.attn_output.bias" in model.tensors}
    return found | ({"mlp_bias": "blk.0.ffn_down.bias" in model.tensors} if architecture.model_type == "llama" else {})


def token_ids(model: GgufFile) -> dict[str, Any]:
    """Return the ids of special tokens as config.json and generation_config.json name them.

    What ends a turn or a message ends a generation, as it does in llama.cpp.

    Raises:
        ModelError: If an id is no whole number.
    """
    ids: dict[str, Any] = {}
    for role in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        ids[role] = model.metadata.get(key)
        if ids[role] is not None and (type(ids[role]) is not int or ids[role] < 0):
            raise ModelError(f"{model.path}: {key} is {_short(ids[role])}, expected the number of a token")
    ends = list(dict.fromkeys(each for each in (ids["eos"], ids["eot"], ids["eom"]) if each is not None))
    found = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _tidy(number: float) -> float:
    """Return the shortest number that is the same in fp32, such as 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(number)))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
