"""Lower fused attentions with the KV cache in place.

New keys and values are written into the cache, and one kernel reads the whole cache. Without a cache in place, which is
a fallback that the user must allow, past and new keys are concatenated at every step and small operators do the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.attention.fused import ATTENTION, AttentionParts, find_attention
from passopt.ir.attention.int8_cache import Int8Cache, Turn
from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.targets.tvm.compiler.kernels.attention.attention import attention
from passopt.targets.tvm.compiler.kernels.attention.cache import append_cache, append_codes
from passopt.targets.tvm.compiler.kernels.attention.mask_extents import QUERY_BLOCK, mask_extents
from passopt.targets.tvm.compiler.kernels.attention.turn_rows import turn_rows
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import CacheSlot, Length, Tvm, Unsupported, Values, product
from passopt.targets.tvm.machines import Isa


@lowers(ATTENTION)
@lowers(ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, domain=DOMAIN)
def fused_attention(at: Values, node: onnx_ir.Node) -> None:
    """Lower a fused attention, with its cache in place if there is one; raise Unsupported if it returns scores."""
    parts = find_attention(node)
    if parts is None or len(node.outputs) > 3:
        raise Unsupported("attention that returns its scores as a fourth output")
    slot = at.cache.slots.get(parts.past_key) if at.cache is not None and parts.past_key is not None else None
    if slot is None:
        joined_attention(at, node, parts)
        return
    in_place_attention(at, node, parts, slot)


def in_place_refusal(node: onnx_ir.Node) -> str | None:
    """Return the reason why a node cannot keep its cache in place, or None if it can."""
    parts = find_attention(node)
    if parts is None or len(node.outputs) > 3:
        return "attention that returns its scores as a fourth output"
    shape = parts.mask.shape if parts.mask is not None else None
    if shape is not None and len(shape) == 4 and shape[1] != 1:
        return f"its mask has shape {shape}: the kernel takes one for all heads"
    return None


def plain_parts(parts: AttentionParts, cache: Int8Cache) -> AttentionParts:
    """Return the operands of an attention over a cache in 8 bits before they are turned and quantised."""
    query, key = (parts.query, cache.key.rows) if cache.turn is None else (cache.turn.query, cache.turn.key)
    return dataclasses.replace(parts, query=query, key=key, value=cache.value.rows)


def int8_attention(at: Values, node: onnx_ir.Node, parts: AttentionParts, cache: Int8Cache) -> None:
    """Lower an attention over a cache in 8 bits, whose kernels quantise new rows, and read codes as bytes."""
    assert at.cache is not None
    slot = at.cache.slots[cache.key.past]
    in_place_attention(at, node, plain_parts(parts, cache), slot, cache.turn)


def in_place_attention(
    at: Values, node: onnx_ir.Node, parts: AttentionParts, slot: CacheSlot, turn: Turn | None = None
) -> None:
    """Lower an attention that appends to the cache and then reads it.

    The `present` outputs are the cache itself and get no tensor, so nothing else may read them. Queries and keys are
    turned first if there is a `turn`.
    """
    from tvm import relax

    assert at.cache is not None
    query, isa, past = _by_position(at, parts.query, node, "q_num_heads"), at.machine.isa, at.cache.past
    dims = at.shape_of(query)
    heads, width = dims[2], dims[3]
    kv_heads = at.shape_of(slot.key)[1]
    new = [_by_position(at, value, node, "kv_num_heads") for value in (parts.key, parts.value)]
    if turn is not None:
        query, new[0] = _turned(at, query, turn.of_query), _turned(at, new[0], turn.of_key)
    appending, make_appending = _appending(kv_heads, width, slot.dtype, isa)
    cache = at.emit(
        relax.op.call_tir_inplace(
            at.function(appending, make_appending),
            [*new, *slot.tensors, past],
            inplace_indices=[2 + index for index in range(len(slot.tensors))],
            out_ty=[tensor.ty for tensor in slot.tensors],
        )
    )
    held = [at.emit(cache[index]) for index in range(len(slot.tensors))]
    mask = _mask(at, node, parts.mask, dims[1], past + dims[1])
    extents = at.once(("extents", mask), lambda: _extents(at, mask))
    scale = _scale(node, width)
    softcap = float(attribute(node, "softcap", 0.0))
    bias = [] if parts.slopes is None else [_slopes(at, parts.slopes, heads), at.tensor(parts.positions)]
    name = f"attention_{heads}_{kv_heads}_{width}_{slot.dtype}_{scale:.9g}" + ("_alibi" if bias else "")
    name = (name + (f"_cap{softcap:g}" if softcap else "")).replace(".", "_").replace("-", "_")
    alibi = bool(bias)
    arguments = [query, *held, mask, extents, *bias]

    def make() -> Tvm:
        return attention(heads, kv_heads, width, scale, slot.dtype, isa, alibi, softcap)

    _set_result(at, node, parts, at.call(name, make, arguments, dims))
    at.note(f"attention: {name}")


def _appending(kv_heads: int, width: int, dtype: str, isa: Isa) -> tuple[str, Callable[[], Tvm]]:
    """Return the name of the kernel that appends to a cache of `dtype`, and the function that makes it."""
    name = f"append_cache_{kv_heads}_{width}_{dtype}"
    if dtype == "int8":
        return name, lambda: append_codes(kv_heads, width, isa)
    return name, lambda: append_cache(kv_heads, width, dtype, isa)


def _turned(at: Values, rows: Tvm, matrix: np.ndarray[Any, np.dtype[Any]]) -> Tvm:
    """Return rows [b, s, h, d] times a matrix [d, d]."""
    dims, isa = at.shape_of(rows), at.machine.isa
    heads, width = dims[2], dims[3]
    held = at.once(("turn", matrix.tobytes()), lambda: at.literal(matrix))
    return at.call(f"turn_rows_{heads}_{width}", lambda: turn_rows(heads, width, isa), [rows, held], dims)


def _by_position(at: Values, value: onnx_ir.Value, node: onnx_ir.Node, heads: str) -> Tvm:
    """Return a value as [b, s, h, d].

    The value is [b, h, s, d], or [b, s, h·d] with the number of heads in the attribute called `heads`.
    """
    if at.has_heads(value) or len(at.shape(value)) == 4:
        return at.heads(value)
    count, dims = attribute(node, heads, 0), at.shape(value)
    if len(dims) != 3 or not count or not isinstance(dims[2], int):
        raise Unsupported(f"attention over {len(dims)} axes with {heads} {count}")
    return at.view(at.tensor(value), [*dims[:2], count, dims[2] // count])


def _set_result(at: Values, node: onnx_ir.Node, parts: AttentionParts, result: Tvm) -> None:
    """Set the output from `result` [b, s, h, d], in the form that the query has."""
    if at.has_heads(parts.query) or len(at.shape(parts.query)) == 4:
        at.set_heads(node.outputs[0], result)
        return
    dims = at.shape_of(result)
    at.set(node.outputs[0], at.view(result, [*dims[:2], product(dims[2:])]))


def _scale(node: onnx_ir.Node, width: int) -> float:
    found = attribute(node, "scale", None)
    return float(found) if found is not None else width**-0.5


def _slopes(at: Values, slopes: onnx_ir.Value, heads: int) -> Tvm:

    return at.view(at.tensor(slopes), [heads])


def _extents(at: Values, mask: Tvm) -> Tvm:
    from tvm import relax

    dims, isa = at.shape_of(mask), at.machine.isa
    blocks = (dims[2] + QUERY_BLOCK - 1) // QUERY_BLOCK
    if dims[1] != 1:
        raise Unsupported("a mask per head")
    kind = relax.TensorType([dims[0], blocks, 2], "int32")
    return at.call_typed("mask_extents", lambda: mask_extents(isa), [mask], kind)


def _mask(at: Values, node: onnx_ir.Node, mask: onnx_ir.Value | None, rows: Length, columns: Length) -> Tvm:
    """Return the tensor [1 or b, 1 or h, s, t] that is added to the scores, made once for all layers that share it."""
    causal = bool(attribute(node, "is_causal", 0))
    given = None if mask is None else at.tensor(mask)
    return at.once(("mask", given, causal), lambda: _additive(at, given, causal, rows, columns))


def _additive(at: Values, given: Tvm, causal: bool, rows: Length, columns: Length) -> Tvm:
    from tvm import relax

    found = None
    if given is not None:
        found = given
        if str(given.ty.dtype) == "bool":
            found = _masked(at, given)
        dims = at.shape_of(found)
        found = at.view(found, [*[1] * (4 - len(dims)), *dims])
        dims = at.shape_of(found)
        for length, wanted in ((dims[2], rows), (dims[3], columns)):
            if not at.equal(length, wanted) and not (isinstance(length, int) and length == 1):
                raise Unsupported(f"a mask [.., {dims[2]}, {dims[3]}] over scores [.., {rows}, {columns}]")
        if not at.equal(dims[2], rows) or not at.equal(dims[3], columns):
            found = at.emit(relax.op.broadcast_to(found, [*dims[:2], rows, columns]))
    if causal:
        past = columns - rows
        own = at.emit(relax.op.expand_dims(at.emit(relax.op.arange(past, past + rows, 1, "int64")), [1]))
        seen = at.emit(relax.op.less_equal(at.emit(relax.op.arange(0, columns, 1, "int64")), own))
        bias = at.emit(relax.op.reshape(_masked(at, seen), [1, 1, rows, columns]))
        found = bias if found is None else at.emit(relax.op.add(found, bias))
    return found if found is not None else at.emit(relax.op.zeros([1, 1, rows, columns], "float32"))


def _masked(at: Values, seen: Tvm) -> Tvm:
    from tvm import relax

    zero, hidden = at.literal(np.zeros((), np.float32)), at.literal(np.full((), -np.inf, np.float32))
    return at.emit(relax.op.where(seen, zero, hidden))


def joined_attention(at: Values, node: onnx_ir.Node, parts: AttentionParts) -> None:
    """Lower an attention to small operators, with past and new keys and values concatenated.

    It is slow, and used only if the user allows fallbacks.
    """
    from tvm import relax

    op = relax.op
    names = ("q_num_heads", "kv_num_heads", "kv_num_heads")
    query, key, value = (
        at.emit(op.permute_dims(_by_position(at, item, node, name), [0, 2, 1, 3]))
        for item, name in zip((parts.query, parts.key, parts.value), names, strict=True)
    )
    for position, past in ((1, parts.past_key), (2, parts.past_value)):
        if past is None:
            continue
        joined = at.emit(op.concat([at.tensor(past), key if position == 1 else value], 2))
        at.set(node.outputs[position], joined)
        key, value = (joined, value) if position == 1 else (key, joined)
    dims = at.shape_of(query)
    groups = dims[1] // at.shape_of(key)[1]
    if groups > 1:
        key, value = (at.emit(op.repeat(item, groups, 1)) for item in (key, value))
    scale = at.literal(np.asarray(_scale(node, dims[3]), np.float32))
    scores = at.emit(op.multiply(at.emit(op.matmul(query, at.emit(op.permute_dims(key, [0, 1, 3, 2])))), scale))
    softcap = float(attribute(node, "softcap", 0.0))
    if softcap:
        cap = at.literal(np.asarray(softcap, np.float32))
        scores = at.emit(op.multiply(at.emit(op.tanh(at.emit(op.divide(scores, cap)))), cap))
    columns = at.shape_of(key)[2]
    if parts.slopes is not None:
        places = at.emit(op.expand_dims(at.tensor(parts.positions), [1, 2]))
        slopes = at.emit(op.reshape(at.tensor(parts.slopes), [1, dims[1], 1, 1]))
        scores = at.emit(op.add(scores, at.emit(op.multiply(slopes, places))))
    scores = at.emit(op.add(scores, _mask(at, node, parts.mask, dims[2], columns)))
    weights = at.emit(op.nn.softmax(scores, -1))
    result = at.emit(op.matmul(weights, value))
    _set_result(at, node, parts, at.emit(op.permute_dims(result, [0, 2, 1, 3])))
