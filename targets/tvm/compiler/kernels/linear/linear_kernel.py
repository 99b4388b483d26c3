"""How one linear is computed: a kernel, and its weights laid out for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.ir.weights.expressions import Expression
from passopt.targets.tvm.compiled_folder import Quantized


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """How one linear is computed: y[M, N] = x[M, K] · Wᵀ, rows M unknown at compile."""

    #: The kernel's name in the library; equal names mean equal functions.
    name: str
    #: (suffix of the weight's name, expression) in the order of the kernel's arguments.
    weights: tuple[tuple[str, Expression], ...]
    make: Callable[[bool], Any]
    quantized: Quantized = "none"

    def function(self, *, residual: bool = False) -> Any:
        """The PrimFunc (x, *weights, y f32[M, N]); with `residual`, f32[M, N] before y that is added.

        x is f32[M, K], or what the plan's maker says.
        """
        return self.make(residual)
