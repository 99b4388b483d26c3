"""Prove that no element of a value is negative.

Gather counts a negative index from the end; operators that are to take its place refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir

from passopt.ir.graph.decoder import is_position_input
from passopt.ir.graph.operators import operators
from passopt.ir.weights.lazy_weight import small_constant

#: How many nodes are looked at one behind the other, at most.
_DEEPEST = 24
#: Operators that only hand on elements of their first input.
_MOVES = operators(
    "Expand Flatten Gather GatherElements GatherND Identity Reshape Slice Squeeze Tile Transpose Unsqueeze"
)
_INTEGERS = frozenset({onnx_ir.DataType.INT32.value, onnx_ir.DataType.INT64.value})


def is_not_negative(value: onnx_ir.Value | None, depth: int = _DEEPEST) -> bool:
    """Return whether every element of a value is known to be 0 or more, as lengths and the positions of a decoder are.

    Args:
        value: The value; an absent one is not known.
        depth: How many nodes may be looked at one behind the other.
    """
    if value is None or not depth:
        return False
    if value.is_graph_input():
        return is_position_input(value)
    array = small_constant(value)
    if array is not None:
        return bool((array >= 0).all()) if array.dtype.kind in "iuf" else False
    node = value.producer()
    if node is None or node.domain or value.index() != 0:
        return False
    known = [is_not_negative(item, depth - 1) for item in node.inputs]
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, known)


def _range(node: onnx_ir.Node, known: list[bool]) -> bool:
    """Return whether a Range counts upwards from no negative number."""
    return known[0] and known[2]


def _clip(node: onnx_ir.Node, known: list[bool]) -> bool:
    """Return whether the lower bound or the input is not negative, and no upper bound is."""
    has_upper = len(node.inputs) > 2 and node.inputs[2] is not None
    return any(known[:2]) and (known[2] if has_upper else len(node.inputs) > 1)


def _cast(node: onnx_ir.Node, known: list[bool]) -> bool:
    """Return whether a Cast keeps numbers from becoming negative: one to fewer bits might wrap around."""
    target, source = node.attributes.get("to"), node.inputs[0]
    if target is None or target.is_ref() or target.as_int() not in _INTEGERS or source is None or source.dtype is None:
        return False
    return known[0] and source.dtype in {onnx_ir.DataType.INT32, onnx_ir.DataType.INT64}


_RULES: Mapping[str, Callable[[onnx_ir.Node, list[bool]], bool]] = {
    **dict.fromkeys(_MOVES, lambda node, known: known[0]),
    **dict.fromkeys(("Add", "Concat", "Min", "Mul"), lambda node, known: all(known)),
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "Shape", "Size"), lambda node, known: True),
    "Cast": _cast,
    "Clip": _clip,
    "Max": lambda node, known: any(known),
    "Range": _range,
    "Where": lambda node, known: known[1] and known[2],
}
