"""Kernels that compute one row after the other, such as norms: a row goes to memory, or on to `quantize_rows`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from passopt.targets.tvm.compiler.kernels import emit

#: `write(start, value, lanes)`: fp32 results from column `start` on.
Write = Callable[[Any, Any, int], None]


class ComputedRows(Protocol):
    """How rows f32[M, width] come from the arguments of a kernel."""

    @property
    def name(self) -> str:
        """In the names of kernels; the same name means the same rows."""

    @property
    def width(self) -> int: ...

    def arguments(self, rows: Any) -> tuple[Any, ...]:
        """Declares the tensor arguments that are read; `rows` is M."""

    def emit_row(self, arguments: tuple[Any, ...], row: Any, write: Write) -> None:
        """Emits one row, each of its columns once and in order."""


def rows_kernel(computed: ComputedRows) -> Any:
    """PrimFunc (*arguments, y f32[M, width])."""
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
