"""Trace the stock Baichuan classes faithfully, with shims on instances, never on files or classes.

Shapes use b batch, q positions of this step, p positions in the cache, kv = p + q.
"""

from __future__ import annotations

import json
import math
import struct
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir
import torch

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.family import Cache, CacheShape, Family, Step
from passopt.frontends.options import Alibi, ExportOptions
from passopt.frontends.probing.stock_alibi import Slopes, StockAlibi, measure
from passopt.frontends.remote_code import StockClasses, build_stock
from passopt.frontends.stock_errors import stock_errors
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.sources import safetensors_sources

FUTURE_MASK = "alibi.future_mask"
SLOPES = "alibi.slopes"

#: The end of the names of tensors that published checkpoints hold although the class computes them.
_COMPUTED_SUFFIX = "rotary_emb.inv_freq"

# The sizes for a self-check. No two dimensions are equal, and the number of heads is no power of two, so that no mix-up
# of axes or slopes goes unnoticed. Heads are 16 wide because the roots of 16 are exact; the root of 10, as a folded
# bf16 constant, would move the logits by 4e-3 and hide real faults.
_SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "hidden_size": 6 * 16,
    "intermediate_size": 44,
    "vocab_size": 72,
    "pad_token_id": 0,
}
#: The largest number of positions of a self-check, since the stock ALiBi mask is quadratic in it.
_SMALL_POSITIONS = 1024
_POSITION_KEYS = ("model_max_length", "max_position_embeddings")

_CHUNK_BYTES = 32 << 20


class Baichuan(Family):
    """Baichuan 1 and 2 in both published sizes, 7B (rotary) and 13B (ALiBi), with packed QKV, by their own code."""

    constants: ClassVar = {
        "model.alibi_slopes": SLOPES,
        "model.alibi_future_mask": FUTURE_MASK,
        "model.layers.0.self_attn.rotary_emb.cos_cached": "rotary.cos",
        "model.layers.0.self_attn.rotary_emb.sin_cached": "rotary.sin",
    }

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, classes: StockClasses) -> None:
        super().__init__(checkpoint)
        if options.attention is not None:
            raise UsageError(
                "the code of a Baichuan checkpoint has one attention implementation; leave out `attention`"
            )
        self._alibi = options.alibi
        self._classes = classes
        self._normalises = False
        self._measured: dict[tuple[Any, ...], StockAlibi] = {}

    @property
    def source_root(self) -> Path:
        return self.checkpoint.directory

    def build(self, dtype: torch.dtype, *, small: bool) -> Any:
        model = build_stock(self.checkpoint, self._classes, dtype, self._small() if small else {})
        check_supported(model)
        return model

    def _small(self) -> dict[str, int]:
        positions = self.checkpoint.config.get("model_max_length")
        if "max_position_embeddings" in self.checkpoint.config or not isinstance(positions, int):
            return _SMALL  # The rotary family, whose tables are small whatever the number of positions.
        return {**_SMALL, "model_max_length": min(positions, _SMALL_POSITIONS)}

    def cache_shape(self, model: Any) -> CacheShape:
        heads = model.config.num_attention_heads
        return CacheShape(len(model.model.layers), heads, model.config.hidden_size // heads)

    def sources(self, model: Any) -> Mapping[str, Expression]:
        tensors = self.checkpoint.tensors
        return {name: source for name, source in tensors.items() if not name.endswith(_COMPUTED_SUFFIX)}

    def step(self, model: Any) -> Step:
        self._normalises = is_norm_head(model)
        prepare(model, self._alibi, self.stock_alibi(model).slopes if is_alibi(model) else None)
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
        logits, present = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past or None,
            use_cache=True,
            return_dict=False,
            **extra,
        )
        return logits, present

    def longest(self, model: Any) -> int | None:
        return self.stock_alibi(model).longest if is_alibi(model) else None

    def stock_alibi(self, model: Any) -> StockAlibi:
        """Return what the class computes as ALiBi, at the sizes of a built model, which is left alone."""
        sizes = {
            key: getattr(model.config, key)
            for key in ("num_attention_heads", "hidden_size", *_POSITION_KEYS)
            if hasattr(model.config, key)
        }
        one = {**sizes, "num_hidden_layers": 1}

        def body() -> Any:
            return build_stock(self.checkpoint, self._classes, torch.float32, one).eval().model

        key = tuple(sorted(sizes.items()))
        if key not in self._measured:
            subject = f"{self.checkpoint.directory}: {type(model).__name__}"
            with stock_errors(self.checkpoint, f"the ALiBi mask of {type(model).__name__} cannot be built"):
                self._measured[key] = measure(body, self.numbers(), subject)
        return self._measured[key]

    def extra_weights(self, model: Any, scratch: Path) -> Mapping[str, Source]:
        if not is_alibi(model) or self._alibi != "baked":
            return {}
        _, positions, _ = future_mask_shape(model)
        return {
            FUTURE_MASK: write_future_mask(scratch / "alibi.safetensors", self.stock_alibi(model).slopes, positions)
        }

    def check(self, graph: onnx_ir.Model) -> None:
        if self._normalises:
            check_head(graph)


def check_supported(model: Any) -> None:
    """Raise ModelError unless the model is a Baichuan decoder, judging by the instance's attributes."""
    body = getattr(model, "model", None)
    attention = getattr(next(iter(getattr(body, "layers", [])), None), "self_attn", None)
    rotary = hasattr(getattr(attention, "rotary_emb", None), "cos_cached")
    if not hasattr(attention, "W_pack") or rotary == hasattr(body, "get_alibi_mask"):
        raise ModelError(
            f"{type(model).__name__} is not supported. Export supports Baichuan: packed W_pack attention with either "
            f"rotary tables or get_alibi_mask."
        )


def is_alibi(model: Any) -> bool:
    """Return True for the ALiBi family (13B) and False for the rotary one (7B)."""
    return hasattr(model.model, "get_alibi_mask")


def is_norm_head(model: Any) -> bool:
    """Return whether the head normalises its weight, as that of Baichuan 2 does, and that of Baichuan 1 does not."""
    return hasattr(model.lm_head, "first_flag")


def prepare(model: Any, alibi: Alibi, slopes: Slopes | None) -> None:
    """Change one instance in place so that it can be traced.

    Args:
        model: The instance.
        alibi: The form of the ALiBi bias, which does not matter to the rotary family.
        slopes: The slopes of the ALiBi family, `[heads]`; None for the rotary family.
    """
    model.eval()
    if is_norm_head(model):
        # In evaluation mode the head normalises its own data in place, which tracing would silently drop.
        model.lm_head.train()
    if slopes is None:
        _share_rotary_tables(model)
        return
    if alibi == "baked":
        mask = torch.empty(future_mask_shape(model), dtype=torch.float32, device="meta")
        model.model.register_buffer("alibi_future_mask", mask, persistent=False)
        model.model.get_alibi_mask = types.MethodType(_sliced_mask, model.model)
        return
    model.model.register_buffer("alibi_slopes", torch.from_numpy(slopes).reshape(-1, 1, 1), persistent=False)
    model.model.get_alibi_mask = types.MethodType(_computed_mask, model.model)


def future_mask_shape(model: Any) -> tuple[int, int, int]:
    """Return `[heads, positions, positions]`, the shape in which the stock code would build the mask."""
    return model.config.num_attention_heads, model.model.max_cache_pos, model.model.max_cache_pos


def _share_rotary_tables(model: Any) -> None:
    """Let layers share the two rotary tables of the first where theirs are equal, so that they are traced only once."""
    first = model.model.layers[0].self_attn.rotary_emb
    for layer in model.model.layers:
        rotary = layer.self_attn.rotary_emb
        tables = ((rotary.cos_cached, first.cos_cached), (rotary.sin_cached, first.sin_cached))
        if all(torch.equal(own, shared) for own, shared in tables):
            rotary.cos_cached, rotary.sin_cached = first.cos_cached, first.sin_cached


def _computed_mask(body: Any, embeddings: torch.Tensor, total: int) -> torch.Tensor:
    """Return slope × column, with −inf above the diagonal, as `[heads, q, kv]`.

    It is computed in fp32, because in fp16 column 4095 would be off by 2.
    """
    past = total - embeddings.shape[1]
    columns = torch.arange(total)
    rows = torch.arange(past, total)
    bias: torch.Tensor = body.alibi_slopes * columns.to(torch.float32)
    future = torch.where(columns.unsqueeze(0) > rows.unsqueeze(1), float("-inf"), 0.0).to(torch.float32)
    return bias + future


def _sliced_mask(body: Any, embeddings: torch.Tensor, total: int) -> torch.Tensor:
    """Return the rows of this step from the constant mask, as `[heads, q, kv]` in fp32."""
    past = total - embeddings.shape[1]
    mask: torch.Tensor = body.alibi_future_mask[:, past:total, :total]
    return mask


def write_future_mask(path: Path, slopes: Slopes, positions: int) -> Source:
    """Write the baked mask `[heads, positions, positions]` in fp32 to a safetensors file, piece by piece.

    Return the tensor in the file. The whole mask is never in memory.
    """
    shape = (len(slopes), positions, positions)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({FUTURE_MASK: entry}).encode()
    header += b" " * (-(8 + len(header)) % 64)
    columns = np.arange(positions, dtype=np.float32)
    step = max(1, _CHUNK_BYTES // (4 * positions))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for slope in slopes:
            for start in range(0, positions, step):
                rows = np.arange(start, min(start + step, positions), dtype=np.float32)[:, None]
                file.write(np.where(columns > rows, np.float32("-inf"), slope * columns).tobytes())
    return safetensors_sources(path)[FUTURE_MASK]


class _Step(Step):
    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.alibi = is_alibi(stock)

    @property
    def takes_positions(self) -> bool:
        return not self.alibi

    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Cache,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Cache]:
        extra = {} if self.alibi else {"position_ids": position_ids}
        logits, present = self.stock(
            input_ids=input_ids,
            attention_mask=_visible(attention_mask, input_ids.shape[1]) if self.alibi else attention_mask,
            past_key_values=past or None,
            use_cache=True,
            return_dict=False,
            **extra,
        )
        return logits, present


def _visible(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Expand a mask `[b, kv]` to `[b, q, kv]`: with a cache, the stock code fails on a mask of two axes."""
    past = attention_mask.shape[1] - length
    rows, columns = attention_mask[:, past:].unsqueeze(2), attention_mask.unsqueeze(1)
    return (rows == columns) & (columns > 0)


def check_head(model: onnx_ir.Model) -> None:
    """Check that the logits are a product with the normalised weight: tracing can silently lose the NormHead.

    Raises:
        ModelError: If the weight in that product is not computed with a ReduceL2.
    """
    product = model.graph.outputs[0].producer()
    pending = list(product.inputs[1:]) if product is not None and product.op_type == "MatMul" else []
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None:
            continue
        if node.op_type == "ReduceL2":
            return
        pending.extend(node.inputs)
    raise ModelError(
        "the traced head does not normalise its weight (no ReduceL2 before the product that gives the logits); "
        "logits would be wrong. This passopt does not know this NormHead or this version of torch."
    )
