"""Emit RotaryEmbedding on [b, s, h, d]: pairs of channels are rotated by the angle of their position."""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.machines import Isa


def rotary(heads: int, head_dim: int, rotary_dim: int, interleaved: bool, isa: Isa) -> Any:
    """Return a PrimFunc (x, cos, sin, y) that rotates the first `rotary_dim` channels of x and copies the others to y.

    x and y are f32[b, s, heads, head_dim]; cos and sin are f32[cb, s, rotary_dim / 2], where cb is 1 or b. Channel i is
    rotated together with channel i + rotary_dim / 2, or channel 2i with 2i + 1 if `interleaved`.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    half = rotary_dim // 2

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        batch, length, angles = emit.symbol("b"), emit.symbol("s"), emit.symbol("cb")
        x = emit.argument("x", (batch, length, heads, head_dim))
        cos = emit.argument("cos", (angles, length, half))
        sin = emit.argument("sin", (angles, length, half))
        y = emit.argument("y", (batch, length, heads, head_dim))

        def turn(row: Any) -> None:
            item, position = emit.bind(row // length), emit.bind(row % length)
            angle = emit.bind(T.min(item, angles - 1))
            with T.serial(0, heads) as head:

                def pairs(start: Any, lanes: int) -> None:
                    stride, offset = (2, 1) if interleaved else (1, half)
                    first = emit.span(start * stride, lanes, stride)
                    second = emit.span(start * stride + offset, lanes, stride)
                    real = emit.bind(x[item, position, head, first])
                    imaginary = emit.bind(x[item, position, head, second])
                    c = emit.bind(emit.load(cos, [angle, position, start], lanes))
                    s = emit.bind(emit.load(sin, [angle, position, start], lanes))
                    T.buffer_store(y, real * c - imaginary * s, [item, position, head, first])
                    T.buffer_store(y, real * s + imaginary * c, [item, position, head, second])

                def copy(start: Any, lanes: int) -> None:
                    at = (item, position, head, start + rotary_dim)
                    emit.store(y, emit.load(x, at, lanes), at, lanes)

                emit.each_span(half, isa.lanes, pairs)
                emit.each_span(head_dim - rotary_dim, isa.lanes, copy)

        with emit.root_block():
            emit.each_row(batch * length, heads * head_dim, turn)
    return builder.get()
