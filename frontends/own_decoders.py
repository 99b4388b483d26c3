"""Export decoders by code that the checkpoint brings, of whatever kind, where tracing works.

The class gets the arguments that its forward names. Its cache is transformers' own class, or a tuple of keys and values
per layer, whose axes may be in any order.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.family import Cache, CacheShape, Step, argument_names
from passopt.frontends.options import ExportOptions
from passopt.frontends.probing.weightless import fake_weights
from passopt.frontends.remote_code import StockClasses, instantiate
from passopt.frontends.stock_errors import Unsupported, stock_errors
from passopt.frontends.transformers_decoders import TransformersDecoder, dynamic_cache, refuse_dynamic, shrink, states

#: The sizes of a self-check, by the names under which configurations have them.
_SMALL = {
    2: ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    6: ("num_attention_heads", "n_head", "n_heads"),
    16: ("head_dim", "kv_channels"),
    96: ("hidden_size", "n_embd", "d_model"),
    44: ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"),
    72: ("vocab_size", "padded_vocab_size"),
    0: ("pad_token_id",),
    1: ("bos_token_id",),
}
_GROUPS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HEADS, _FEW_GROUPS = 6, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a class takes and returns its cache: `axes` are those of batch, heads, length and width; None for a Cache."""

    layers: int
    heads: int
    width: int
    axes: tuple[int, int, int, int] | None

    def to_stock(self, past: Cache) -> Any:
        """Return the cache, whose states are `[b, heads, p, width]`, as the class takes it."""
        if self.axes is None:
            return dynamic_cache(past)
        order = [self.axes.index(axis) for axis in range(4)]
        return tuple((key.permute(order), value.permute(order)) for key, value in past) or None

    def from_stock(self, cache: Any) -> Cache:
        """Return the states of a cache that the class returned, `[b, heads, kv, width]`."""
        if self.axes is None:
            return states(cache)
        return [(layer[0].permute(self.axes), layer[1].permute(self.axes)) for layer in cache]


class OwnDecoder(TransformersDecoder):
    """A decoder by the checkpoint's own class, whose configuration is its own or transformers'."""

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, classes: StockClasses) -> None:
        super().__init__(checkpoint, options)
        self._classes = classes

    @property
    def source_root(self) -> Path:
        return self.checkpoint.directory

    def build(self, dtype: torch.dtype, *, small: bool) -> Any:
        with stock_errors(self.checkpoint, f"{self._classes.model.__name__} cannot be built from config.json"):
            config = self._config(small=small)
            config._attn_implementation = self._attention
            model = instantiate(self._classes, config, dtype)
            model.tie_weights()
            return model.eval()

    def _config(self, *, small: bool) -> Any:
        stated = dict(self.checkpoint.config)
        if self._classes.config is not None:
            return self._classes.config.from_dict({**stated, **(_small(stated) if small else {})})
        config = transformers.AutoConfig.for_model(**stated)
        refuse_dynamic(self.checkpoint, config)
        if small:
            shrink(config)
        return config

    def cache_shape(self, model: Any) -> CacheShape:
        layout = _layout(model)
        return CacheShape(layout.layers, layout.heads, layout.width)

    def step(self, model: Any) -> Step:
        return _Step(model, _layout(model))

    def reference(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        layout = _layout(model)
        output = _call(model, input_ids, attention_mask, layout.to_stock(past), position_ids)
        return output.logits, layout.from_stock(output.past_key_values)


class _Step(Step):
    def __init__(self, stock: Any, layout: Layout) -> None:
        super().__init__(stock)
        self._layout = layout

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
        output = _call(self.stock, input_ids, attention_mask, self._layout.to_stock(past), position_ids)
        return output.logits, self._layout.from_stock(output.past_key_values)


def _call(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past: Any,
    position_ids: torch.Tensor | None,
) -> Any:
    """Call the class with those arguments that it names, and return its output with logits and past_key_values."""
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "past_key_values": past,
        "position_ids": position_ids,
        "use_cache": True,
        "return_dict": True,
    }
    names = argument_names(model)
    if missing := {"input_ids", "past_key_values"} - names:
        raise Unsupported(
            f"{type(model).__name__}.forward takes no {' and no '.join(sorted(missing))}, so it is no decoder that "
            f"passopt can export; its arguments are {', '.join(sorted(names))}"
        )
    output = model(**{name: value for name, value in arguments.items() if name in names})
    if getattr(output, "logits", None) is None or getattr(output, "past_key_values", None) is None:
        raise Unsupported(
            f"{type(model).__name__} returns a {type(output).__name__} without logits and past_key_values"
        )
    return output


def _layout(model: Any) -> Layout:
    """Find out how the class lays out its cache: run a copy without weights for two batches of two lengths."""
    probe = copy.deepcopy(model)
    fake_weights(probe)
    shapes = []
    for batch, length in ((2, 3), (3, 5)):
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.ones(batch, length, dtype=torch.long)
            positions = torch.arange(length).repeat(batch, 1) if "position_ids" in argument_names(probe) else None
            cache = _call(probe, ids, torch.ones_like(ids), None, positions).past_key_values
        if isinstance(cache, transformers.Cache):
            keys = [key for key, _ in states(cache)]
            return Layout(len(keys), keys[0].shape[1], keys[0].shape[3], None)
        shapes.append([tuple(state.shape) for layer in cache for state in layer[:2]])
    first, second = shapes
    axes = [
        [axis for axis, sizes in enumerate(zip(*pair, strict=True)) if sizes == want]
        for pair in zip(first, second, strict=True)
        for want in ((2, 3), (3, 5))
    ]
    batches, lengths = axes[::2], axes[1::2]
    if (
        {len(shape) for shape in first} != {4}
        or any(found != batches[0] for found in batches)
        or any(found != lengths[0] for found in lengths)
        or len(batches[0]) != 1
        or len(lengths[0]) != 1
    ):
        raise Unsupported(
            f"{type(model).__name__} returns a cache of shapes {first[:2]}, expected keys and values with 4 axes"
        )
    batch_axis, length_axis = batches[0][0], lengths[0][0]
    heads, width = (axis for axis in range(4) if axis not in (batch_axis, length_axis))
    return Layout(len(first) // 2, first[0][heads], first[0][width], (batch_axis, heads, length_axis, width))


def _small(config: dict[str, Any]) -> dict[str, int]:
    """Return small sizes under the names that a configuration has."""
    small = {name: size for size, names in _SMALL.items() for name in names if isinstance(config.get(name), int)}
    heads = next((config[name] for name in _SMALL[_HEADS] if isinstance(config.get(name), int)), None)
    for name in _GROUPS:
        if isinstance(config.get(name), int):
            small[name] = _HEADS if config[name] == heads else min(config[name], _FEW_GROUPS)
    return small
