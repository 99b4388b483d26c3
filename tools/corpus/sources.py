"""Gather the cases of all sources: ONNX's backend models, and what other generators and packages add."""

from __future__ import annotations

from cases import Case, backend_cases


def all_cases() -> list[Case]:
    """Return all cases that can be had here, in a fixed order."""
    return backend_cases()
