"""Emit the kernels that append new keys and values to the KV cache, as numbers or as codes with a scale per row.

Keys lie as [b, h, B, d, 16] in B blocks, so that 16 positions of a channel are one vector; values lie as
[b, h, 16·B, d].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels import emit
from passopt.targets.tvm.compiler.kernels.quantize_rows import ROUNDING, ROUNDING_BITS, absmax_bits
from passopt.targets.tvm.machines import Isa


def append_cache(kv_heads: int, head_dim: int, cache_dtype: str, isa: Isa) -> Any:
    """Return a PrimFunc (k, v, kc, vc, past) that appends keys k and values v to the caches kc and vc in place.

    k and v are f32[b, s, h, d]; kc is [b, h, B, d, 16] and vc is [b, h, 16·B, d], both in `cache_dtype`; past is an
    int64. It writes positions past … past + s - 1. The caller must make sure that they fit the cache.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        batch, length, blocks = emit.symbol("b"), emit.symbol("s"), emit.symbol("B")
        k = emit.argument("k", (batch, length, kv_heads, head_dim))
        v = emit.argument("v", (batch, length, kv_heads, head_dim))
        keys = emit.argument("kc", (batch, kv_heads, blocks, head_dim, BLOCK), cache_dtype)
        values = emit.argument("vc", (batch, kv_heads, blocks * BLOCK, head_dim), cache_dtype)
        past = T.arg("past", T.int64())

        def append(row: Any) -> None:
            item, head = emit.bind(row // kv_heads), emit.bind(row % kv_heads)
            with T.serial(0, length) as step:
                position = emit.bind(past + step)
                with T.serial(0, head_dim) as channel:
                    at = (item, head, position // BLOCK, channel, position % BLOCK)
                    emit.store_float32(keys, k[item, step, head, channel], at, 1)

                def copy(start: Any, lanes: int) -> None:
                    new = emit.load(v, [item, step, head, start], lanes)
                    emit.store_float32(values, new, [item, head, position, start], lanes)

                emit.each_span(head_dim, isa.lanes, copy)

        with emit.root_block():
            emit.each_row(batch * kv_heads, length * head_dim, append)
    return builder.get()


def append_codes(kv_heads: int, head_dim: int, isa: Isa) -> Any:
    """Return a PrimFunc (k, v, kc, vc, ks, vs, past) that appends keys and values as int8 codes, in place.

    k and v are f32[b, s, h, d]; kc is int8[b, h, B, d, 16] and vc int8[b, h, 16·B, d]; ks and vs are f32[b, h, 16·B].
    The scale of a row, which is one position of one head, is its largest magnitude / 127, or 1 if that is 0; a code is
    the number / scale, rounded half to even. It writes positions past … past + s - 1, as `append_cache` does.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True, is_private=True):
        T.func_attr(emit.FUNCTION_ATTRIBUTES)
        batch, length, blocks = emit.symbol("b"), emit.symbol("s"), emit.symbol("B")
        k = emit.argument("k", (batch, length, kv_heads, head_dim))
        v = emit.argument("v", (batch, length, kv_heads, head_dim))
        keys = emit.argument("kc", (batch, kv_heads, blocks, head_dim, BLOCK), "int8")
        values = emit.argument("vc", (batch, kv_heads, blocks * BLOCK, head_dim), "int8")
        key_scales = emit.argument("ks", (batch, kv_heads, blocks * BLOCK))
        value_scales = emit.argument("vs", (batch, kv_heads, blocks * BLOCK))
        past = T.arg("past", T.int64())

        def append(row: Any) -> None:
            item, head = emit.bind(row // kv_heads), emit.bind(row % kv_heads)
            held = emit.scratch(head_dim)
            with T.serial(0, length) as step:
                position = emit.bind(past + step)

                def key(start: Any, lanes: int) -> Any:
                    return emit.load(k, [item, step, head, start], lanes)

                def value(start: Any, lanes: int) -> Any:
                    return emit.load(v, [item, step, head, start], lanes)

                def keep(start: Any, code: Any, lanes: int) -> None:
                    emit.store(held, T.Cast(emit.typed("float32", lanes), code), [start], lanes)

                def store(start: Any, code: Any, lanes: int) -> None:
                    emit.store(values, T.Cast(emit.typed("int8", lanes), code), [item, head, position, start], lanes)

                T.buffer_store(key_scales, _quantize(key, keep, head_dim, isa), [item, head, position])
                with T.serial(0, head_dim) as channel:
                    at = [item, head, position // BLOCK, channel, position % BLOCK]
                    T.buffer_store(keys, T.Cast("int8", T.Cast("int32", held[channel])), at)
                T.buffer_store(value_scales, _quantize(value, store, head_dim, isa), [item, head, position])

        with emit.root_block():
            emit.each_row(batch * kv_heads, length * head_dim, append)
    return builder.get()


def _quantize(load: Callable[[Any, int], Any], store: Callable[[Any, Any, int], None], head_dim: int, isa: Isa) -> Any:
    """Emit the quantisation of a row, and return its scale; `store(start, codes, lanes)` takes codes as int32."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    quotient = emit.bind(T.reinterpret("float32", absmax_bits(load, head_dim, isa.lanes)) / T.float32(127))
    scale = emit.bind(tirx.Select(quotient == T.float32(0), T.float32(1), quotient))

    def write(start: Any, lanes: int) -> None:
        rounded = load(start, lanes) / emit.spread(scale, lanes) + emit.spread(ROUNDING, lanes)
        code = T.reinterpret(emit.typed("int32", lanes), rounded) - emit.spread(T.int32(ROUNDING_BITS), lanes)
        store(start, code, lanes)

    emit.each_span(head_dim, isa.lanes, write)
    return scale
