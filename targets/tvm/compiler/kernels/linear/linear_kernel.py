"""Describe how one linear layer is computed: by which kernel, and with its weights in which layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.ir.weights.expressions import Expression
from passopt.targets.tvm.compiled_folder import Quantized


@dataclasses.dataclass(frozen=True)
class LinearKernel:
    """The kernel and the weights of one linear layer, y[M, N] = x[M, K] · Wᵀ.

    The number of rows M is known only when the kernel runs.
    """

    #: The kernel's name in the library; equal names mean equal functions.
    name: str
    #: The weights in the order of the kernel's arguments: the suffix of the name, and the layout as an expression.
    weights: tuple[tuple[str, Expression], ...]
    #: The function that returns the PrimFunc; its argument says whether a residual is added.
    make: Callable[[bool], Any]
    #: The parts of the layer that are int8.
    quantized: Quantized = "none"

    def function(self, *, residual: bool = False) -> Any:
        """Return the PrimFunc (x, *weights, y f32[M, N]), where x is f32[M, K].

        With `residual`, there is another argument f32[M, N] before y, which is added. If the activations are quantised,
        codes and scales take the place of x, as `int8_int8_kernel` says.
        """
        return self.make(residual)
