"""Emit SwiGLU, the gated activation of a feed-forward layer: y = gate · sigmoid(gate) · up."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.computed_rows import Write
from passopt.targets.tvm.machines import Isa


@dataclasses.dataclass(frozen=True)
class Swiglu:
    """Compute rows y f32[M, width] from gate f32[M, width] and up f32[M, width].

    The relative error is 1e-6 where gate > -88. Below that, y differs from 0 by 1e-36 at most.
    """

    width: int
    isa: Isa

    @property
    def name(self) -> str:
        """Return the name for kernels, which tells the width."""
        return f"swiglu_{self.width}"

    def arguments(self, rows: Any) -> tuple[Any, ...]:
        """Declare gate and up."""
        return tuple(emit.argument(name, (rows, self.width)) for name in ("gate", "up"))

    def emit_row(self, arguments: tuple[Any, ...], row: Any, write: Write) -> None:
        """Emit the code of one row."""
        gate, up = arguments

        def multiply(start: Any, lanes: int) -> None:
            value = emit.bind(emit.load(gate, [row, start], lanes))
            product = value * emit.load(up, [row, start], lanes)
            inverse = emit.spread(1.0, lanes) + emit.exp(emit.spread(0.0, lanes) - value, lanes)
            write(start, product / inverse, lanes)

        emit.each_span(self.width, 2 * self.isa.lanes, multiply)  # Two vectors at once hide the latency of exp.
