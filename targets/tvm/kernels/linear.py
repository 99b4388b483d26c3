"""Linears: which kernel computes one, and how its weights are laid out for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.ir.expressions import Expression


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """How one linear is computed: y[M, N] = x[M, K] · Wᵀ, rows M unknown at compile."""

    #: The kernel's name in the library; equal names mean equal functions.
    name: str
    #: (suffix of the weight's name, expression) in the order of the kernel's arguments.
    weights: tuple[tuple[str, Expression], ...]
    #: A PrimFunc: (x f32[M, K], *weights, y f32[M, N]).
    function: Any
