"""Give a decoder the cache that it takes: numbers as they are, or codes beside their scales.

Both models of a comparison find the same numbers in their cache, and their caches are compared as numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.attention.int8_cache import Turn, int8_caches
from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import SCALES, decoder_of
from passopt.ir.shapes.dimensions import dimensions

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_LARGEST_CODE = 127


@dataclasses.dataclass(frozen=True)
class CacheInput:
    """The keys or values of one layer.

    Attributes:
        name: The name of the input.
        heads: The number of heads.
        width: The number of channels of a head.
        dtype: The dtype of the numbers.
        in_codes: Whether the input holds codes, with their scales in an input beside it.
        turn: How keys are turned before they are stored; None if they are not.
    """

    name: str
    heads: int
    width: int
    dtype: np.dtype[Any]
    in_codes: bool
    turn: Turn | None = None

    @property
    def present(self) -> str:
        """Return the name of the output that is the next step's input."""
        return self.name.replace("past.", "present.", 1)

    def feeds(self, numbers: Array) -> dict[str, Array]:
        """Return the inputs that hold `numbers` [b, h, p, d]."""
        if not self.in_codes:
            return {self.name: numbers.astype(self.dtype)}
        wide = numbers.astype(np.float32)
        turned = wide if self.turn is None else wide @ self.turn.of_key
        scales = np.abs(turned).max(axis=-1, keepdims=True, initial=0.0) / np.float32(_LARGEST_CODE)
        scales = np.where(scales == 0, np.float32(1), scales).astype(self.dtype)
        codes = np.clip(np.rint(turned / scales.astype(np.float32)), -_LARGEST_CODE, _LARGEST_CODE)
        return {self.name: codes.astype(np.int8), self.name + SCALES: scales}

    def empty(self, batch: int) -> dict[str, Array]:
        """Return the inputs of an empty cache."""
        return self.feeds(np.zeros((batch, self.heads, 0, self.width), np.float32))

    def numbers(self, outputs: Mapping[str, Array]) -> Array:
        """Return the numbers of the output that is the next step's input."""
        stored = outputs[self.present]
        if not self.in_codes:
            return stored
        found: Array = stored.astype(np.float32) * outputs[self.present + SCALES].astype(np.float32)
        return found if self.turn is None else found @ self.turn.of_query.T


def cache_inputs(model: onnx_ir.Model) -> list[CacheInput]:
    """Return the keys and values that a decoder takes, in the order of its inputs.

    Raises:
        ModelError: If it takes codes of which the graph does not say how they are made.
    """
    decoder = decoder_of(model)
    known: dict[str | None, Turn | None] = {}
    for cache in int8_caches(model).values():
        known[cache.key.input.name] = cache.turn
        known[cache.value.input.name] = None
    found = []
    for value in model.graph.inputs:
        name, dims = value.name or "", dimensions(value) or []
        if not name.startswith("past.") or name.endswith(SCALES) or value.dtype is None:
            continue
        in_codes = value.dtype == onnx_ir.DataType.INT8
        if in_codes and name not in known:
            raise ModelError(f"input {name!r} holds int8, and no fused attention reads it with one scale per row")
        heads, width = (dims[1], dims[3]) if len(dims) == 4 else (None, None)
        heads = heads if isinstance(heads, int) else decoder.kv_heads
        width = width if isinstance(width, int) else decoder.head_dim
        dtype = decoder.dtype if in_codes else value.dtype
        found.append(CacheInput(name, heads, width, np.dtype(dtype.numpy()), in_codes, known.get(name)))
    return found


def empty_cache(model: onnx_ir.Model, batch: int = 1) -> dict[str, Array]:
    """Return the inputs of a decoder that hold the keys and values of no position yet.

    Raises:
        ModelError: If it takes codes of which the graph does not say how they are made.
    """
    return {name: array for cache in cache_inputs(model) for name, array in cache.empty(batch).items()}


def next_cache(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the cache outputs of a step as the inputs of the next one."""
    return {name.replace("present.", "past.", 1): value for name, value in outputs.items()}


def present_numbers(caches: Sequence[CacheInput], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the cache outputs of a step as numbers, by the names of the outputs."""
    return {cache.present: cache.numbers(outputs) for cache in caches if cache.present in outputs}
