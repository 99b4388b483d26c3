"""Expand GroupQueryAttention: rotary embedding, a cache whose filled length may differ per row, and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.provenance import called
from passopt.passes.decomposition.contrib.heads import (
    Scores,
    attend,
    join_heads,
    repeated,
    scale_of,
    shown,
    split_heads,
)
from passopt.passes.decomposition.contrib.registry import Values, expands, known_length, length_of
from passopt.passes.decomposition.contrib.rotary import rotated
from passopt.passes.decomposition.decompose_pass import operand, required
from passopt.passes.framework.base import Decline

_LOWEST = float(np.finfo(np.float32).min)
#: Attributes that a node may state with the value that means nothing; others are not expanded.
_DEFAULTS = {
    "causal": 1,
    "k_quant_type": "NONE",
    "qk_output": 0,
    "sliding_window_cache": 0,
    "smooth_softmax": -1,
    "v_quant_type": "NONE",
    "kv_cache_bit_width": 0,
}


@expands(
    "GroupQueryAttention",
    attributes=(
        "do_rotary",
        "kv_num_heads",
        "k_norm_epsilon",
        "local_window_size",
        "num_heads",
        "q_norm_epsilon",
        "qk_norm_epsilon",
        "rotary_interleaved",
        "scale",
        "softcap",
        *_DEFAULTS,
    ),
    inputs=11,
)
def _group_query_attention(op: Any, node: onnx_ir.Node) -> Values:
    for name, default in _DEFAULTS.items():
        if attribute(node, name, default) not in {default, 0 if name == "smooth_softmax" else default}:
            raise Decline(f"{called(node)} has {name} = {attribute(node, name, default)!r}, which has no standard form")
    heads, groups = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = _projections(op, node, heads, groups)
    steps = length_of(op, query, 2)
    filled = _filled(op, node)  # int64 [b, 1]: how many columns of each row are filled after this step
    before = op.Sub(filled, steps)
    total = op.Cast(op.Squeeze(_flat(op, required(node, 6)), [0]), to=7)
    # In the first step, rows may be shorter than the step: they start at 0, and what is behind their end is padding.
    before = op.Where(op.Equal(total, steps), np.int64(0), before)
    positions = op.Add(before, op.Unsqueeze(op.Range(np.int64(0), steps, np.int64(1)), [0]))  # [b, s]
    if attribute(node, "do_rotary", 0):
        given = operand(node, 9)
        cos, sin = required(node, 7), required(node, 8)
        turned = bool(attribute(node, "rotary_interleaved", 0))
        query, key = (rotated(op, x, cos, sin, given or positions, turned) for x in (query, key))
    past = operand(node, 3), operand(node, 4)
    length = total if past[0] is None else op.Max(total, length_of(op, past[0], 2))
    columns = op.Unsqueeze(op.Range(np.int64(0), length, np.int64(1)), [0])  # [1, t]
    key, value = (_grown(op, old, new, columns, before, steps) for old, new in zip(past, (key, value), strict=True))
    terms = [_hidden(op, node, columns, positions, filled)]
    keys, values = (repeated(op, x, heads // groups) for x in (key, value))
    bias = operand(node, 10)
    if bias is not None:  # It has as many columns as are attended; the cache may have more, which hold nothing yet.
        end = op.Unsqueeze(total, [0])
        keys, values = (op.Slice(x, [0], end, [2]) for x in (keys, values))
        terms = [bias, op.Slice(terms[0], [0], end, [3])]
    scores = Scores(scale_of(attribute(node, "scale", 0.0), query), attribute(node, "softcap", 0.0), tuple(terms))
    result = attend(op, query, keys, values, scores)
    window = attribute(node, "local_window_size", -1)
    if window > 0:  # A window behind the end of a row shows nothing, for which the kernel gives 0.
        starts = op.Sub(op.Unsqueeze(positions, [1, 3]), np.int64(window - 1))
        assert query.dtype is not None
        nothing = np.asarray(0, query.dtype.numpy())
        result = op.Where(op.Less(starts, op.Unsqueeze(filled, [1, 2])), result, nothing)
    return [join_heads(op, result, heads * known_length(value, 3)), key, value, None]


def _projections(op: Any, node: onnx_ir.Node, heads: int, groups: int) -> list[Any]:
    """Return query, key and value as [b, heads, s, d], also if one input holds all three."""
    query, key, value = required(node, 0), operand(node, 1), operand(node, 2)
    if key is None or value is None:
        width = known_length(query, 2) // (heads + 2 * groups)
        widths = [heads * width, groups * width, groups * width]
        query, key, value = op.Split(query, widths, axis=2, outputs=3)
    counts = (heads, groups, groups)
    return [split_heads(op, part, count) for part, count in zip((query, key, value), counts, strict=True)]


def _filled(op: Any, node: onnx_ir.Node) -> Any:
    return op.Unsqueeze(op.Add(op.Cast(_flat(op, required(node, 5)), to=7), np.int64(1)), [1])


def _flat(op: Any, value: onnx_ir.Value) -> Any:
    return op.Reshape(value, [-1])


def _grown(op: Any, old: onnx_ir.Value | None, new: Any, columns: Any, before: Any, steps: Any) -> Any:
    """Return the cache [b, heads, t, d]: the old columns below `before` [b, 1], then the new ones, then zeros."""
    groups, width = known_length(new, 1), known_length(new, 3)
    joined = new if old is None else op.Concat(old, new, axis=2)
    start = np.int64(0) if old is None else length_of(op, old, 2)
    step = op.Sub(columns, before)  # [b, t]: how many columns behind the first new one
    is_new = op.GreaterOrEqual(step, np.int64(0))
    is_filled = op.Less(step, steps)
    source = op.Where(is_new, op.Add(step, start), columns)
    source = op.Where(is_filled, source, np.int64(0))
    index = op.Expand(op.Unsqueeze(source, [1, 3]), [1, groups, 1, width])
    assert new.dtype is not None
    taken = op.GatherElements(joined, index, axis=2)
    return op.Where(op.Unsqueeze(is_filled, [1, 3]), taken, np.asarray(0, new.dtype.numpy()))


def _hidden(op: Any, node: onnx_ir.Node, columns: Any, positions: Any, filled: Any) -> Any:
    """Return what hides later columns, those before a window and those behind the end, for the scores [b, 1, s, t]."""
    rows, places = op.Unsqueeze(positions, [1, 3]), op.Unsqueeze(columns, [1, 2])
    seen = op.And(op.LessOrEqual(places, rows), op.Less(places, op.Unsqueeze(filled, [1, 2])))
    window = attribute(node, "local_window_size", -1)
    if window > 0:
        seen = op.And(seen, op.Greater(places, op.Sub(rows, np.int64(window))))
    return shown(op, seen, _LOWEST)
