"""Prove that a value holds positions: numbers that count upwards along its last axis, none of them negative.

Gather counts a negative index from the end, and takes as many indices as one likes. RotaryEmbedding refuses negative
ids, and more of them than its table has rows. Numbers that count upwards name as many rows as there are of them.
"""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.decoder import is_position_input
from passopt.ir.shapes.dimensions import dimensions, same
from passopt.ir.weights.lazy_weight import small_constant

#: How many nodes are looked at one behind the other, at most.
_DEEPEST = 24
#: Operators that hand on the elements of their first input. Where the last axis stays, they are as many as before.
_MOVES = frozenset({"Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_INTEGERS = frozenset({onnx_ir.DataType.INT32, onnx_ir.DataType.INT64})


def counts_positions(value: onnx_ir.Value | None, depth: int = _DEEPEST) -> bool:
    """Return whether a value is the positions of an exported decoder, or is made from a Range that counts upwards.

    Args:
        value: The value; an absent one is not known.
        depth: How many nodes may be looked at one behind the other.
    """
    if value is None or not depth or value.dtype not in _INTEGERS:
        return False
    if value.is_graph_input():
        return is_position_input(value)
    node = value.producer()
    if node is None or node.domain or value.index() != 0:
        return False
    if node.op_type == "Range":
        return _is_zero_or_more(node.inputs[0], depth) and _is_one(node.inputs[2])
    if node.op_type == "Add":
        pairs = (node.inputs, node.inputs[::-1])
        return any(
            counts_positions(one, depth - 1) and _is_zero_or_more(other, depth) and _keeps_last(one, value)
            for one, other in pairs
        )
    return node.op_type in _MOVES and counts_positions(node.inputs[0], depth - 1) and _keeps_last(node.inputs[0], value)


def _keeps_last(one: onnx_ir.Value | None, other: onnx_ir.Value) -> bool:
    """Return whether two values are known to have last axes of one length."""
    first, second = (dimensions(one) if one is not None else None), dimensions(other)
    return bool(first and second) and same((first or [])[-1:], (second or [])[-1:])


def _is_one(value: onnx_ir.Value | None) -> bool:
    array = small_constant(value)
    return array is not None and array.size == 1 and bool((array == 1).all())


def _is_zero_or_more(value: onnx_ir.Value | None, depth: int) -> bool:
    """Return whether a value is a length, or a constant that is not negative, or a sum of such."""
    if value is None or not depth or value.is_graph_input():
        return False
    array = small_constant(value)
    if array is not None:
        return array.dtype.kind in "iu" and bool((array >= 0).all())
    node = value.producer()
    if node is None or node.domain or value.index() != 0:
        return False
    if node.op_type in {"Shape", "Size"}:
        return True
    if node.op_type in {"Identity", "Squeeze", "Unsqueeze", "Gather", "Slice", "Reshape"}:
        return _is_zero_or_more(node.inputs[0], depth - 1)
    return node.op_type == "Add" and all(_is_zero_or_more(item, depth - 1) for item in node.inputs)
