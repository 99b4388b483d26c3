"""Halve the width of rotary tables: exporters repeat every angle for both halves of a head.

A table whose halves are equal is rebuilt from the half that it came from. Any other, and any whose halves are not
provably equal, is declined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import constant_tensor, expression_of, small_constant
from passopt.passes.framework.base import Decline

#: Operators that treat every element alike. Those of their inputs that lack the last axis are taken as they are.
_ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul", "Div", "Add", "Neg", "Where", "Identity"})


def first_half(op: Any, value: onnx_ir.Value) -> onnx_ir.Value:
    """Return the first half, along the last axis, of a value whose two halves are equal.

    Raises Decline if the halves differ, or are not known to be equal.
    """
    if constant_tensor(value) is not None:
        return _half_of_constant(op, value)
    node = value.producer()
    if node is None or node.domain:
        raise Decline(f"the halves of {value.name} are not known to be equal: it is an input")
    if node.op_type == "Concat":
        return _half_of_concat(node, value)
    if node.op_type in _ELEMENTWISE:
        inputs = [
            item if item is None or not _has_last_axis(item, value) else first_half(op, item) for item in node.inputs
        ]
        return _again(op, node, inputs)
    if keeps_last_axis(node):
        return _again(op, node, [first_half(op, _first(node)), *node.inputs[1:]])
    raise Decline(f"the halves of {value.name} are not known to be equal: it comes from {node.op_type}")


def keeps_last_axis(node: onnx_ir.Node) -> bool:
    """Return True for operators that only move or select along other axes than the last of their first input."""
    source = dimensions(_first(node)) if node.inputs and node.inputs[0] is not None else None
    if source is None:
        return False
    last = len(source) - 1
    if node.op_type in {"Squeeze", "Slice", "Unsqueeze"}:
        position = {"Squeeze": 1, "Unsqueeze": 1, "Slice": 3}[node.op_type]
        axes = small_constant(node.inputs[position]) if len(node.inputs) > position else None
        if axes is None:
            return False
        ndim = len(source) + (axes.size if node.op_type == "Unsqueeze" else 0)
        return all(int(axis) % ndim != ndim - 1 for axis in axes.reshape(-1))
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return axis % len(source) != last
    if node.op_type == "Transpose":
        return "perm" in node.attributes and list(node.attributes["perm"].as_ints())[-1] == last
    return False


def _first(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _again(op: Any, node: onnx_ir.Node, inputs: list[onnx_ir.Value | None]) -> onnx_ir.Value:
    """Build the same operator on other inputs."""
    made: onnx_ir.Value = op.node(node.op_type, *inputs, **{name: item.value for name, item in node.attributes.items()})
    return made


def _has_last_axis(item: onnx_ir.Value, result: onnx_ir.Value) -> bool:
    """Return True unless `item` is broadcast along the last axis of `result`. Raises Decline if that is unknown."""
    dims = dimensions(item)
    if dims is None:
        raise Decline(f"the shape of {item.name} is unknown")
    return bool(dims) and dims[-1] != 1


def _half_of_concat(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value:
    """Return the one value that a Concat along the last axis joins with itself; else raise Decline."""
    dims = dimensions(value)
    axis = node.attributes["axis"].as_int()
    along_last = axis == -1 or (dims is not None and axis == len(dims) - 1)
    if not along_last or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        raise Decline(f"the halves of {value.name} are not known to be equal: it joins different values")
    return _first(node)


def _half_of_constant(op: Any, value: onnx_ir.Value) -> onnx_ir.Value:
    """Return a table of half the width as a new initializer, one for all sites of a pass."""

    def make() -> onnx_ir.Value:
        expression = expression_of(value)
        assert expression is not None
        width = expression.shape[-1] if expression.shape else 0
        if expression.dtype not in FLOATS or width % 2 or not width:
            raise Decline(f"{value.name} {list(expression.shape)} is no table of an even width")
        halves = [expression.slice(-1, start, start + width // 2) for start in (0, width // 2)]
        _check_equal(value.name, *halves)
        made: onnx_ir.Value = op.initializer(f"{value.name}.half", halves[0])
        return made

    found: onnx_ir.Value = op.shared(("half", value.name), make)
    return found


def _check_equal(name: str | None, first: Expression, second: Expression) -> None:
    """Raise Decline unless the halves are equal; they are compared chunk by chunk.

    Reading them is fine: a table is a computed constant, not a weight that was trained.
    """
    with Evaluator() as evaluator:
        for left, right in zip(evaluator.chunks(first), evaluator.chunks(second), strict=True):
            if not np.array_equal(left, right):
                raise Decline(f"the halves of the table {name} differ")
