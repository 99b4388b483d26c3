"""Give linears and other nodes new weights that compute the same function, as lazy expressions."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.linears import Linear, find_linear
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.lazy_weight import expression_of
from passopt.ir.weights.scaling import beneath_shards

Change = Callable[[Expression], Expression]


class WeightChanges:
    """Replaces weights one by one; what is made of one weight in the same way becomes one initializer.

    Args:
        editor: The editor of the main graph.
        suffix: What the name of a new weight ends in.
    """

    def __init__(self, editor: Editor, suffix: str) -> None:
        self.count = 0
        self._editor = editor
        self._suffix = suffix
        self._made: dict[tuple[str | None, str], onnx_ir.Value] = {}

    def linear(self, linear: Linear, change: Change) -> None:
        """Change the float weight of a linear, which is given and kept as [n, k]."""
        node = linear.nodes[-1]
        linear = find_linear(node) or linear  # An earlier change may have given it another weight.
        weight = self._initializer(linear.weight.value, change(linear.weight.expression()))
        if node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int():
            self._set(node, 1, weight)
            return
        builder = self._editor.builder(weight.name or "weight")
        turned = builder.Transpose(weight, perm=[1, 0])
        self._editor.insert(builder.built, node, [node])
        self._set(node, 1, turned)

    def constant(self, node: onnx_ir.Node, index: int, change: Change) -> None:
        """Change a constant that is an input of a node."""
        old = node.inputs[index]
        assert old is not None
        self._set(node, index, self._initializer(old, change(constant(old))))

    def _initializer(self, old: onnx_ir.Value, weight: Expression) -> onnx_ir.Value:
        key = old.name, weight.text()
        if key not in self._made:
            builder = self._editor.builder(old.name or "weight")
            self._made[key] = builder.initializer(f"{old.name}.{self._suffix}", weight)
            self._editor.insert(builder.built, None)
        self.count += 1
        return self._made[key]

    def _set(self, node: onnx_ir.Node, index: int, new: onnx_ir.Value) -> None:
        old = node.inputs[index]
        node.replace_input_with(index, new)
        assert old is not None
        producer = old.producer()
        if producer is not None:
            self._editor.remove_dead([producer])
        else:
            self._editor.remove_unused_initializer(old)


def constant(value: onnx_ir.Value | None) -> Expression:
    """Return the expression of a value that is known to be constant."""
    found = None if value is None else expression_of(value)
    if found is None:
        raise ModelError(f"{value.name if value is not None else 'an input'} is computed, expected a constant")
    return found


def in_fp32(weight: Expression, axis: int, change: Change) -> Expression:
    """Return a weight changed in fp32 along an axis and rounded to its own dtype, below shards of other axes.

    Args:
        weight: The weight.
        axis: The axis along which `change` mixes or scales numbers.
        change: Makes the new weight of the old one in fp32.
    """

    def changed(part: Expression) -> Expression:
        return change(part.cast(DataType.FLOAT)).cast(part.dtype)

    return beneath_shards(weight, axis, changed)
