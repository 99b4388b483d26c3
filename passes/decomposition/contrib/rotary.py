"""Expand onnxruntime's RotaryEmbedding, whose positions are an offset or a number per position."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.dtypes import SLICE_END
from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.decomposition.contrib.heads import join_heads, split_heads
from passopt.passes.decomposition.contrib.registry import Values, expands, known_length, length_of, ndim
from passopt.passes.decomposition.decompose_pass import required
from passopt.passes.framework.base import Decline


@expands(
    "RotaryEmbedding",
    attributes=("interleaved", "is_packed_batching", "num_heads", "rotary_embedding_dim", "scale"),
    inputs=4,
)
def _rotary(op: Any, node: onnx_ir.Node) -> Values:
    x, positions = required(node, 0), required(node, 1)
    if attribute(node, "is_packed_batching", 0) or attribute(node, "scale", 1.0) != 1:
        raise Decline(f"{called(node)} is packed or scaled, which RotaryEmbedding of ONNX is not")
    half = known_length(required(node, 2), 1)
    flat = ndim(x) == 3
    parts = x
    if flat:
        partial = attribute(node, "rotary_embedding_dim", 0)
        heads = attribute(node, "num_heads", 0) if partial else known_length(x, 2) // (2 * half)
        parts = split_heads(op, x, heads)
    angles = positions_of(op, positions, length_of(op, x, 1 if flat else 2))
    turned = rotated(op, parts, required(node, 2), required(node, 3), angles, bool(attribute(node, "interleaved", 0)))
    return [join_heads(op, turned) if flat else turned]


def positions_of(op: Any, positions: onnx_ir.Value, length: Any) -> Any:
    """Return positions [b or 1, s] of what is [b, s], or of one number, the position of the first column."""
    dims = dimensions(positions)
    if dims is None:
        raise Decline(f"the number of axes of {positions.name} is unknown")
    if len(dims) == 2:
        return positions
    if dims != [1]:
        raise Decline(f"{positions.name} has the shape {dims}, expected [1] or [batch, positions]")
    return op.Unsqueeze(op.Add(positions, op.Range(np.int64(0), length, np.int64(1))), [0])


def rotated(
    op: Any, x: onnx_ir.Value, cos: onnx_ir.Value, sin: onnx_ir.Value, positions: onnx_ir.Value, interleaved: bool
) -> Any:
    """Return x [b, heads, s, d] with its first 2h channels rotated by the rows `positions` of tables [p, h]."""
    half, width = known_length(cos, 1), known_length(x, 3)
    angles = [op.Unsqueeze(op.Gather(table, positions, axis=0), [1]) for table in (cos, sin)]
    if interleaved:
        one, other = (op.Slice(x, [start], [2 * half], [3], [2]) for start in (0, 1))
    else:
        one, other = (op.Slice(x, [start], [start + half], [3]) for start in (0, half))
    real = op.Sub(op.Mul(one, angles[0]), op.Mul(other, angles[1]))
    imaginary = op.Add(op.Mul(one, angles[1]), op.Mul(other, angles[0]))
    parts = [real, imaginary]
    if interleaved:
        pairs = op.Concat(*(op.Unsqueeze(part, [-1]) for part in parts), axis=-1)
        parts = [op.Reshape(pairs, [0, 0, 0, 2 * half])]
    if width != 2 * half:
        parts.append(op.Slice(x, [2 * half], [SLICE_END], [3]))
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=-1)
