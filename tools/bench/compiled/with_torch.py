"""Measure a decoder in plain torch, with SDPA and a KV cache that is allocated beforehand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from compiled.shapes import HEAD_DIM, Array, Memory, Shape, draw, draw_layer, evict, slopes, timed, tokens
from compiled.with_onnxruntime import CAPACITY, rotary_angles


class Decoder:
    """Hold the weights and caches of all layers in `dtype`, and run tokens through them."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.embedding = self._tensor(draw("embed", (shape.vocabulary, shape.hidden)))
        self.head = self._tensor(draw("head", (shape.vocabulary, shape.hidden)))
        self.last_norm = self._norm("output_norm")
        self.layers: list[dict[str, torch.Tensor]] = []
        for index in range(shape.layers):
            weights = {name: self._tensor(weight) for name, weight in draw_layer(shape, index)}
            weights["qkv"] = torch.cat([weights.pop(name) for name in "qkv"])
            weights["attn_norm"] = self._norm(f"blk.{index}.attn_norm")
            weights["ffn_norm"] = self._norm(f"blk.{index}.ffn_norm")
            self.layers.append(weights)
        size = (shape.layers, 2, 1, shape.heads, CAPACITY, HEAD_DIM)
        self.cache = torch.randn(size).to(dtype)
        self.angles = [torch.from_numpy(table).to(dtype) for table in rotary_angles(CAPACITY)]
        self.slopes = torch.from_numpy(slopes(shape.heads))[:, None, None]

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self.dtype)

    def _norm(self, name: str) -> torch.Tensor:
        return self._tensor(draw(name, (self.shape.hidden,)))

    def bias(self, count: int, past: int) -> torch.Tensor | None:
        """Return the ALiBi bias and causal mask that are added to the scores, or None for rotary shapes.

        All layers share it, and it is made once, outside of what is timed.
        """
        if self.shape.family == "rotary":
            return None
        total = past + count
        row = self.slopes * torch.arange(total)
        later = torch.full((count, total), float("-inf")).triu(past + 1)
        return (row + later)[None].to(self.dtype)

    def run(self, ids: torch.Tensor, past: int, bias: torch.Tensor | None) -> torch.Tensor:
        """Run `ids` after `past` tokens, and return the logits of the last one, [1, 1, vocabulary]."""
        x = F.embedding(ids, self.embedding)[None]
        for index, weights in enumerate(self.layers):
            x = x + self._attention(index, weights, self._normed(x, weights["attn_norm"]), past, bias)
            normed = self._normed(x, weights["ffn_norm"])
            active = F.silu(F.linear(normed, weights["gate"])) * F.linear(normed, weights["up"])
            x = x + F.linear(active, weights["down"])
        return F.linear(self._normed(x[:, -1:], self.last_norm), self.head)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.shape.hidden,), weight, 1e-6)

    def _attention(
        self, index: int, weights: dict[str, torch.Tensor], x: torch.Tensor, past: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        count = x.shape[1]
        packed = F.linear(x, weights["qkv"]).view(1, count, 3, self.shape.heads, HEAD_DIM)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if self.shape.family == "rotary":
            query, key = self._rotated(query, past), self._rotated(key, past)
        keys, values = self.cache[index]
        keys[:, :, past : past + count], values[:, :, past : past + count] = key, value
        keys, values = keys[:, :, : past + count], values[:, :, : past + count]
        causal = bias is None and count > 1
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, is_causal=causal)
        return F.linear(mixed.transpose(1, 2).reshape(1, count, self.shape.width), weights["o"])

    def _rotated(self, x: torch.Tensor, past: int) -> torch.Tensor:
        cos, sin = (table[past : past + x.shape[2]] for table in self.angles)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of all points, the logits after the first prompt to compare, and the memory held."""
    shape = Shape(**job["shape"])
    (threads,) = job["threads"]
    torch.set_num_threads(threads)
    memory = Memory()
    decoder = Decoder(shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]])
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for count in job["prefill"]:
            run = partial(decoder.run, _ids(count, shape), 0, decoder.bias(count, 0))
            results[f"prefill {count} {threads}"] = timed(run, seconds=job["seconds"], prepare=evict)
            if "logits" not in results:
                results["logits"] = run().float().ravel().tolist()
        for past in job["decode"]:
            run = partial(decoder.run, _ids(1, shape), past, decoder.bias(1, past))
            results[f"decode {past} {threads}"] = timed(run, seconds=job["seconds"])
    return results | {"memory": memory.held(decoder.cache.nbytes)}


def _ids(count: int, shape: Shape) -> torch.Tensor:
    return torch.from_numpy(tokens(count, shape.vocabulary))
