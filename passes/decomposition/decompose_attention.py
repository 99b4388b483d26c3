"""Decompose attention into matrix products, masks and softmax (the decompose-attention pass)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN, called_functions
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.decomposition.decompose_pass import DecomposePass, cast, operand, required
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter

_FLOAT = onnx_ir.DataType.FLOAT
#: Half of fp32's lowest number: a score that is masked but still finite.
_LOWEST = -1.7014117e38


@dataclasses.dataclass(frozen=True)
class DecomposeAttention(DecomposePass):
    """Give targets without Attention (any opset below 23) the operators it is made of.

    Before: ``y, k, v = Attention(q, new_k, new_v, mask, past_k, past_v, scale=s)`` or ``passopt.AlibiAttention(…)``
    After:  ``k, v = Concat(past, new); y = MatMul(Softmax(Add(MatMul(q·√s, Transpose(k)·√s), mask)), v)``
    Keys and values that heads share are repeated, a soft cap becomes Tanh, causal order and windows become a mask. A
    row that sees nothing gives 0, as the operator does. ALiBi's bias and softmax are computed in fp32.
    """

    name = "decompose-attention"
    accuracy = REASSOCIATED
    after = ("fuse-attention",)
    decomposes = ("Attention", f"{DOMAIN}::{ALIBI_ATTENTION}", f"{DOMAIN}::{ALIBI_ATTENTION_NO_CACHE}")

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Decompose every node, then remove passopt's local functions that nothing calls any more."""
        result = super().run(model)
        called = called_functions(model)
        for identifier in [key for key in model.functions if key[0] == DOMAIN and key not in called]:
            if result.matches:
                del model.functions[identifier]
        return result

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        return _alibi(op, node) if node.domain == DOMAIN else _standard(op, node)


def _standard(op: Any, node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Build what ONNX's Attention computes, and return the values of its four outputs."""
    flat = len(_dims(required(node, 0))) == 3
    query, key, value = (
        _four_axes(op, required(node, index), attribute(node, name, 0))
        for index, name in enumerate(("q_num_heads", "kv_num_heads", "kv_num_heads"))
    )
    past_key, past_value = operand(node, 4), operand(node, 5)
    if past_key is not None:
        key, value = op.Concat(past_key, key, axis=2), op.Concat(past_value, value, axis=2)
    scores = _scores(op, node, query, key)
    stages = [scores]
    cap = attribute(node, "softcap", 0.0)
    stages.append(op.Mul(op.Tanh(op.Div(scores, cap)), cap) if cap else scores)
    bias, may_hide = _bias(op, node, query, key)
    stages.append(stages[-1] if bias is None else op.Add(stages[-1], bias))
    precision = attribute(node, "softmax_precision", None)
    wide = cast(op, stages[-1], onnx_ir.DataType(precision) if precision else None)
    shares = op.Softmax(wide, axis=-1)
    if may_hide:  # in a row that sees nothing, softmax is 0/0
        assert wide.dtype is not None
        shares = op.Where(op.IsNaN(shares), np.zeros((), wide.dtype.numpy()), shares)
    stages.append(cast(op, shares, query.dtype))
    result = op.MatMul(cast(op, shares, value.dtype), _repeated(op, value, query))
    result = cast(op, result, query.dtype)
    if flat:
        result = op.Reshape(op.Transpose(result, perm=[0, 2, 1, 3]), [0, 0, _width(result)])
    return [result, key, value, stages[attribute(node, "qk_matmul_output_mode", 0)]]


def _alibi(op: Any, node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Build what a passopt function of ALiBi attention computes: return its output, the keys and the values."""
    query, key, value, slopes, positions, mask = (required(node, index) for index in range(6))
    dtype = query.dtype
    if node.op_type == ALIBI_ATTENTION:
        key, value = (op.Concat(required(node, 6 + index), new, axis=2) for index, new in enumerate((key, value)))
    bias = op.Add(op.Mul(slopes, op.Unsqueeze(positions, [1, 2])), mask)
    wide_query, wide_key, wide_value = (cast(op, item, _FLOAT) for item in (query, key, value))
    scores = op.Max(op.Add(_scores(op, node, wide_query, wide_key), bias), _LOWEST)
    wide = op.MatMul(op.Softmax(scores, axis=-1), _repeated(op, wide_value, query))
    return [cast(op, wide, dtype), key, value]


def _scores(op: Any, node: onnx_ir.Node, query: onnx_ir.Value, key: onnx_ir.Value) -> Any:
    """Return q · kᵀ · scale.

    Each side is multiplied by √scale, so that half precision does not overflow before the scale is applied.
    """
    scale = attribute(node, "scale", None)
    if scale is None:
        scale = 1 / math.sqrt(_length(query, 3))
    if scale < 0:
        raise Decline(f"scales the scores by {scale}")
    turned = op.Transpose(_repeated(op, key, query), perm=[0, 1, 3, 2])
    return op.MatMul(op.Mul(query, math.sqrt(scale)), op.Mul(turned, math.sqrt(scale)))


def _dims(value: onnx_ir.Value) -> list[int | str | None]:
    """Return the lengths of the axes of a value. Raises Decline if not even their number is known."""
    dims = dimensions(value)
    if dims is None:
        raise Decline(f"the number of axes of {value.name} is unknown")
    return dims


def _length(value: onnx_ir.Value, axis: int) -> int:
    """Return the length of an axis. Raises Decline unless it is a known number."""
    length = _dims(value)[axis]
    if not isinstance(length, int):
        raise Decline(f"axis {axis} of {value.name} {_dims(value)} has no known length")
    return length


def _four_axes(op: Any, value: onnx_ir.Value, heads: int) -> onnx_ir.Value:
    """Turn [b, s, heads · d] into [b, heads, s, d]; a value of four axes stays as it is."""
    if len(_dims(value)) == 4:
        return value
    width = _dims(value)[2]
    each = width // heads if isinstance(width, int) else -1  # with -1, onnxruntime refuses to reshape an empty batch
    made: onnx_ir.Value = op.Transpose(op.Reshape(value, [0, 0, heads, each]), perm=[0, 2, 1, 3])
    return made


def _width(value: onnx_ir.Value) -> int:
    """Return how many channels all heads of [b, heads, s, d] have together; -1 if that is not known."""
    heads, each = _dims(value)[1], _dims(value)[3]
    return heads * each if isinstance(heads, int) and isinstance(each, int) else -1


def _repeated(op: Any, value: onnx_ir.Value, query: onnx_ir.Value) -> onnx_ir.Value:
    """Repeat keys or values [b, h_kv, t, d] for the query heads that share them: [b, h, t, d]."""
    wanted, given, width = _length(query, 1), _length(value, 1), _length(value, 3)
    if wanted == given:
        return value
    spread = op.Expand(op.Unsqueeze(value, [2]), [1, 1, wanted // given, 1, 1])
    made: onnx_ir.Value = op.Reshape(spread, [0, wanted, -1, width])
    return made


def _bias(op: Any, node: onnx_ir.Node, query: onnx_ir.Value, key: onnx_ir.Value) -> tuple[Any, bool]:
    """Return what is added to the scores [b, h, q, t], or None, and whether it may hide a whole row."""
    mask = operand(node, 3)
    order, may_hide = _order(op, node, query, key)
    terms: list[Any] = []
    if mask is not None:
        mask = _whole_mask(op, mask, key)
        if mask.dtype == onnx_ir.DataType.BOOL:
            order = mask if order is None else op.And(mask, order)
        else:
            terms.append(cast(op, mask, query.dtype))
    if order is not None:
        assert query.dtype is not None
        seen, hidden = (np.asarray(number, query.dtype.numpy()) for number in (0, -np.inf))
        terms.append(op.Where(order, seen, hidden))
    if not terms:
        return None, False
    return (terms[0] if len(terms) == 1 else op.Add(*terms)), may_hide or mask is not None


def _whole_mask(op: Any, mask: onnx_ir.Value, key: onnx_ir.Value) -> Any:
    """Pad a mask that is shorter than the keys, so that it hides the rest of them."""
    given, total = _dims(mask)[-1], _dims(key)[2]
    if given == total or not isinstance(given, int):
        return mask
    if not isinstance(total, int):
        raise Decline(f"the mask {mask.name} has {given} columns, and whether there are more keys is unknown")
    ndim = len(_dims(mask))
    pads = [0] * (2 * ndim - 1) + [total - given]
    assert mask.dtype is not None
    hidden = np.asarray(False if mask.dtype == onnx_ir.DataType.BOOL else -np.inf, mask.dtype.numpy())
    return op.Pad(mask, pads, hidden)


def _order(op: Any, node: onnx_ir.Node, query: onnx_ir.Value, key: onnx_ir.Value) -> tuple[Any, bool]:
    """Return which columns each row sees by its position, and whether a row may see none.

    The first is a boolean value [q, t] or [b, 1, q, t], or None if position hides nothing.
    """
    causal = bool(attribute(node, "is_causal", 0))
    left, right = (attribute(node, f"{side}_window_size", -1) for side in ("left", "right"))
    valid, past = operand(node, 6), operand(node, 4)
    if not causal and left < 0 and right < 0 and valid is None:
        return None, False
    columns = op.Range(np.int64(0), _length_of(op, key, 2), np.int64(1))
    filled = None if valid is None else op.Unsqueeze(valid, [1, 2, 3])
    terms = [] if filled is None else [op.Less(columns, filled)]
    if causal or left >= 0 or right >= 0:
        rows = _rows(op, query, past, filled)
        if causal:
            terms.append(op.LessOrEqual(columns, rows))
        if left >= 0:
            terms.append(op.GreaterOrEqual(columns, op.Sub(rows, np.int64(left))))
        if right >= 0:
            terms.append(op.LessOrEqual(columns, op.Add(rows, np.int64(right))))
    order = terms[0]
    for term in terms[1:]:
        order = op.And(order, term)
    return order, filled is not None or left >= 0 or right >= 0


def _rows(op: Any, query: onnx_ir.Value, past: onnx_ir.Value | None, filled: Any) -> Any:
    """Return the positions of the queries as [q, 1] or [b, 1, q, 1].

    They follow the cache; or, if `filled` gives the numbers of valid keys, they end where the valid keys end.
    """
    count = _length_of(op, query, 2)
    if filled is not None:
        rows = op.Unsqueeze(op.Range(np.int64(0), count, np.int64(1)), [1])
        return op.Add(rows, op.Sub(filled, count))
    first = np.int64(0) if past is None else _length_of(op, past, 2)
    last = count if past is None else op.Add(first, count)
    return op.Unsqueeze(op.Range(first, last, np.int64(1)), [1])


def _length_of(op: Any, value: onnx_ir.Value, axis: int) -> Any:
    """Return the length of an axis as a scalar: a number where it is known, else computed in the graph."""
    known = _dims(value)[axis]
    return np.int64(known) if isinstance(known, int) else op.Squeeze(op.Shape(value, start=axis, end=axis + 1), [0])
