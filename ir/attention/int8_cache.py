"""Recognise a KV cache in 8 bits: codes and their scales as inputs, and new rows that are stored as codes.

A row is one position of one head. Its codes are int8, and its scale stands beside them as `past.N.key.scales` and
`past.N.value.scales` [batch, kv_heads, past, 1].
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.attention.fused import AttentionParts, find_attention
from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.decoder import SCALES
from passopt.ir.graph.linears import LARGEST_CODE
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: The operators by which the ranks of a joined graph take their heads of a cache.
_SHARES = frozenset({"Pad", "Split"})
#: Elements of matrices that turn keys are rounded to the dtype of the model; bf16 has 8 bits.
_ROUNDING = 2**-7
#: The largest number of elements of such a matrix, which is read.
_LARGEST = 1 << 18


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """Keys or values of an attention whose cache is stored in 8 bits.

    Attributes:
        past_codes: The codes so far, int8 [b, h, past, d]: a graph input, or a share of it.
        past_scales: Their scales [b, h, past, 1].
        past: The past as numbers, which the attention reads.
        rows: The new rows before they are quantised [b, h, s, d].
        codes: Their codes, int8.
        scales: Their scales [b, h, s, 1].
        stored: What the attention reads of them: codes times scales.
    """

    past_codes: onnx_ir.Value
    past_scales: onnx_ir.Value
    past: onnx_ir.Value
    rows: onnx_ir.Value
    codes: onnx_ir.Value
    scales: onnx_ir.Value
    stored: onnx_ir.Value

    @property
    def by_largest(self) -> bool:
        """Return whether the scale of a new row is its largest magnitude / 127, or 1 if that is 0."""
        choice = _made_by(self.scales, "Where")
        if choice is None or not _is_number(choice.inputs[1], 1):
            return False
        quotient, is_zero = choice.inputs[2], _made_by(choice.inputs[0], "Equal")
        if is_zero is None or is_zero.inputs[0] is not quotient or not _is_number(is_zero.inputs[1], 0):
            return False
        division = _made_by(quotient, "Div")
        largest = _made_by(division.inputs[0], "ReduceMax") if division is not None else None
        if division is None or largest is None or not _is_number(division.inputs[1], LARGEST_CODE):
            return False
        magnitudes = _made_by(largest.inputs[0], "Abs")
        axes = small_constant(largest.inputs[1]) if len(largest.inputs) > 1 else None
        keeps = attribute(largest, "keepdims", 1)
        over_rows = axes is not None and axes.tolist() in ([-1], [3]) and keeps == 1
        return over_rows and magnitudes is not None and magnitudes.inputs[0] is self.rows

    @property
    def input(self) -> onnx_ir.Value:
        """Return the graph input that holds the codes; where ranks are joined, it holds the heads of all of them."""
        found = _graph_input(self.past_codes)
        assert found is not None
        return found


@dataclasses.dataclass(frozen=True)
class Turn:
    """Two matrices that turn queries and keys, with `of_query` · `of_key`ᵀ = 1, and what they turn.

    Attributes:
        query: The queries before they are turned [b, h, s, d].
        key: The keys before they are turned.
        of_query: The matrix of the queries [d, d].
        of_key: The matrix of the keys [d, d].
    """

    query: onnx_ir.Value
    key: onnx_ir.Value
    of_query: Array
    of_key: Array


@dataclasses.dataclass(frozen=True)
class Int8Cache:
    """The keys and the values of an attention whose cache is stored in 8 bits; `turn` is None if keys lie as they are.

    Products of turned queries and keys are those of queries and keys.
    """

    key: CachedRows
    value: CachedRows
    turn: Turn | None


def find_int8_cache(parts: AttentionParts) -> Int8Cache | None:
    """Return the keys and values of an attention that stores both in 8 bits, or None for any other."""
    key = _cached_rows(parts.past_key, parts.key)
    value = _cached_rows(parts.past_value, parts.value)
    return Int8Cache(key, value, _turn(parts.query, key.rows)) if key is not None and value is not None else None


def int8_caches(model: onnx_ir.Model) -> dict[onnx_ir.Node, Int8Cache]:
    """Return the attentions of a graph that store their cache in 8 bits."""
    found = {}
    for node in model.graph:
        parts = find_attention(node)
        cache = find_int8_cache(parts) if parts is not None else None
        if cache is not None:
            found[node] = cache
    return found


def _turn(query: onnx_ir.Value, key: onnx_ir.Value) -> Turn | None:
    """Return how queries and keys are turned; None unless that is proven to leave their products as they are."""
    first, second = _multiplied(query), _multiplied(key)
    if first is None or second is None or first[1].shape != second[1].shape:
        return None
    one = first[1].astype(np.float64) @ second[1].astype(np.float64).T
    exact = np.abs(one - np.eye(len(one))).max() <= _ROUNDING
    return Turn(first[0], second[0], first[1], second[1]) if exact else None


def _multiplied(value: onnx_ir.Value) -> tuple[onnx_ir.Value, Array] | None:
    """Return x and m of a value x · m with a small constant matrix [1, 1, d, d]."""
    node = value.producer()
    if node is None or node.domain or node.op_type != "MatMul":
        return None
    given, constant = node.inputs[0], node.inputs[1]
    matrix = constant_tensor(constant) if constant is not None else None
    if given is None or matrix is None or len(matrix.shape) != 4 or matrix.size > _LARGEST:
        return None
    array = matrix.numpy().astype(np.float32)
    return (given, array[0, 0]) if array.shape[:2] == (1, 1) and array.shape[2] == array.shape[3] else None


def has_int8_cache(model: onnx_ir.Model) -> bool:
    """Return whether a graph takes codes of a cache, with their scales beside them."""
    names = {value.name: value for value in model.graph.inputs}
    return any(
        value.dtype == onnx_ir.DataType.INT8 and f"{name}{SCALES}" in names
        for name, value in names.items()
        if (name or "").startswith("past.")
    )


def _cached_rows(past: onnx_ir.Value | None, stored: onnx_ir.Value) -> CachedRows | None:
    known, new = _dequantized(past), _dequantized(stored)
    if past is None or known is None or new is None:
        return None
    (past_codes, past_scales), (codes, scales) = known, new
    maker = codes.producer()
    if maker is None or not _works_by_rows(maker, _QUANTIZE) or maker.inputs[1] is not scales:
        return None
    rows = maker.inputs[0]
    if rows is None or _graph_input(past_codes) is None or _graph_input(past_scales) is None:
        return None
    return CachedRows(past_codes, past_scales, past, rows, codes, scales, stored)


def _made_by(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    """Return the node that makes a value if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _is_number(value: onnx_ir.Value | None, number: int) -> bool:
    array = small_constant(value)
    return array is not None and array.size == 1 and float(array.reshape(())) == number


def _graph_input(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return the graph input that a value is, or a share of the heads of; None for any other value."""
    found: onnx_ir.Value | None = value
    while found is not None and (node := found.producer()) is not None:
        found = node.inputs[0] if node.op_type in _SHARES and not node.domain else None
    return found if found is not None and found.is_graph_input() else None


def _dequantized(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value, onnx_ir.Value] | None:
    """Return the codes and scales of a value that a DequantizeLinear computes by rows, or None for any other."""
    node = value.producer() if value is not None else None
    if node is None or not _works_by_rows(node, _DEQUANTIZE):
        return None
    codes, scales = node.inputs[:2]
    if codes is None or scales is None or codes.dtype != onnx_ir.DataType.INT8:
        return None
    return codes, scales


def _works_by_rows(node: onnx_ir.Node, op_type: str) -> bool:
    """Return whether a node quantises or dequantises [b, h, s, d] with one scale per row and no zero point."""
    if node.domain or node.op_type != op_type or any(item is not None for item in node.inputs[2:]):
        return False
    dims = dimensions(node.inputs[0]) if node.inputs[0] is not None else None
    block, axis = node.attributes.get("block_size"), node.attributes.get("axis")
    if dims is None or len(dims) != 4 or block is None or axis is None:
        return False
    return block.as_int() == dims[3] and axis.as_int() in {3, -1}
