"""Expand onnxruntime's Attention and MultiHeadAttention, with their masks, biases and caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions, same
from passopt.passes.decomposition.contrib.heads import Scores, attend, join_heads, scale_of, shown, split_heads
from passopt.passes.decomposition.contrib.registry import Values, expands, known_length, length_of, ndim
from passopt.passes.decomposition.decompose_pass import operand, required
from passopt.passes.framework.base import Decline

#: What hides a later column in causal attention: fp32's lowest number, as in the kernel.
_LOWEST = float(np.finfo(np.float32).min)
#: What hides a masked column, if a node does not state another number.
_FILTER = -10000.0


@expands("MultiHeadAttention", attributes=("mask_filter_value", "num_heads", "scale", "unidirectional"), inputs=8)
def _multi_head_attention(op: Any, node: onnx_ir.Node) -> Values:
    heads = attribute(node, "num_heads", 0)
    query, key, value = _projections(op, node, heads)
    _check_causal_lengths(node, query, key)
    past = operand(node, 6), operand(node, 7)
    if past[0] is not None and past[1] is not None:
        key, value = op.Concat(past[0], key, axis=2), op.Concat(past[1], value, axis=2)
    mask = _mask(op, node, operand(node, 4), query, key)
    bias = operand(node, 5)
    terms = [term for term in (mask, bias) if term is not None]
    scores = Scores(scale_of(attribute(node, "scale", 0.0), query), added=tuple(terms))
    return [join_heads(op, attend(op, query, key, value, scores)), key, value, None]


def _check_causal_lengths(node: onnx_ir.Node, query: onnx_ir.Value, key: onnx_ir.Value) -> None:
    """Raise Decline for causal order between unequal lengths.

    With more keys than queries, onnxruntime's kernel lets the last query see all of them, and the others not.
    """
    steps, keys = ((dimensions(item) or [None] * 4)[2:3] for item in (query, key))
    if attribute(node, "unidirectional", 0) and not same(keys, steps):
        raise Decline(
            f"{called(node)} is causal over {steps[0]} queries and {keys[0]} keys of this step, which may be others"
        )


def _projections(op: Any, node: onnx_ir.Node, heads: int) -> list[Any]:
    """Return query, key and value as [b, heads, s, d], whichever of them are packed in one input."""
    query, key, value, bias = required(node, 0), operand(node, 1), operand(node, 2), operand(node, 3)
    if key is None:
        if ndim(query) != 5:
            raise Decline(f"{called(node)} has no key, and {query.name} is not packed as [b, s, heads, 3, d]")
        parts = _unpacked(op, query, 3)
    elif value is None:
        if ndim(key) != 5:
            raise Decline(f"{called(node)} has no value, and {key.name} is not packed as [b, t, heads, 2, d]")
        parts = [query, *_unpacked(op, key, 2)]
    else:
        parts = [query, key, value]
    if bias is not None:
        if any(ndim(part) != 3 for part in parts):
            raise Decline(f"{called(node)} adds the bias {bias.name} to packed projections")
        widths = [known_length(part, 2) for part in parts]
        pieces = op.Split(bias, widths, axis=0, outputs=3)
        parts = [op.Add(part, piece) for part, piece in zip(parts, pieces, strict=True)]
    return [split_heads(op, part, heads) if ndim(part) == 3 else part for part in parts]


def _unpacked(op: Any, packed: onnx_ir.Value, count: int) -> list[Any]:
    """Return the parts [b, heads, s, d] of what is packed as [b, s, heads, count, d]."""
    turned = op.Transpose(packed, perm=[3, 0, 2, 1, 4])
    return [op.Squeeze(part, [0]) for part in op.Split(turned, [1] * count, axis=0, outputs=count)]


@expands(
    "Attention",
    attributes=(
        "do_rotary",
        "mask_filter_value",
        "num_heads",
        "past_present_share_buffer",
        "qkv_hidden_sizes",
        "scale",
        "unidirectional",
    ),
    inputs=6,
)
def _attention(op: Any, node: onnx_ir.Node) -> Values:
    """Project one input to query, key and value by one packed weight, and attend."""
    for name in ("do_rotary", "past_present_share_buffer"):
        if attribute(node, name, 0):
            raise Decline(f"{called(node)} has {name}, which has no standard form")
    heads, weight = attribute(node, "num_heads", 0), required(node, 1)
    bias, past, extra = operand(node, 2), operand(node, 4), operand(node, 5)
    packed = op.MatMul(required(node, 0), weight)
    packed = packed if bias is None else op.Add(packed, bias)
    widths = list(attribute(node, "qkv_hidden_sizes", [])) or [known_length(weight, 1) // 3] * 3
    parts = op.Split(packed, widths, axis=2, outputs=3)
    query, key, value = (split_heads(op, part, heads) for part in parts)
    if past is not None:
        before = [op.Squeeze(part, [0]) for part in op.Split(past, [1, 1], axis=0, outputs=2)]
        key, value = (op.Concat(old, new, axis=2) for old, new in zip(before, (key, value), strict=True))
    mask = _mask(op, node, operand(node, 3), query, key)
    terms = [term for term in (mask, extra) if term is not None]
    scores = Scores(scale_of(attribute(node, "scale", 0.0), query), added=tuple(terms))
    present = None
    if len(node.outputs) > 1:
        present = op.Concat(op.Unsqueeze(key, [0]), op.Unsqueeze(value, [0]), axis=0)
    return [join_heads(op, attend(op, query, key, value, scores)), present]


def _mask(op: Any, node: onnx_ir.Node, mask: onnx_ir.Value | None, query: Any, key: Any) -> Any:
    """Return what hides columns, to be added to the scores [b, h, s, t]: by a mask, by causal order, or both."""
    hidden = float(attribute(node, "mask_filter_value", _FILTER))
    found = None if mask is None else shown(op, _shown_by(op, node, mask, query, key), hidden)
    if not attribute(node, "unidirectional", 0):
        return found
    total = length_of(op, key, 2)
    first = op.Sub(total, length_of(op, query, 2))
    rows = op.Unsqueeze(op.Range(first, total, np.int64(1)), [1])
    earlier = op.LessOrEqual(op.Range(np.int64(0), total, np.int64(1)), rows)
    if found is None:
        return shown(op, earlier, _LOWEST)
    return op.Where(earlier, found, np.float32(_LOWEST))


def _shown_by(op: Any, node: onnx_ir.Node, mask: onnx_ir.Value, query: Any, key: Any) -> Any:
    """Return which columns a mask shows, as booleans that broadcast over [b, h, s, t].

    A mask [b, t] or [b, s, t] has a number per column. One of [b] says where each row ends; one of [2b] also says,
    behind that, where each starts.
    """
    dims = dimensions(mask)
    if dims is None:
        raise Decline(f"the number of axes of {mask.name} is unknown")
    if len(dims) in {2, 3}:
        return op.Unsqueeze(op.Greater(mask, op.literal(np.asarray(0, _kind(mask)))), [1, 2] if len(dims) == 2 else [1])
    batch = (dimensions(query) or [None])[0]
    columns = op.Cast(op.Range(np.int64(0), length_of(op, key, 2), np.int64(1)), to=mask.dtype.value)  # type: ignore[union-attr]
    if len(dims) == 1 and batch is not None and dims[0] == batch:
        return op.Less(columns, op.Unsqueeze(mask, [1, 2, 3]))
    if len(dims) == 1 and isinstance(batch, int) and dims[0] == 2 * batch:
        ends, starts = (op.Unsqueeze(part, [1, 2, 3]) for part in op.Split(mask, [batch, batch], axis=0, outputs=2))
        return op.And(op.Less(columns, ends), op.GreaterOrEqual(columns, starts))
    raise Decline(f"{called(node)} has the mask {mask.name} of shape {dims}, whose meaning is not known for sure")


def _kind(value: onnx_ir.Value) -> Any:
    assert value.dtype is not None
    return value.dtype.numpy()
