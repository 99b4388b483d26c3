"""Rewrite attention over [batch·heads, …] as attention over [batch, heads, …] (the unmerge-heads pass)."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import onnx_ir

from passopt.ir.shapes.dimensions import Dimension, dimensions, same
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

_ARITHMETIC = frozenset({"MatMul", "Add", "Sub", "Mul", "Div", "Softmax", "Cast"})


@dataclasses.dataclass(frozen=True)
class UnmergeHeads(RewritePass):
    """Keep batch and heads apart, as most models write attention: Bloom merges them into one axis for `baddbmm`.

    Before: ``y = Reshape(MatMul(Reshape(q, [b·h, s, d]), Transpose(Reshape(k, [b·h, t, d]))), [b, h, s, t])``
    After:  ``y = MatMul(q, Transpose(k))`` on [b, h, …]
    The pass goes back through products, sums, scalings, softmax and casts, up to values that have both axes already.
    """

    name = "unmerge-heads"
    after = ("canonicalize",)

    def pattern(self, op: Any, merged: Any, shape: Any) -> Any:
        return op.Reshape(merged, shape, bind="result")

    def rewrite(self, op: Rewriter, merged: Any, result: Any) -> Any:
        inner, outer = dimensions(merged) or [], dimensions(result) or []
        heads = outer[1] if len(outer) == 4 else None
        if not isinstance(heads, int) or not _parts_heads(inner, outer):
            raise Decline(f"{merged.name} {inner} → {outer} does not split [batch·heads, …] into batch and heads")
        node = merged.producer()
        if node is None or node.op_type not in _ARITHMETIC:
            raise Decline(f"{merged.name} is not computed with batch and heads merged")
        return _Unmerging(op, outer[0], heads).value(merged)


def _parts_heads(inner: list[Dimension], outer: list[Dimension]) -> bool:
    """Return True if a Reshape takes [b·h, x, y] to [b, h, x, y].

    An exporter may state one of x and y as `(seq**2)//seq`; that it is the same length follows from the other axes.
    """
    if len(inner) != 3:
        return False
    equal = [before is not None and before == after for before, after in zip(inner[1:], outer[2:])]
    return all(equal) or (any(equal) and inner[0] == f"{outer[1]}*{outer[0]}")


@dataclasses.dataclass(frozen=True)
class _Unmerging:
    """Rebuild values [batch·heads, x, y] as [batch, heads, x, y], with the same elements in the same order."""

    op: Any
    batch: Dimension
    heads: int

    def value(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """Return `value` rebuilt as [batch, heads, x, y].

        Raises Decline if it is computed in a way that has no form with batch and heads apart.
        """
        node, dims = value.producer(), dimensions(value) or []
        if len(dims) != 3 or node is None or node.domain:
            raise Decline(f"{value.name} {dims} does not have batch and heads merged in front of two axes")
        if node.op_type == "Reshape":
            return self._before_merging(value, node.inputs[0], dims[1:])
        perm, axis = node.attributes.get("perm"), node.attributes.get("axis")
        if node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [0, 2, 1]:
            return self._shaped(self.op.Transpose(self.value(_first(node)), perm=[0, 1, 3, 2]), dims[1:])
        if node.op_type == "Softmax" and (axis.as_int() if axis is not None else -1) in {-1, 2}:
            return self._shaped(self.op.Softmax(self.value(_first(node)), axis=-1), dims[1:])
        if node.op_type == "Cast":
            return self._shaped(self.op.Cast(self.value(_first(node)), to=node.attributes["to"].as_int()), dims[1:])
        if node.op_type in _ARITHMETIC - {"Softmax"}:
            return self._shaped(self.op.node(node.op_type, *map(self._operand, node.inputs)), dims[1:])
        raise Decline(f"{value.name} comes from {node.op_type}, which has no form with batch and heads apart")

    def _operand(self, value: onnx_ir.Value | None) -> onnx_ir.Value:
        """Rebuild an operand; a single number, such as a scale, stays, because it broadcasts to any shape."""
        assert value is not None
        constant = small_constant(value)
        return value if constant is not None and constant.size == 1 else self.value(value)

    def _before_merging(
        self, value: onnx_ir.Value, source: onnx_ir.Value | None, rest: list[Dimension]
    ) -> onnx_ir.Value:
        """Return `source`, which a Reshape merged into `value`, as [batch, heads, *rest]."""
        before = dimensions(source) or [] if source is not None else []
        if before[:1] == [self.batch] and same(before[1:], [self.heads, *rest]):
            assert source is not None
            return source
        if None in before:
            raise Decline(f"{value.name} merges {before}, whose lengths are not all known")
        if collections.Counter(_long(before)) != collections.Counter(_long([self.batch, self.heads, *rest])):
            raise Decline(f"{value.name} merges {before}, not {[self.batch, self.heads, *rest]}")
        lengths = [
            [dim] if isinstance(dim, int) else self.op.Shape(value, start=axis, end=axis + 1)
            for axis, dim in enumerate(rest, start=1)
        ]
        return self._shaped(self.op.Reshape(source, self.op.Concat([-1], [self.heads], *lengths, axis=0)), rest)

    def _shaped(self, value: onnx_ir.Value, rest: list[Dimension]) -> onnx_ir.Value:
        """State that `value` is [batch, heads, *rest], and return it.

        Shape inference does not see through the arithmetic of a Reshape's target, but later rules need these lengths.
        """
        value.shape = onnx_ir.Shape([self.batch, self.heads, *rest])
        return value


def _long(dims: list[Dimension]) -> list[Dimension]:
    """Return the dimensions other than 1."""
    return [dim for dim in dims if dim != 1]


def _first(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
