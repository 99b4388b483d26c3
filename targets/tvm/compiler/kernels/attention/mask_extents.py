"""Emit the kernel that finds, for each block of query rows, which columns of a mask its rows can see.

It runs once per mask, and the attention of every layer uses the result to skip columns. Causality and padding are thus
found in the mask itself, however the graph has built it.
"""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.machines import Isa

#: The number of query positions per block: a multiple of the rows that attention computes at once.
QUERY_BLOCK = 48

#: A column whose mask value is this far below the largest of its row has weight 0. A row whose largest mask value is
#: not above -MASKED sees nothing.
MASKED = 3e4


def mask_extents(isa: Isa) -> Any:
    """Return a PrimFunc (mask f32[mb, 1, s, t], extents int32[mb, ceil(s / QUERY_BLOCK), 2]) that fills the extents.

    For each block, they are the first column that any of its rows sees, and one past the last. A block with a row that
    sees nothing gets all columns, because softmax spreads the weights of such a row over all of them.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    width = 4 * isa.lanes

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        masks, length, columns = emit.symbol("mb"), emit.symbol("s"), emit.symbol("t")
        blocks = (length + QUERY_BLOCK - 1) // QUERY_BLOCK
        mask = emit.argument("mask", (masks, 1, length, columns))
        extents = emit.argument("extents", (masks, blocks, 2), "int32")

        def largest(item: Any, row: Any) -> Any:
            most = emit.local(width)
            emit.store(most, emit.spread(float("-inf"), width), [0], width)

            def compare(start: Any, lanes: int) -> None:
                value = emit.load(mask, [item, 0, row, start], lanes)
                emit.store(most, T.max(emit.load(most, [0], lanes), value), [0], lanes)

            emit.each_span_of(columns, width, compare)
            return emit.bind(emit.fold_lanes(most, width, T.max))

        def widen(item: Any, row: Any, hidden: Any, first: Any, last: Any) -> None:
            """Widen `first` and `last`, in each lane, to the columns of `row` whose mask is above `hidden`."""

            def look(start: Any, lanes: int) -> None:
                column = emit.bind(emit.span(T.Cast("int32", start), lanes))
                visible = emit.load(mask, [item, 0, row, start], lanes) > emit.spread(hidden, lanes)
                low, high = emit.load(first, [0], lanes), emit.load(last, [0], lanes)
                end = column + emit.spread(T.int32(1), lanes)
                emit.store(first, T.Select(visible, T.min(low, column), low), [0], lanes)
                emit.store(last, T.Select(visible, T.max(high, end), high), [0], lanes)

            emit.each_span_of(columns, width, look)

        def measure(index: Any) -> None:
            item, block = emit.bind(index // blocks), emit.bind(index % blocks)
            first, last = emit.local(width, dtype="int32"), emit.local(width, dtype="int32")
            count = emit.bind(T.Cast("int32", columns))
            emit.store(first, emit.spread(count, width), [0], width)
            emit.store(last, emit.spread(T.int32(0), width), [0], width)
            with T.serial(0, T.min(QUERY_BLOCK, length - block * QUERY_BLOCK)) as step:
                row = emit.bind(block * QUERY_BLOCK + step)
                most = largest(item, row)
                with T.If(most > T.float32(-MASKED)):
                    with T.Then():
                        widen(item, row, emit.bind(most - T.float32(MASKED)), first, last)
                    with T.Else():
                        T.buffer_store(first, T.int32(0), [0])
                        T.buffer_store(last, count, [0])
            T.buffer_store(extents, emit.fold_lanes(first, width, T.min), [item, block, 0])
            T.buffer_store(extents, emit.fold_lanes(last, width, T.max), [item, block, 1])

        with emit.root_block():
            emit.each_row(masks * blocks, QUERY_BLOCK * columns, measure)
    return builder.get()
