"""Define the sharding rules of fused operators: norms, rotary embedding, and attention, which is sharded by heads.

Attention takes queries [b, h, s, d] and keys [b, h_kv, t, d], or both as [b, s, h·d] with the numbers of heads as
attributes. A unit is a key-value head together with the query heads of its group; single query heads, which are finer
units, are made such groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from passopt.passes.sharding.axes import attribute_axis, ndim_of, products
from passopt.passes.sharding.placement import ONE, REPLICATED, Sharded, Spec
from passopt.passes.sharding.propagate import Backward, Conflict, Forward, Propagation

_HEADS = 1
_FLAT_HEADS = 2
_QUERY, _KEY, _VALUE = range(3)
#: The input numbers of the mask, which broadcasts over the scores [b, h, s, t], and of the past keys and values.
_MASK, _CACHE = 3, (4, 5)
_SLOPES, _POSITIONS, _ALIBI_MASK, _ALIBI_CACHE = 3, 4, 5, (6, 7)


def _norm(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    wanted = state.one_sharded([state.spec(node, 0)])
    if wanted is None:
        return [REPLICATED] * len(node.outputs)
    _norm_backward(state, node, wanted)
    return [wanted] * len(node.outputs)


def _norm_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand inputs that are sharded as the output; axes that the norm normalises over cannot be sharded.

    These are `axis` and all axes behind it.
    """
    first = attribute_axis(node, -1, ndim_of(node.inputs[0]))
    if wanted.axis >= first:
        raise Conflict(f"normalises over axes from {first} on, of which {wanted.axis} is {wanted}")
    for index in range(len(node.inputs)):
        state.demand_broadcast(node, index, wanted)


def _rotary(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    wanted = state.one_sharded([state.spec(node, 0)])
    if wanted is None:
        _demand_whole(state, node, range(1, len(node.inputs)), Sharded(-1, ONE, 1))
        return [REPLICATED]
    _rotary_backward(state, node, wanted)
    return [wanted]


def _rotary_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand data that is sharded by heads, and whole tables, since they depend on positions only."""
    flat = ndim_of(node.inputs[0]) == 3
    if wanted.axis != (_FLAT_HEADS if flat else _HEADS):
        raise Conflict(f"turns whole heads by their positions; expected sharded heads, found what is {wanted}")
    if flat:
        _shrink_heads(state, node, "num_heads", wanted)
    state.demand(node, 0, wanted)
    _demand_whole(state, node, range(1, len(node.inputs)), wanted)


def _attention(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    heads = _sharded_heads(state, node, _MASK, _CACHE)
    flat = ndim_of(node.inputs[_QUERY]) == 3
    if heads is None:
        return [REPLICATED] * len(node.outputs)
    if flat:
        _shrink_heads(state, node, "q_num_heads", heads)
        if node.attributes["kv_num_heads"].as_int() > 1:
            _shrink_heads(state, node, "kv_num_heads", heads)
    _demand_heads(state, node, heads, (_QUERY, _KEY, _VALUE, *_CACHE))
    _demand_broadcast(state, node, _MASK, heads)
    _demand_whole(state, node, (6,), heads)
    result = heads.at(_FLAT_HEADS) if flat else heads
    return [result, *_grown_cache(state, node, heads), heads][: len(node.outputs)]


def _alibi_attention(state: Propagation, node: onnx_ir.Node) -> list[Spec]:
    """Shard an AlibiAttention by heads, with its slopes [h, 1, 1]; slopes that are padded with zeros add no bias."""
    heads = _sharded_heads(state, node, _SLOPES, _ALIBI_CACHE)
    if heads is None:
        return [REPLICATED] * len(node.outputs)
    _demand_heads(state, node, heads, (_QUERY, _KEY, _VALUE, *_ALIBI_CACHE))
    _demand_broadcast(state, node, _SLOPES, heads)
    _demand_broadcast(state, node, _ALIBI_MASK, heads)
    _demand_whole(state, node, (_POSITIONS,), heads)
    return [heads, *_grown_cache(state, node, heads)][: len(node.outputs)]


def _sharded_heads(state: Propagation, node: onnx_ir.Node, broadcast: int, cache: Sequence[int]) -> Sharded | None:
    """Return how the heads are sharded, along axis 1, as queries, keys, values, cache, mask or slopes show it.

    Input number `broadcast` is the mask or the slopes. Raises Conflict if an input is sharded by anything but heads, or
    if they disagree.
    """
    found: list[Spec] = []
    for index in (_QUERY, _KEY, _VALUE, broadcast, *cache):
        if index >= len(node.inputs):
            continue
        spec = state.spec(node, index)
        if not isinstance(spec, Sharded):
            found.append(spec)
            continue
        axis = spec.axis + 4 - ndim_of(node.inputs[index])
        flat = index <= _VALUE and ndim_of(node.inputs[index]) == 3
        if spec.segments != ONE or (spec.axis != _FLAT_HEADS if flat else axis != _HEADS):
            raise Conflict(f"expected input {index} to be sharded by heads, found {spec}")
        found.append(spec.at(_HEADS))
    return state.one_sharded(found)


def _demand_heads(state: Propagation, node: onnx_ir.Node, heads: Sharded, indices: Sequence[int]) -> None:
    """Demand inputs that are sharded by heads; a single key-value head, which all query heads share, must be whole."""
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        if _is_single_head(node, index):
            state.demand_whole(node, index, heads)
            continue
        axis = _FLAT_HEADS if ndim_of(value) == 3 else _HEADS
        length = products(value)[axis]
        if length is not None and not length.symbols:
            state.divide_into(heads, length.number, "elements along its heads")
        state.demand(node, index, heads.at(axis))


def _is_single_head(node: onnx_ir.Node, index: int) -> bool:
    """Return True if input `index` holds one key-value head, which all query heads share."""
    value = node.inputs[index]
    if index == _QUERY or value is None:
        return False
    if ndim_of(value) == 3:
        return node.attributes["kv_num_heads"].as_int() == 1
    return products(value)[_HEADS] == ONE


def _grown_cache(state: Propagation, node: onnx_ir.Node, heads: Sharded) -> list[Spec]:
    """Return the specs of the present keys and values."""
    return [REPLICATED if _is_single_head(node, index) else heads for index in (_KEY, _VALUE)]


def _demand_broadcast(state: Propagation, node: onnx_ir.Node, index: int, heads: Sharded) -> None:
    """Demand an input that broadcasts over the scores [b, h, s, t]: sharded by heads if it has them, or else whole."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return
    axis = _HEADS - 4 + ndim_of(value)
    if axis >= 0 and products(value)[axis] != ONE:
        state.demand(node, index, heads.at(axis))
    else:
        state.demand_whole(node, index, heads.at(axis))


def _demand_whole(state: Propagation, node: onnx_ir.Node, indices: Sequence[int], alike: Sharded) -> None:
    for index in indices:
        if index < len(node.inputs):
            state.demand_whole(node, index, alike.at(-1))


def _shrink_heads(state: Propagation, node: onnx_ir.Node, name: str, heads: Sharded) -> None:
    """Let the attribute `name`, a number of heads, become that of one rank."""
    state.divide_into(heads, node.attributes[name].as_int(), name)
    state.shrink_attribute(node, name, heads)


def _attention_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand queries that are sharded by heads, since the output of attention can be sharded by nothing else."""
    flat = ndim_of(node.inputs[_QUERY]) == 3
    if wanted.axis != (_FLAT_HEADS if flat else _HEADS):
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, which attention does not give")
    _demand_heads(state, node, wanted.at(_HEADS), (_QUERY,))


_NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")
_ALIBI = ("passopt::AlibiAttention", "passopt::AlibiAttentionNoCache")
#: The forward rules by operator; `rules` includes them in its own table.
FUSED_FORWARD: dict[str, Forward] = {
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_ALIBI, _alibi_attention),
    "RotaryEmbedding": _rotary,
    "Attention": _attention,
}
#: The backward rules by operator.
FUSED_BACKWARD: dict[str, Backward] = {
    **dict.fromkeys(_NORMS, _norm_backward),
    **dict.fromkeys((*_ALIBI, "Attention"), _attention_backward),
    "RotaryEmbedding": _rotary_backward,
}
