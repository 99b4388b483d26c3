"""Measure the input of linears: largest magnitudes by channel, of weights too, and percentiles of all."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

PERCENTILES = (99.0, 99.9, 99.99)
#: Magnitudes are counted by the upper bits of fp32: sign, exponent and 7 bits of the fraction, so within 1 %.
_SHIFT = 16


#: The numbers that are looked at together, so that they stay in a core's cache.
_CHUNK = 1 << 17


def check_finite(rows: Array, first: int, name: str) -> None:
    """Raise ModelError if rows [n, width] hold NaN or infinity.

    Args:
        rows: The rows.
        first: The number of the first one.
        name: What they are, for the message.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum()) or np.isfinite(rows).all():
            return
    row, channel = (int(place[0]) for place in np.nonzero(~np.isfinite(rows)))
    raise ModelError(
        f"{name}: NaN or infinity in channel {channel} of token {first + row}; the model computes no numbers there. "
        f"Export it with dtype=fp32, or check the weights"
    )


class InputSummary:
    """What was seen of a value [.., width]; the result does not depend on how it arrives in chunks.

    Attributes:
        rows: How many rows were added.
        absmax: The largest magnitude of each channel.
    """

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.absmax: Array = np.zeros(width, np.float32)
        self._counts: Array = np.zeros(1 << (32 - _SHIFT - 1), np.int64)

    def add(self, rows: Array, name: str) -> None:
        """Add rows [n, width].

        Args:
            rows: The rows, in any float dtype.
            name: What they are, for the message.

        Raises:
            ModelError: If they hold NaN or infinity.
        """
        wide = np.ascontiguousarray(rows, np.float32)
        check_finite(wide, self.rows, name)
        self.rows += len(wide)
        step = max(_CHUNK // wide.shape[1], 1)
        for start in range(0, len(wide), step):
            part = wide[start : start + step]
            np.maximum(self.absmax, np.maximum(part.max(axis=0), -part.min(axis=0)), out=self.absmax)
            words = (part.view(np.uint32).reshape(-1) >> _SHIFT) & (len(self._counts) - 1)
            self._counts += np.bincount(words, minlength=len(self._counts))

    def percentiles(self) -> dict[str, float]:
        """Return percentiles of all magnitudes, within 1 %."""
        total = int(self._counts.sum())
        if not total:
            return {}
        reached = np.cumsum(self._counts)
        bins = [int(np.searchsorted(reached, np.ceil(total * share / 100))) for share in PERCENTILES]
        edges = np.array([(place + 1 << _SHIFT) - 1 for place in bins], np.uint32).view(np.float32)
        return {f"{share:g}": float(f"{edge:.6g}") for share, edge in zip(PERCENTILES, edges, strict=True)}


def column_absmax(weight: Expression) -> Array:
    """Return the largest magnitude of each column of a weight [n, k], as fp32 [k], reading it in chunks of rows."""
    largest: Array = np.zeros(weight.shape[1], np.float32)
    with Evaluator() as evaluator:
        for rows in evaluator.chunks(weight):
            np.maximum(largest, np.abs(rows.astype(np.float32)).max(axis=0, initial=0), out=largest)
    return largest
