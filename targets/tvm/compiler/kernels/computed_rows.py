"""Define kernels that compute one row after the other, such as norms.

The rows either go to memory (`rows_kernel`) or are quantised at once (`quantize_rows.quantize_computed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from passopt.targets.tvm.compiler.kernels import emit

#: The type of `write(start, value, lanes)`, which takes `lanes` fp32 results for the columns from `start` on.
Write = Callable[[Any, Any, int], None]


class ComputedRows(Protocol):
    """A computation of rows f32[M, width] from the arguments of a kernel."""

    @property
    def name(self) -> str:
        """Return the name, which becomes part of kernel names; the same name must mean the same computation."""

    @property
    def width(self) -> int:
        """Return the number of columns of a row."""
        ...

    def arguments(self, rows: Any) -> tuple[Any, ...]:
        """Declare the tensor arguments that are read, and return them; `rows` is M."""

    def emit_row(self, arguments: tuple[Any, ...], row: Any, write: Write) -> None:
        """Emit the code of one row, which calls `write` for each column once and in order."""


def rows_kernel(computed: ComputedRows) -> Any:
    """Return a PrimFunc (*arguments of `computed`, y f32[M, width]) that writes the computed rows to y."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        rows = emit.symbol("M")
        arguments = computed.arguments(rows)
        y = emit.argument("y", (rows, computed.width))

        def one(row: Any) -> None:
            def write(start: Any, value: Any, lanes: int) -> None:
                emit.store(y, value, [row, start], lanes)

            computed.emit_row(arguments, row, write)

        with emit.root_block():
            emit.each_row(rows, computed.width, one)
    return builder.get()
