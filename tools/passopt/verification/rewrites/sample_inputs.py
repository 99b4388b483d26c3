"""Draw seeded values for the leaves of a cut, in the range each needs: normal numbers, masks, positions or token ids.

Shapes: b is the batch, q the positions of this step, t = past + q. Padding stands on the left, as everywhere in
passopt.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.verification.rewrites.symbol_lengths import Lengths

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The bound of integers of unknown meaning, so small that they are valid indices even of the smallest tables in tests.
_SMALL = 3


class Sampler:
    """Draw the values of leaves by name; `indices` holds bounds of the integers that index a table, by name."""

    def __init__(self, lengths: Lengths, indices: Mapping[str, int], seed: int = 0) -> None:
        self.lengths = lengths
        self._indices = indices
        self._seed = seed

    def sample(self, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...]) -> Array:
        """Return a value for the leaf `name`, of the given dtype and shape."""
        if "mask" in name.lower():
            return self._mask(dtype, shape)
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        kind = dtype.numpy()
        if dtype in FLOATS:
            return self._activations(random, shape).astype(kind)
        if kind == np.bool_:
            return random.integers(0, 2, shape).astype(bool)
        if "position" in name.lower():
            return self._positions(shape).astype(kind)
        return np.asarray(random.integers(0, self._indices.get(name, _SMALL), shape)).astype(kind)

    def _activations(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Return normal numbers in rows along the last axis, each scaled down by up to the draw's number of decades."""
        values = random.standard_normal(shape, np.float32)
        if len(shape) > 1 and self.lengths.draw.decades:
            values *= np.float32(10) ** -random.uniform(0, self.lengths.draw.decades, (*shape[:-1], 1))
        return values

    def _padding(self, rows: int) -> Array:
        """Return the number of padded positions of each row, always fewer than there are positions."""
        wanted = np.resize(self.lengths.draw.padding, rows)
        result: Array = np.minimum(wanted, max(0, self.lengths.past + self.lengths.seq - 1))
        return result

    def _positions(self, shape: tuple[int, ...]) -> Array:
        """Return the index of each token among those that are not padding: [b, q], or [q] without padding."""
        columns = self.lengths.past + np.arange(shape[-1] if shape else 1)
        if len(shape) < 2:
            return columns.reshape(shape)
        counted = np.maximum(columns[None, :] - self._padding(shape[-2])[:, None], 0)
        return np.broadcast_to(counted, shape)

    def _mask(self, dtype: onnx_ir.DataType, shape: tuple[int, ...]) -> Array:
        """Return a mask of one of the two shapes that decoders use.

        [b, t] is 1 where a token stands. [b, 1, q, t] says what a query may see, as bool, as 1 and 0, or as numbers to
        add to the scores of attention.
        """
        total = shape[-1] if shape else 1
        tokens = np.arange(total) >= self._padding(shape[0] if len(shape) > 1 else 1)[:, None]
        if len(shape) < 3:
            return np.broadcast_to(tokens[0] if len(shape) < 2 else tokens, shape).astype(dtype.numpy())
        rows = np.arange(shape[-2])[:, None] + (total - shape[-2])
        causal = np.arange(total)[None, :] <= rows
        seen = tokens.reshape(-1, *(1,) * (len(shape) - 2), total) if shape[0] == len(tokens) else tokens[0]
        if dtype not in FLOATS:
            return np.broadcast_to(causal & seen, shape).astype(dtype.numpy())
        lowest: Any = ml_dtypes.finfo(dtype.numpy()).min  # type: ignore[no-untyped-call]
        additive = np.where(seen, np.where(causal, np.float64(0), -np.inf), np.float64(lowest))
        return np.broadcast_to(additive, shape).astype(dtype.numpy())


def index_bounds(nodes: Iterable[onnx_ir.Node], kept: Mapping[int, int]) -> dict[str, int]:
    """Return, by name, the bounds of the leaves that index a table directly.

    `kept` maps lengths that the cut shortens to their new length.
    """
    bounds: dict[str, int] = {}
    for node in nodes:
        if node.op_type not in {"Gather", "GatherElements", "GatherND"} or len(node.inputs) < 2:
            continue
        table, index = node.inputs[:2]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if table is None or index is None or table.shape is None or not len(table.shape):
            continue
        length = table.shape[axis]
        if isinstance(length, int):
            length = kept.get(length, length)
            name = index.name or ""
            bounds[name] = min(length, bounds.get(name, length))
    return bounds
