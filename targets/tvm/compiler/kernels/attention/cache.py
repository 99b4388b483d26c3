"""Emit the kernel that appends new keys and values to the KV cache.

Keys lie as [b, h, B, d, 16] in B blocks, so that 16 positions of a channel are one vector; values lie as
[b, h, 16·B, d].
"""

from __future__ import annotations

from typing import Any

from passopt.targets.tvm.compiled_folder import BLOCK
from passopt.targets.tvm.compiler.kernels import emit
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
