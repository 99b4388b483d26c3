"""Measure the slopes of a class's own ALiBi mask at the lengths that the model has, before a formula takes its place.

The formula is slope × column, with −inf above the diagonal. A constant per row does not matter to attention, since its
softmax takes it away. Masks are gigabytes at full length, so the class builds a few of their rows where it can.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from passopt.ir.errors import ModelError
from passopt.ir.graph.alibi import alibi_slopes

#: The largest mask that is built whole, in bytes, and how often a class holds it while it builds it.
_WHOLE_BYTES, _COPIES = 2 << 30, 4
#: Below this a position is hidden: −inf, or the smallest number of a dtype (fp16 has −65504).
_HIDDEN = -6e4
#: The allowed relative difference from slope × column; fp32 has 6e-8.
_TOLERANCE = 2e-6

Slopes = np.ndarray[Any, np.dtype[np.float32]]
Mask = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class StockAlibi:
    """The slopes `[heads]` of a class in fp32, and up to how many positions it has them; None if there is no end."""

    slopes: Slopes
    longest: int | None


def measure(make: Callable[[], Any], numbers: Iterable[int], subject: str) -> StockAlibi:
    """Return the slopes of a decoder body whose `get_alibi_mask(embeddings, length)` returns `[heads, rows, length]`.

    Args:
        make: Makes an untouched body with `n_head` heads and `max_cache_pos` positions; it keeps the masks it builds.
        numbers: Numbers of the configuration, around which lengths are looked at.
        subject: The class, for error messages.

    Raises:
        ModelError: If the mask is not slope × column up to a constant per row, or if slopes depend on the length.
    """
    masks = _Masks(make, subject)
    heads, positions = masks.heads, masks.positions
    measured = _slopes(masks, positions, subject)
    formula = alibi_slopes(heads)
    slopes = formula if np.allclose(measured, formula, rtol=_TOLERANCE, atol=0) else measured
    for length in _lengths(positions, numbers):
        # A class may also look at how many of the positions are new: one in a step of decoding, some in a chunk.
        for tokens in sorted({length, 1, length // 2})[::-1]:
            found = _differing(slopes, _slopes(masks, length, subject, tokens))
            if found is not None:
                cause = "the length" if tokens == length else "the number of new tokens"
                behind = "" if tokens == length else f", {tokens} of them new"
                raise ModelError(
                    f"{subject} has ALiBi slopes that depend on {cause}: {found} at {length} positions of "
                    f"{positions}{behind}. A graph has one slope per head; export code whose slopes are fixed."
                )
    beyond = _slopes(masks, positions + max(1, positions // 8), subject)
    return StockAlibi(slopes, None if _differing(slopes, beyond) is None else positions)


def _lengths(positions: int, numbers: Iterable[int]) -> Iterator[int]:
    """Yield the lengths to look at, the longest first: around powers of two and numbers of the configuration."""
    marks = {positions, *numbers, *(1 << power for power in range(1, 24))}
    yield from sorted({mark + shift for mark in marks for shift in (-1, 0, 1) if 2 <= mark + shift <= positions})[::-1]


def _differing(slopes: Slopes, found: Slopes) -> str | None:
    """Return the first slope that differs, in words, or None."""
    wrong = ~np.isclose(found, slopes, rtol=_TOLERANCE, atol=0)
    if not wrong.any():
        return None
    head = int(wrong.argmax())
    return f"head {head} has {found[head]:.6g} instead of {slopes[head]:.6g}"


class _Masks:
    """The masks of a body, as the class builds them, or some rows of them."""

    def __init__(self, make: Callable[[], Any], subject: str) -> None:
        self._make, self._subject = make, subject
        self._body, self._cuts = make(), True
        self.heads, self.positions = int(self._body.n_head), int(self._body.max_cache_pos)

    def mask(self, length: int, tokens: int) -> Mask:
        """Return the mask for `length` positions, of which `tokens` are new: `[heads, rows, length]`."""
        with torch.no_grad():
            try:
                with _SomeRows() if self._cuts else contextlib.nullcontext():
                    mask = self._built(length, tokens)
            except RuntimeError:
                if not self._cuts:
                    raise
                # The class combines the causal mask with something of its own, and misses rows.
                self._body, self._cuts = self._make(), False
                mask = self._built(length, tokens)
        expected = f"[{self.heads}, rows, {length}]"
        if not isinstance(mask, torch.Tensor):
            raise ModelError(f"{self._subject} has an ALiBi mask that is a {type(mask).__name__}, expected {expected}")
        if mask.ndim != 3 or mask.shape[0] != self.heads or mask.shape[2] != length:
            raise ModelError(f"{self._subject} has an ALiBi mask of shape {list(mask.shape)}, expected {expected}")
        return mask.float().numpy()

    def _built(self, length: int, tokens: int) -> Any:
        largest = max(length, self.positions)
        if not self._cuts and (needed := 4 * self.heads * largest**2 * _COPIES) > _WHOLE_BYTES:
            raise ModelError(
                f"{self._subject} has an ALiBi mask that cannot be compared with the formula: it takes "
                f"{needed / 2**30:.1f} GiB to build for {largest} positions. Set fewer in config.json "
                f"(model_max_length)."
            )
        return self._body.get_alibi_mask(torch.zeros(1, tokens, 1), length)


def _slopes(masks: _Masks, length: int, subject: str, tokens: int | None = None) -> Slopes:
    """Return the slopes of the mask for `length` positions, after comparing the mask with slope × column.

    Of the positions `tokens` are new; None for all.
    """
    mask = masks.mask(length, tokens or length)
    columns = np.arange(length)
    visible = mask > _HIDDEN
    last = visible.sum(-1) - 1
    # The rows may have been cut from a mask for all positions, from one for this length, or not at all.
    known = [_rows(masks.positions), _rows(length), np.arange(max(masks.positions, length))]
    known += [] if tokens is None else [rows[:length][-tokens:] for rows in known]
    expected_last = [np.minimum(rows[: mask.shape[1]], length - 1).tolist() for rows in known]
    if (visible != (columns <= last[..., None])).any() or any(row not in expected_last for row in last.tolist()):
        raise ModelError(f"{subject} has an ALiBi mask that hides other positions than the later ones")
    slopes = _slope(mask, last[0])
    expected = slopes[:, None, None] * columns.astype(np.float32)
    size = np.maximum(np.abs(expected), np.abs(mask[..., :1]))
    wrong = visible & (np.abs(mask - mask[..., :1] - expected) > _TOLERANCE * size)
    if wrong.any():
        head, row, column = (int(index) for index in np.argwhere(wrong)[0])
        raise ModelError(
            f"{subject} has an ALiBi mask that is not slope × column: at {length} positions, head {head} adds "
            f"{mask[head, row, column] - mask[head, row, 0]:.6g} to column {column}, and {slopes[head]:.6g} to column 1"
        )
    return slopes


def _slope(mask: Mask, last: np.ndarray[Any, Any]) -> Slopes:
    """Return the slopes over all that the second row sees, or the only one; `last` are the last columns seen.

    In a prefill these are two columns. Of a later row, a constant per row would round the difference of two columns.
    """
    row = min(1, mask.shape[1] - 1)
    slopes: Slopes = (mask[:, row, last[row]] - mask[:, row, 0]) / np.float32(last[row])
    return slopes


def _rows(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the rows that are looked at: the first ones, and some up to the last one."""
    ahead = {*range(8), length // 3, length // 2, length - 2, length - 1}
    return np.array(sorted(row for row in ahead if 0 <= row < length))


class _SomeRows(TorchFunctionMode):
    """A torch function mode in which a causal mask `[n, n]` has some of its rows only."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in {torch.triu, torch.Tensor.triu, torch.tril, torch.Tensor.tril} or result.ndim != 2:
            return result
        return result[torch.from_numpy(_rows(len(result)))] if result.shape[0] == result.shape[1] else result
