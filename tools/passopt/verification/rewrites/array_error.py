"""Measure how far what a graph computes may differ: arrays of numbers, strings and complex numbers, and sequences."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from passopt.ir.relative_error import rewrite_error

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: A quarter of the largest number of fp16.
_LARGE = 16376.0


def shape_problem(reference: Any, found: Any) -> str:
    """Return in words how the shapes differ, "" if they do not; sequences have the shapes of their tensors."""
    if reference is None or found is None:
        return "" if reference is found else "an optional value became empty, or came to be"
    if isinstance(reference, list) or isinstance(found, list):
        if not isinstance(reference, list) or not isinstance(found, list) or len(reference) != len(found):
            return "a sequence became one of another length, or no sequence"
        return next((text for both in zip(reference, found, strict=True) if (text := shape_problem(*both))), "")
    return "" if reference.shape == found.shape else f"shape {list(reference.shape)} became {list(found.shape)}"


def array_error(reference: Any, found: Any) -> float:
    """Return the error between two values of the same shape; strings are equal, or the error is infinite."""
    if reference is None:
        return 0.0
    if isinstance(reference, list):
        return max((array_error(*both) for both in zip(reference, found, strict=True)), default=0.0)
    if reference.dtype.kind in "OSU":
        return 0.0 if np.array_equal(reference, found) else float("inf")
    if reference.dtype.kind == "c":
        return max(rewrite_error(reference.real, found.real), rewrite_error(reference.imag, found.imag))
    if reference.dtype.kind in "iub" and found.dtype.kind in "iub":  # floats do not hold all integers
        return 0.0 if np.array_equal(reference, found) else max(rewrite_error(reference, found), 1e-12)
    return rewrite_error(reference, found)


def held_in_narrow(reference: Array, found: Array) -> tuple[Array, Array]:
    """Return both values of a lossy pass without the numbers that overflowed, since sampled inputs made them too large.

    These are places at which the result is not finite, and the original beyond a quarter of what fp16 holds.
    """
    if not isinstance(reference, np.ndarray) or reference.dtype.kind != "f" or reference.shape != found.shape:
        return reference, found
    if found.dtype.itemsize < reference.dtype.itemsize and found.dtype.kind == "f":
        found = found.astype(reference.dtype)  # else large numbers of fp16 would count as those that mean "masked"
    wide = reference.astype(np.float64)
    large = ~np.isfinite(found.astype(np.float64)) & (np.abs(wide) > _LARGE)
    if not large.any() or large.all():
        return reference, found
    return np.where(large, 0, reference).astype(reference.dtype), np.where(large, 0, found).astype(found.dtype)
