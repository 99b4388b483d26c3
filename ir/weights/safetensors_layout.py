"""Lay out weights.safetensors so that it can be memory-mapped without a copy: tensors start at multiples of 64 bytes.

The format does not allow holes. So tensors whose size is no multiple of 64 bytes come last, each followed by a named U8
padding tensor.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping

from passopt.ir.weights import expressions as ex
from passopt.ir.weights.raw_bytes import stored
from passopt.ir.weights.sources import SAFETENSORS_NAMES

ALIGNMENT = 64
_PADDING_PREFIX = "__padding."
#: What transformers looks for in the files of a checkpoint.
_METADATA = {"__metadata__": {"format": "pt"}}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of the tensors in a file: `offsets` are bytes from its start, in file order; `nbytes` is its size."""

    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def layout_of(weights: Mapping[str, ex.Expression], *, plain: bool = False) -> Layout:
    """Return the layout of the file that `passopt.ir.weights.streaming` writes for these weights, without reading them.

    Args:
        weights: The tensors by name.
        plain: Lay the file out as checkpoints are: no padding tensors, and each tensor aligned to its own numbers only.

    Raises:
        ModelError: If a weight of a dtype that safetensors does not have is computed from others.
    """
    entries: dict[str, dict[str, object]] = {}
    position = 0

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal position
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes

    order = _by_itemsize if plain else _whole_lines_first
    for name in sorted(weights, key=lambda key: (*order(weights[key]), key)):
        weight = stored(weights[name], name)
        place(name, SAFETENSORS_NAMES[weight.dtype], weight.shape, weight.nbytes)
        if position % ALIGNMENT and not plain:
            place(f"{_PADDING_PREFIX}{len(entries)}", "U8", (-position % ALIGNMENT,), -position % ALIGNMENT)
    text = json.dumps({**_METADATA, **entries} if plain else entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    starts = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}  # type: ignore[index]
    offsets = {name: start for name, start in starts.items() if not name.startswith(_PADDING_PREFIX)}
    return Layout(header, offsets, len(header) + position)


def _whole_lines_first(weight: ex.Expression) -> tuple[int, ...]:
    return (int(weight.nbytes % ALIGNMENT != 0),)


def _by_itemsize(weight: ex.Expression) -> tuple[int, ...]:
    """Order tensors so that each begins at a multiple of the size of its numbers, without holes."""
    return (-int(weight.dtype.itemsize),)
