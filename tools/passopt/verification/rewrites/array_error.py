"""Measure how far what a graph computes may differ: arrays of numbers, strings and complex numbers, and sequences."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from passopt.ir.relative_error import rewrite_error

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


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
