"""Expand the norms of onnxruntime: of a sum with a skip connection, of embeddings, and without a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.editor import is_read
from passopt.passes.decomposition.contrib.registry import Values, expands, length_of, ndim, reduced_mean
from passopt.passes.decomposition.decompose_pass import cast, operand, required

_FLOAT = onnx_ir.DataType.FLOAT
_OPSET_OF_LAYER_NORM, _OPSET_OF_RMS_NORM = 17, 23
#: The epsilon of norms of sums, if a node does not state one.
_EPSILON = 1e-12


@expands("SkipLayerNormalization", attributes=("epsilon",), inputs=5)
def _skip_layer_norm(op: Any, node: onnx_ir.Node) -> Values:
    total = _sum(op, node, bias=operand(node, 4))
    gamma, beta = required(node, 2), operand(node, 3)
    wanted = any(is_read(value) for value in node.outputs[1:3])
    normed = layer_norm(op, total, gamma, beta, float(attribute(node, "epsilon", _EPSILON)), statistics=wanted)
    return [*normed, total]


@expands("SkipSimplifiedLayerNormalization", attributes=("epsilon",), inputs=4)
def _skip_rms_norm(op: Any, node: onnx_ir.Node) -> Values:
    total = _sum(op, node, bias=operand(node, 3))
    epsilon = float(attribute(node, "epsilon", _EPSILON))
    return [rms_norm(op, total, required(node, 2), epsilon), None, None, total]


def _sum(op: Any, node: onnx_ir.Node, bias: onnx_ir.Value | None) -> Any:
    """Return input + skip + bias, in the order in which the kernel adds them."""
    total = op.Add(required(node, 0), required(node, 1))
    return total if bias is None else op.Add(total, bias)


@expands("SimplifiedLayerNormalization", attributes=("axis", "epsilon", "stash_type"), inputs=2)
@expands("SimplifiedLayerNormalization", attributes=("axis", "epsilon", "stash_type"), inputs=2, domain="")
def _rms_norm(op: Any, node: onnx_ir.Node) -> Values:
    stash = onnx_ir.DataType(attribute(node, "stash_type", 1))
    epsilon, axis = float(attribute(node, "epsilon", 1e-5)), attribute(node, "axis", -1)
    return [rms_norm(op, required(node, 0), required(node, 1), epsilon, axis, stash)]


def rms_norm(
    op: Any,
    x: onnx_ir.Value,
    scale: onnx_ir.Value,
    epsilon: float,
    axis: int = -1,
    stash: onnx_ir.DataType = _FLOAT,
) -> Any:
    """Return x / sqrt(mean(x²) + epsilon) · scale over the axes from `axis` on, in the dtype of the scale."""
    if op.opset >= _OPSET_OF_RMS_NORM and x.dtype == scale.dtype:
        return op.RMSNormalization(x, scale, axis=axis, epsilon=epsilon, stash_type=stash.value)
    wide = cast(op, x, stash)
    squares = reduced_mean(op, op.Mul(wide, wide), _axes(x, axis))
    normed = op.Div(wide, op.Sqrt(op.Add(squares, epsilon)))
    return op.Mul(cast(op, normed, scale.dtype), scale)


@expands("LayerNormalization", attributes=("axis", "epsilon", "stash_type"), inputs=3, domain="")
def _layer_norm(op: Any, node: onnx_ir.Node) -> Values:
    x, scale, bias = required(node, 0), required(node, 1), operand(node, 2)
    epsilon, axis = float(attribute(node, "epsilon", 1e-5)), attribute(node, "axis", -1)
    wanted = any(is_read(value) for value in node.outputs[1:])
    return layer_norm(op, x, scale, bias, epsilon, axis, statistics=wanted)


def layer_norm(
    op: Any,
    x: onnx_ir.Value,
    scale: onnx_ir.Value,
    bias: onnx_ir.Value | None,
    epsilon: float,
    axis: int = -1,
    *,
    statistics: bool = False,
) -> list[Any]:
    """Return the layer norm over the axes from `axis` on, and its mean and inverse deviation if they are wanted."""
    if op.opset >= _OPSET_OF_LAYER_NORM:
        made = op.LayerNormalization(x, scale, bias, axis=axis, epsilon=epsilon, outputs=3 if statistics else 1)
        return list(made) if statistics else [made, None, None]
    axes, wide = _axes(x, axis), cast(op, x, _FLOAT if x.dtype != onnx_ir.DataType.DOUBLE else x.dtype)
    mean = reduced_mean(op, wide, axes)
    centred = op.Sub(wide, mean)
    variance = reduced_mean(op, op.Mul(centred, centred), axes)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    normed = op.Mul(cast(op, op.Mul(centred, inverse), x.dtype), scale)
    return [normed if bias is None else op.Add(normed, bias), mean, inverse]


def _axes(x: onnx_ir.Value, axis: int) -> list[int]:
    """Return the axes from `axis` to the last, counted from the back."""
    return list(range(axis - ndim(x) if axis >= 0 else axis, 0))


@expands("EmbedLayerNormalization", attributes=("epsilon", "mask_index_type"), inputs=9)
def _embed_layer_norm(op: Any, node: onnx_ir.Node) -> Values:
    """Add the embeddings of words, positions and segments, and normalise; count the mask of each row."""
    ids, segments, mask = required(node, 0), operand(node, 1), operand(node, 7)
    positions = operand(node, 8)
    if positions is None:
        positions = op.Unsqueeze(op.Range(np.int64(0), length_of(op, ids, 1), np.int64(1)), [0])
    table = operand(node, 4)
    total = op.Add(op.Gather(required(node, 2), ids, axis=0), op.Gather(required(node, 3), positions, axis=0))
    if table is not None and segments is not None:
        total = op.Add(total, op.Gather(table, segments, axis=0))
    epsilon = float(attribute(node, "epsilon", _EPSILON))
    normed = layer_norm(op, total, required(node, 5), operand(node, 6), epsilon)[0]
    return [normed, _mask_index(op, ids, mask) if is_read_at(node, 1) else None, total]


def is_read_at(node: onnx_ir.Node, index: int) -> bool:
    """Return whether the node has an output `index` that is read."""
    return len(node.outputs) > index and is_read(node.outputs[index])


def _mask_index(op: Any, ids: onnx_ir.Value, mask: onnx_ir.Value | None) -> Any:
    """Return how many columns of each row the mask shows, or 0 without a mask, as int32 [b]."""
    if mask is None:
        return op.Expand(np.zeros(1, np.int32), op.Slice(op.Shape(ids), [0], [1], [0]))  # There may be no column.
    return op.ReduceSum(op.Cast(op.Equal(mask, np.int32(1)), to=6), [1], keepdims=0)
