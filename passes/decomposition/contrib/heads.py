"""Split and join attention heads, and build the products and the softmax of attention over [b, heads, s, d]."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.decomposition.contrib.registry import known_length
from passopt.passes.decomposition.decompose_pass import cast
from passopt.passes.framework.base import Decline

_FLOAT = onnx_ir.DataType.FLOAT


def split_heads(op: Any, x: onnx_ir.Value, heads: int) -> Any:
    """Turn [b, s, heads · d] into [b, heads, s, d]."""
    width = known_length(x, 2)
    if heads < 1 or width % heads:
        raise Decline(f"{x.name} has {width} channels, which are not {heads} heads")
    return op.Transpose(op.Reshape(x, [0, 0, heads, width // heads]), perm=[0, 2, 1, 3])


def join_heads(op: Any, x: onnx_ir.Value, width: int | None = None) -> Any:
    """Turn [b, heads, s, d] into [b, s, heads · d]; `width` is heads · d where it cannot be read off `x`."""
    width = width or known_length(x, 1) * known_length(x, 3)
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])


@dataclasses.dataclass(frozen=True)
class Scores:
    """What happens to the scores between the two products: scale, cap, and what is added in order."""

    scale: float
    softcap: float = 0.0
    added: tuple[Any, ...] = ()


def scale_of(scale: float, query: onnx_ir.Value) -> float:
    """Return the scale that a node states, or 1/√d if it is 0."""
    return scale or 1 / math.sqrt(known_length(query, 3))


def attend(op: Any, query: onnx_ir.Value, key: onnx_ir.Value, value: onnx_ir.Value, scores: Scores) -> Any:
    """Return softmax(query · keyᵀ · scale + …) · value, computed in fp32; all are [b, heads, …, d]."""
    wide_query, wide_key, wide_value = (cast(op, item, _FLOAT) for item in (query, key, value))
    found = op.Mul(op.MatMul(wide_query, op.Transpose(wide_key, perm=[0, 1, 3, 2])), scores.scale)
    if scores.softcap:
        found = op.Mul(op.Tanh(op.Div(found, scores.softcap)), scores.softcap)
    for term in scores.added:
        found = op.Add(found, cast(op, term, _FLOAT))
    result = op.MatMul(op.Softmax(found, axis=-1), wide_value)
    return cast(op, result, query.dtype)


def repeated(op: Any, x: onnx_ir.Value, times: int) -> Any:
    """Repeat every head of [b, heads, s, d] for the query heads that share it: [b, heads · times, s, d]."""
    if times == 1:
        return x
    heads, width = known_length(x, 1), known_length(x, 3)
    dims = dimensions(x) or []
    length = dims[2] if isinstance(dims[2], int) else -1
    spread = op.Expand(op.Unsqueeze(x, [2]), [1, 1, times, 1, 1])
    return op.Reshape(spread, [0, heads * times, length, width])


def shown(op: Any, is_shown: Any, hidden: float) -> Any:
    """Return 0 where a column is shown, and `hidden` elsewhere, to be added to the scores."""
    return op.Where(is_shown, np.float32(0), np.float32(hidden))
