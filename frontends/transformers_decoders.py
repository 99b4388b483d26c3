"""Export decoders whose classes transformers has itself: no code of the checkpoint runs.

The cache is transformers' own class, built from flat tensors without a configuration. Every layer keeps all positions,
also with sliding windows, where the mask then does what a shorter cache would do, also behind padding on the left.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from passopt.frontends.bind_weights import untied
from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.family import Cache, CacheShape, Family, Step, argument_names
from passopt.frontends.options import ExportOptions
from passopt.frontends.probing.weightless import fake_weights
from passopt.frontends.stock_errors import stock_errors
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.expressions import Expression

#: Patterns of tensors that older checkpoints hold, although every class now computes them.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")

#: Modules that have another name in files: in published GPT-NeoX checkpoints, and in what transformers saves.
_RENAMED = {"embed_out": "lm_head"}

# The sizes for a self-check are unequal, and keys are grouped as config.json says. The roots of 16 are exact in bf16.
_LAYERS, _HEADS, _GROUPS, _WIDTH = 2, 6, 2, 16
_SMALL = {
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "vocab_size": 72,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 44),
}
_SMALL_WINDOW = 8

#: What transformers' class for MPT computes whatever the configuration says, by the name of the setting.
_MPT_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "logit_scale": (None,),
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_type": ("multihead_attention",),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "attn_uses_sequence_id": (False,),
}


class TransformersDecoder(Family):
    """A decoder, known by its `model_type`, traced in the attention implementation asked for (default: eager)."""

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions) -> None:
        super().__init__(checkpoint)
        if options.alibi != "formula":
            raise UsageError(
                f"only Baichuan can be exported with a baked ALiBi mask; leave out `alibi` for "
                f"{checkpoint.config['model_type']}"
            )
        self._attention = options.attention or "eager"

    @property
    def source_root(self) -> Path:
        return Path(transformers.__file__).parent

    def build(self, dtype: torch.dtype, *, small: bool) -> Any:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]

        kind = self.checkpoint.config["model_type"]
        _refuse_ignored(self.checkpoint)
        with stock_errors(self.checkpoint, f"{kind} with {self._attention} attention cannot be built from config.json"):
            config = transformers.AutoConfig.for_model(**self.checkpoint.config)
            refuse_dynamic(self.checkpoint, config)
            if small:
                shrink(config)
            with init_empty_weights(include_buffers=False):
                model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=dtype, attn_implementation=self._attention
                )
            model.tie_weights()
        return model.eval().requires_grad_(False)

    def cache_shape(self, model: Any) -> CacheShape:
        """Measure the cache on a copy of the model, because every class of configuration describes it differently."""
        probe = copy.deepcopy(model)
        fake_weights(probe)
        cache = transformers.DynamicCache()
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            probe(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
        keys = [key for key, _ in states(cache)]
        return CacheShape(len(keys), keys[0].shape[1], keys[0].shape[3])

    def sources(self, model: Any) -> Mapping[str, Expression]:
        parameters = dict(model.named_parameters())
        ignored = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
        found = {}
        for name, source in self.checkpoint.tensors.items():
            known = _parameter_name(name, model)
            if known in parameters or not any(re.search(pattern, name) for pattern in ignored):
                found[known] = source
        return untied(found, self.ties(model), self.checkpoint.directory)

    def ties(self, model: Any) -> Mapping[str, str]:
        own = {parameter: name for name, parameter in model.named_parameters()}
        names = model.named_parameters(remove_duplicate=False)
        return {name: own[parameter] for name, parameter in names if own[parameter] != name}

    def step(self, model: Any) -> Step:
        return _Step(model)

    def reference(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        extra = {"position_ids": position_ids} if self.takes_positions(model) else {}
        cache = dynamic_cache(past)
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
        )
        return output.logits, states(cache)


class _Step(Step):
    @property
    def takes_positions(self) -> bool:
        return "position_ids" in argument_names(self.stock)

    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Cache,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Cache]:
        extra = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.stock(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=dynamic_cache(past),
            use_cache=True,
            **extra,
        )
        return output.logits, states(output.past_key_values)


def dynamic_cache(past: Cache) -> transformers.DynamicCache:
    """Return transformers' cache over these very tensors; its own update would copy them behind an empty cache."""
    cache = transformers.DynamicCache()
    for key, value in past:
        layer = transformers.cache_utils.DynamicLayer()  # type: ignore[no-untyped-call]
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values, layer.is_initialized = key, value, True
        cache.layers.append(layer)
    return cache


def states(cache: Any) -> Cache:
    """Return the keys and values of all layers of transformers' cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _parameter_name(name: str, model: Any) -> str:
    """Return the model's name for a tensor: some checkpoints were saved from the body alone, or by older classes."""
    prefix = f"{model.base_model_prefix}."
    parameters = model.state_dict(keep_vars=True).keys()
    part, _, rest = name.partition(".")
    candidates = (name, prefix + name, name.removeprefix(prefix), f"{_RENAMED.get(part, part)}.{rest}")
    return next((candidate for candidate in candidates if candidate in parameters), name)


def shrink(config: Any) -> None:
    """Set the sizes of a self-check in place.

    Biases, norms, windows, the grouping of heads and the kinds of positions stay as they are.
    """
    width = _head_width(config) if _has_rotary_lists(config) else _WIDTH
    small = {**_SMALL, "hidden_size": _HEADS * width, "head_dim": width}
    for name in ("num_key_value_heads", "num_kv_heads"):
        groups = getattr(config, name, None) or config.num_attention_heads
        small[name] = _HEADS if groups == config.num_attention_heads else min(groups, _GROUPS)
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:
        small["word_embed_proj_dim"] = _HEADS * width
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = _SMALL_WINDOW
    known = config.to_dict().keys() | config.attribute_map.keys()
    for name, value in small.items():
        if name in known and (getattr(config, name) is not None or name.endswith("_token_id")):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = list(itertools.islice(itertools.cycle(config.layer_types), _LAYERS))


def refuse_dynamic(checkpoint: Checkpoint, config: Any) -> None:
    """Raise ModelError for rotary angles that grow with the longest position of a call, and stay so afterwards."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "dynamic":
            raise ModelError(
                f"{checkpoint.directory}: rope_scaling of config.json is dynamic: past "
                f"{config.max_position_embeddings} positions, rotary angles depend on the longest position so far, "
                f"which a graph without state cannot compute. Export with rope_scaling null for up to so many "
                f"positions, or with yarn or linear scaling."
            )


def _refuse_ignored(checkpoint: Checkpoint) -> None:
    """Raise ModelError for settings of MPT that its authors' code has and transformers' class ignores."""
    config = checkpoint.config
    if config["model_type"] != "mpt":
        return
    attention = config.get("attn_config") or {}
    for place, settings in (("", config), ("attn_config.", attention)):
        for name, computed in _MPT_COMPUTED.items():
            if name in settings and settings[name] not in computed:
                raise ModelError(
                    f"{checkpoint.directory}: {place}{name} of config.json is {settings[name]!r}, which transformers' "
                    f"class for mpt ignores: it computes as for {computed[0]!r}. Export the checkpoint's own code "
                    f"(auto_map and `trust_remote_code=True`)."
                )


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def _has_rotary_lists(config: Any) -> bool:
    """Return whether config.json lists a factor per rotary frequency, which fixes the width of heads."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return any(isinstance(value, list | tuple) for value in parameters.values())
