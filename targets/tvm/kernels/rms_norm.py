"""RMSNormalization over the last axis: y = x / sqrt(mean(x²) + ε) · w, summed in fp32."""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.features import Isa
from passopt.targets.tvm.kernels import emit


def rms_norm(k: int, weight_dtype: str, epsilon: float, isa: Isa) -> Any:
    """PrimFunc (x f32[M, k], w weight_dtype[k], y f32[M, k])."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    width = 4 * isa.lanes  # four sums at once, since one would wait for itself

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        rows = emit.symbol("M")
        x = emit.argument("x", (rows, k))
        w = emit.argument("w", (k,), weight_dtype)
        y = emit.argument("y", (rows, k))

        def normalize(row: Any) -> None:
            squares = emit.local(width)
            emit.store(squares, emit.spread(0.0, width), [0], width)

            def add_squares(start: Any, lanes: int) -> None:
                value = emit.bind(emit.load(x, [row, start], lanes))
                emit.store(squares, emit.load(squares, [0], lanes) + value * value, [0], lanes)

            emit.each_span(k, width, add_squares)
            total = emit.fold_lanes(squares, width, lambda one, other: one + other)
            factor = emit.bind(T.float32(1) / T.sqrt(total * T.float32(1 / k) + T.float32(epsilon)))

            def scale(start: Any, lanes: int) -> None:
                scaled = emit.load(x, [row, start], lanes) * emit.spread(factor, lanes)
                emit.store(y, scaled * emit.load_float32(w, [start], lanes, isa), [row, start], lanes)

            emit.each_span(k, width, scale)

        with emit.root_block():
            emit.each_row(rows, k, normalize)
    return builder.get()
