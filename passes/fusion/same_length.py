"""Prove that two axes have one length, by the values that they come from where shape inference gives no name."""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir

from passopt.ir.graph.operators import operators
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.shapes.elements import ConstantElement, DimOf, elements

#: A number, a symbol, or an axis of a value that nothing more is known about.
Length: TypeAlias = "int | str | tuple[onnx_ir.Value, int] | None"
#: How many values are looked at, so that a long chain of layers costs little.
_FURTHEST = 200
#: Operators whose first output has the shape of their first input.
_ALIKE = operators("Cast Identity LayerNormalization Neg RMSNormalization RotaryEmbedding Sigmoid Softmax Tanh")
_BROADCASTING = operators("Add Div Mul Sub")


def same_length(one: onnx_ir.Value, axis: int, other: onnx_ir.Value, along: int) -> bool:
    """Return whether `axis` of `one` is known to be as long as the axis `along` of `other`."""
    tracer = _Tracer()
    first = tracer.length(one, axis)
    return first is not None and first == tracer.length(other, along)


class _Tracer:
    """Find where the lengths of axes come from, and look at each value once."""

    def __init__(self) -> None:
        self._known: dict[tuple[onnx_ir.Value, int], Length] = {}

    def length(self, value: onnx_ir.Value | None, axis: int) -> Length:
        """Return the length of an axis as far back as it is known; None if the value or its axes are unknown."""
        dims = dimensions(value) if value is not None else None
        if value is None or dims is None or not -len(dims) <= axis < len(dims):
            return None
        axis %= len(dims)
        stated = dims[axis]
        if stated is not None:
            return stated
        here = (value, axis)
        if here not in self._known:
            self._known[here] = here  # This also ends the search after too many values.
            if len(self._known) < _FURTHEST:
                self._known[here] = self._before(value, axis, len(dims)) or here
        return self._known[here]

    def _before(self, value: onnx_ir.Value, axis: int, ndim: int) -> Length:
        """Return the length that an operator hands on to an axis of its output; None if that is not known."""
        node = value.producer()
        if node is None or node.domain or not node.inputs:
            return None
        first = node.inputs[0]
        if node.op_type in _ALIKE and value.index() == 0:
            return self.length(first, axis)
        if node.op_type in _BROADCASTING:
            return self._broadcast(node, axis - ndim)
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            return self.length(first, list(perm.as_ints())[axis] if perm is not None else ndim - 1 - axis)
        if node.op_type == "Split":
            along = node.attributes.get("axis")
            return self.length(first, axis) if (along.as_int() if along is not None else 0) % ndim != axis else None
        if node.op_type == "MatMul":
            is_weight = len(dimensions(node.inputs[1]) or []) == 2 if node.inputs[1] is not None else False
            return self.length(first, axis) if is_weight and axis < ndim - 1 else None
        return self._reshaped(node, axis) if node.op_type == "Reshape" else None

    def _broadcast(self, node: onnx_ir.Node, axis: int) -> Length:
        """Return the length of an axis, counted from the end, of a sum or product of two values."""
        found = []
        for item in node.inputs:
            dims = dimensions(item) if item is not None else None
            if dims is None:
                return None
            found.append(self.length(item, axis) if -axis <= len(dims) else 1)
        longer = [length for length in found if length != 1]
        return longer[0] if len(set(longer)) == 1 else None

    def _reshaped(self, node: onnx_ir.Node, axis: int) -> Length:
        """Return the length that the target of a Reshape takes over from its input, or from another value."""
        keeps_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
        found = elements(node.inputs[1])
        item = found[axis] if found is not None and axis < len(found) else None
        if isinstance(item, DimOf):
            return self.length(item.value, item.axis)
        takes_over = isinstance(item, ConstantElement) and item.number == 0 and not keeps_zero
        return self.length(node.inputs[0], axis) if takes_over else None
