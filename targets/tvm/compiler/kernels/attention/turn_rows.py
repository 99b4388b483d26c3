"""Emit the product of the rows of heads with one small matrix, which turns queries and keys."""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.machines import Isa

#: The number of vectors of a result that are held in registers at once.
_VECTORS = 8


def turn_rows(heads: int, head_dim: int, isa: Isa) -> Any:
    """Return a PrimFunc (x, m, y) with y = x · m for every head; x and y are f32[b, s, h, d], m is f32[d, d]."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        batch, length = emit.symbol("b"), emit.symbol("s")
        x = emit.argument("x", (batch, length, heads, head_dim))
        matrix = emit.argument("m", (head_dim, head_dim))
        y = emit.argument("y", (batch, length, heads, head_dim))

        def turn(row: Any) -> None:
            item, position = emit.bind(row // length), emit.bind(row % length)
            with T.serial(0, heads) as head:

                def columns(start: Any, span: int) -> None:
                    widths = [isa.lanes] * (span // isa.lanes) or [span]
                    sums = [emit.local(width) for width in widths]
                    for total, width in zip(sums, widths, strict=True):
                        emit.store(total, emit.spread(0.0, width), [0], width)
                    with T.serial(0, head_dim) as channel:
                        number = emit.bind(x[item, position, head, channel])
                        for index, (total, width) in enumerate(zip(sums, widths, strict=True)):
                            part = emit.load(matrix, [channel, start + index * isa.lanes], width)
                            added = emit.load(total, [0], width) + emit.spread(number, width) * part
                            emit.store(total, added, [0], width)
                    for index, (total, width) in enumerate(zip(sums, widths, strict=True)):
                        at = [item, position, head, start + index * isa.lanes]
                        emit.store(y, emit.load(total, [0], width), at, width)

                emit.each_span(head_dim, _VECTORS * isa.lanes, columns)

        with emit.root_block():
            emit.each_row(batch * length, heads * head_dim * head_dim, turn)
    return builder.get()
