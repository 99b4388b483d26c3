"""Emit RMSNormalization over the last axis: y = x / sqrt(mean(x²) + ε) · w, with the sum in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.computed_rows import Write
from passopt.targets.tvm.machines import Isa


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """Compute rows y f32[M, width] from x f32[M, width] and w [width], whose dtype is `weight_dtype`."""

    width: int
    weight_dtype: str
    epsilon: float
    isa: Isa

    @property
    def name(self) -> str:
        """Return the name for kernels, which tells width, weight dtype and epsilon."""
        epsilon = f"{self.epsilon:g}".replace("-", "_").replace(".", "_")
        return f"rms_norm_{self.width}_{self.weight_dtype}_{epsilon}"

    def arguments(self, rows: Any) -> tuple[Any, ...]:
        """Declare x and w."""
        return emit.argument("x", (rows, self.width)), emit.argument("w", (self.width,), self.weight_dtype)

    def emit_row(self, arguments: tuple[Any, ...], row: Any, write: Write) -> None:
        """Emit the code of one row, in two passes over it: the sum of squares, then the scaled numbers."""
        from tvm.script.ir_builder import tirx as T

        x, w = arguments
        lanes_at_once = 4 * self.isa.lanes  # Four independent sums hide the latency of addition.
        squares = emit.local(lanes_at_once)
        emit.store(squares, emit.spread(0.0, lanes_at_once), [0], lanes_at_once)

        def add_squares(start: Any, lanes: int) -> None:
            value = emit.bind(emit.load(x, [row, start], lanes))
            emit.store(squares, emit.load(squares, [0], lanes) + value * value, [0], lanes)

        emit.each_span(self.width, lanes_at_once, add_squares)
        total = emit.fold_lanes(squares, lanes_at_once, lambda one, other: one + other)
        factor = emit.bind(T.float32(1) / T.sqrt(total * T.float32(1 / self.width) + T.float32(self.epsilon)))

        def scale(start: Any, lanes: int) -> None:
            scaled = emit.load(x, [row, start], lanes) * emit.spread(factor, lanes)
            write(start, scaled * emit.load_float32(w, [start], lanes, self.isa), lanes)

        emit.each_span(self.width, lanes_at_once, scale)
