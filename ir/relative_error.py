"""Measure how far two arrays of numbers differ: max|difference| / max|reference|, by three rules for special values.

| function | for | values that are not finite |
| --- | --- | --- |
| `relative_error` | outputs of whole models | are always an infinite error |
| `operator_error` | outputs of single operators, such as a pass's test | are no error where both sides have the same |
| `rewrite_error` | both sides of a rewrite | NaN in the reference may become anything; masks must stay masks |
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from passopt.ir.dtypes import FLOATS, DataType

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The number of elements that are compared at a time.
_BLOCK = 1 << 20
#: Values beyond this fraction of a dtype's largest number only mean "masked".
_MASKED = 0.25


def relative_error(reference: Array, candidate: Array, where: Array | None = None) -> float:
    """Return max|difference| / max|reference| over the elements that `where` selects.

    `where` is a boolean array over the leading axes; None selects all. The result is infinite if the shapes differ or
    if a value is not finite, so NaN never passes.
    """
    if reference.shape != candidate.shape:
        return math.inf
    if where is not None:
        reference, candidate = reference[where], candidate[where]
    if not reference.size:
        return 0.0
    wide = np.float64 if reference.dtype == np.float64 else np.float32
    one: Array = reference.astype(wide)
    other: Array = candidate.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        difference, scale = float(np.abs(one - other).max()), float(np.abs(one).max())
    if not math.isfinite(difference) or not math.isfinite(scale):
        return math.inf
    if not difference:
        return 0.0
    return difference / scale if scale else math.inf


def operator_error(reference: Array, found: Array) -> float:
    """Return max|Δ| / max|reference|, 0 for two empty arrays.

    It is infinite where one of the two is not finite, unless both are NaN or the same infinity.
    """
    if not reference.size:
        return 0.0
    wide, other = reference.astype(np.float64), found.astype(np.float64)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, but only where both are the same and count as no difference
        difference = np.where(same, 0, wide - other)
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.max(np.abs(wide[np.isfinite(wide)]), initial=0.0)) or 1.0
    return float(np.max(np.abs(difference))) / scale


def rewrite_error(reference: Array, found: Array) -> float:
    """Return max|Δ| / max|reference|, infinite where a finite number became infinite or NaN.

    A NaN in the reference is undefined there and may become anything. Numbers near the dtype's largest only mean
    "masked": such a place must stay masked with the same sign, but its number may differ.
    """
    scale = difference = 0.0
    flat, other = reference.reshape(-1), found.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        largest, apart = _errors(flat[block], other[block])
        scale, difference = max(scale, largest), max(difference, apart)
    return difference / (scale or 1.0)


def _errors(reference: Array, found: Array) -> tuple[float, float]:
    """Return max|reference| and max|Δ| over the places where the reference is a number that does not mean "masked"."""
    masked = _masked(reference)
    wide, near = reference.astype(np.float64), found.astype(np.float64)
    defined = ~np.isnan(wide)
    if (masked != _masked(found))[defined].any():
        return 0.0, float("inf")
    plain = defined & (masked == 0)
    wide, near = wide[plain], near[plain]
    if not np.isfinite(near).all():
        return 0.0, float("inf")
    return float(np.max(np.abs(wide), initial=0.0)), float(np.max(np.abs(wide - near), initial=0.0))


def _masked(array: Array) -> Array:
    """Return -1 or 1 where a value stands for minus or plus infinity, and 0 elsewhere."""
    if DataType.from_numpy(array.dtype) not in FLOATS:
        return np.zeros(array.shape)
    limits: Any = ml_dtypes.finfo(array.dtype)  # type: ignore[no-untyped-call]
    wide = array.astype(np.float64)
    return np.where(np.abs(wide) >= _MASKED * float(limits.max), np.sign(wide), 0)
