"""Rewrite what exporters spell in many ways to one spelling (the canonicalize pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.shapes.dimensions import dimensions, is_zero_with
from passopt.ir.shapes.elements import ConstantElement, DimOf, elements, target_lengths
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass

_END = 2**31 - 1
#: Below this opset Dropout trains unless its attribute is_test is set; from this one on it never does.
_DROPOUT_WITHOUT_TRAINING = 7


@dataclasses.dataclass(frozen=True)
class Canonicalize(RewritePass):
    """Remove operators that leave data as it is, so that patterns see what a graph computes.

    Before: ``Transpose(x, perm=[0, 1])``, ``Slice(x, 0, end)``, ``Concat(x)``, ``Dropout(x)``, or ``CastLike(x, y)``
    After:  ``x``, and ``Cast(x, to=…)`` for the last; a Dropout that may train stays
    A chain of Transpose or of Reshape becomes one operator. A Transpose of the last two axes that goes through three
    axes becomes a plain Transpose, and a look-up by GatherND with one index becomes a Gather.
    """

    name = "canonicalize"

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [
            (self.transpose_of_transpose, self.compose),
            (self.transpose, self.drop_still_transpose),
            (self.alone, self.drop_alone),
            (self.slice, self.drop_whole_slice),
            (self.slice_by_one, self.drop_steps),
            (self.expand, self.drop_same_shape),
            (self.transpose_in_three_axes, self.transpose_directly),
            (self.reshape_of_reshape, self.reshape_once),
            (self.reshape, self.drop_same_shape),
            (self.squeeze_of_unsqueeze, self.drop_pair),
            (self.times_one, self.drop_times_one),
            (self.cast_like, self.cast),
            (self.gather_rows, self.gather),
            (self.dropout, self.drop_dropout),
        ]

    def transpose(self, op: Any, x: Any, perm: Any) -> Any:
        """Match a Transpose, which is dropped if it moves no axis."""
        return op.Transpose(x, perm=perm)

    def drop_still_transpose(self, op: Any, x: Any, perm: Any) -> Any:
        if list(perm) != sorted(perm):
            raise Decline(f"perm {list(perm)} moves axes")
        return x

    def transpose_of_transpose(self, op: Any, x: Any, first: Any, second: Any) -> Any:
        """Match two Transposes in a row, which become one or none."""
        return op.Transpose(op.Transpose(x, perm=first), perm=second)

    def compose(self, op: Any, x: Any, first: Any, second: Any) -> Any:
        perm = [first[axis] for axis in second]
        return x if perm == sorted(perm) else op.Transpose(x, perm=perm)

    def alone(self, op: Any, x: Any) -> Any:
        """Match an operator of any number of inputs that has only one, which takes its place."""
        return op.any_op("kind", ("Concat", "Max", "Min", "Sum", "Mean"), x)

    def drop_alone(self, op: Any, x: Any) -> Any:
        return x

    def slice(self, op: Any, x: Any, starts: Any, ends: Any, axes: Any) -> Any:
        """Match a Slice without steps, which is dropped if it takes all of its input."""
        return op.Slice(x, starts, ends, axes, bind="result")

    def slice_by_one(self, op: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
        """Match a Slice with steps, which are dropped if all are 1."""
        return op.Slice(x, starts, ends, axes, steps)

    def drop_steps(self, op: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
        if (op.constant(steps) != 1).any():
            raise Decline(f"takes every {op.constant(steps).tolist()}th element")
        return op.Slice(x, starts, ends, axes)

    def drop_whole_slice(self, op: Any, x: Any, starts: Any, ends: Any, axes: Any, result: Any) -> Any:
        if _same_known_shape(x, result):
            return x
        dims = dimensions(x) or []
        numbers = [op.constant(value).reshape(-1).tolist() for value in (starts, ends, axes)]
        for start, end, axis in zip(*numbers, strict=True):
            length = dims[axis] if dims else None
            reaches_end = end >= _END or (isinstance(length, int) and end >= length)
            if start != 0 or not reaches_end:
                raise Decline(f"takes {start} to {end} of axis {axis} of {x.name} {dims}, not all of it")
        return x

    def expand(self, op: Any, x: Any, shape: Any) -> Any:
        """Match an Expand, which is dropped if it keeps the shape."""
        return op.Expand(x, shape, bind="result")

    def reshape(self, op: Any, x: Any, shape: Any) -> Any:
        """Match a Reshape, which is dropped if it keeps the shape."""
        return op.Reshape(x, shape, bind="result")

    def drop_same_shape(self, op: Any, x: Any, shape: Any, result: Any) -> Any:
        if not is_own_shape(x, shape) and not _same_known_shape(x, result):
            raise Decline(f"{x.name} {dimensions(x)} becomes {dimensions(result)}")
        return x

    def transpose_in_three_axes(self, op: Any, x: Any, merged: Any, restored: Any) -> Any:
        """Match torch's key of scaled dot product attention: [b, h, t, d] → [b·h, t, d] → … → [b, h, d, t]."""
        return op.Reshape(op.Transpose(op.Reshape(x, merged), perm=[0, 2, 1]), restored, bind="result")

    def transpose_directly(self, op: Any, x: Any, merged: Any, restored: Any) -> Any:
        dims = dimensions(x) or []
        if len(dims) != 4:
            raise Decline(f"{x.name} {dims} does not have four axes")
        inside, outside = elements(merged) or [], elements(restored) or []
        if len(inside) != 3 or not all(_is_length(item, x, axis) for item, axis in zip(inside[1:], (2, 3))):
            raise Decline(f"{x.name} {dims} is not merged to [batch·heads, length, channels]")
        if len(outside) != 4 or not all(_is_length(item, x, axis) for item, axis in zip(outside, (0, 1, 3, 2))):
            raise Decline(f"the result is not [batch, heads, channels, length] of {x.name} {dims}")
        return op.Transpose(x, perm=[0, 1, 3, 2])

    def reshape_of_reshape(self, op: Any, x: Any, inner: Any, shape: Any) -> Any:
        """Match two Reshapes in a row, which become one or none."""
        zero = op.maybe(op.variable("allowzero"))
        return op.Reshape(op.Reshape(x, inner, bind="between"), shape, allowzero=zero, bind="result")

    def reshape_once(self, op: Any, x: Any, shape: Any, between: Any, result: Any, allowzero: Any) -> Any:
        if len(between.uses()) > 1 or between.is_graph_output():
            raise Decline(f"others read {between.name}, so that both reshapes stay")
        if is_own_shape(x, shape) or _same_known_shape(x, result):
            return x
        if not allowzero and not _means_same_lengths(x, between, shape):
            raise Decline(f"the target {shape.name} may hold a 0, which means a length of the reshape between")
        return op.Reshape(x, shape, **({"allowzero": 1} if allowzero else {}))

    def squeeze_of_unsqueeze(self, op: Any, x: Any, added: Any, removed: Any) -> Any:
        """Match a Squeeze of an Unsqueeze; both are dropped if they name the same axes."""
        return op.Squeeze(op.Unsqueeze(x, added), removed)

    def drop_pair(self, op: Any, x: Any, added: Any, removed: Any) -> Any:
        dims = dimensions(x)
        if dims is None:
            raise Decline(f"the shape of {x.name} is unknown")
        axes = [op.constant(value).reshape(-1).tolist() for value in (added, removed)]
        ndim = len(dims) + len(axes[0])
        here, there = (sorted(axis % ndim for axis in item) for item in axes)
        if here != there:
            raise Decline(f"adds axes {here} and removes {there}")
        return x

    def times_one(self, op: Any, x: Any) -> Any:
        """Match a product with, or a quotient by, a constant number, which is dropped if that is 1."""
        one = op.scalar("one")
        return op.any_of("kind", product=op.Mul(x, one), quotient=op.Div(x, one))

    def drop_times_one(self, op: Any, x: Any, one: Any) -> Any:
        array = op.constant(one)
        if array.reshape(-1)[0] != 1:
            raise Decline(f"{one.name} is {array.reshape(-1)[0]}, not 1")
        if array.ndim and (x.shape is None or len(x.shape) < array.ndim):
            raise Decline(f"{x.name} may be broadcast to {array.ndim} axes")
        return x

    def cast_like(self, op: Any, x: Any, like: Any) -> Any:
        """Match a CastLike, which becomes a Cast to the dtype of its second input that rounds in the same way."""
        return op.CastLike(x, like, bind="result")

    def cast(self, op: Any, x: Any, like: Any, result: Any) -> Any:
        if like.dtype is None:
            raise Decline(f"the dtype of {like.name} is unknown")
        kept = {name: item.value for name, item in result.producer().attributes.items()}
        return x if like.dtype == x.dtype else op.Cast(x, to=like.dtype.value, **kept)

    def gather_rows(self, op: Any, table: Any, ids: Any, axis: Any) -> Any:
        """Match a GatherND that looks up rows of a table by one index each."""
        return op.GatherND(table, op.Unsqueeze(ids, axis), batch_dims=0)

    def gather(self, op: Any, table: Any, ids: Any, axis: Any) -> Any:
        dims = dimensions(ids)
        if dims is None or op.constant(axis).reshape(-1).tolist() not in ([-1], [len(dims)]):
            raise Decline(f"{ids.name} {dims} does not hold one index per row")
        return op.Gather(table, ids, axis=0)

    def dropout(self, op: Any, x: Any) -> Any:
        """Match a Dropout, which is dropped unless it may train, or its mask is read."""
        return op.Dropout(x, op.rest("options"), bind="kept")

    def drop_dropout(self, op: Any, x: Any, options: Any, kept: Any) -> Any:
        node = kept.producer()
        if op.opset < _DROPOUT_WITHOUT_TRAINING and not _is_test(node):
            raise Decline(f"{kept.name} is of an opset below 7, where Dropout trains unless it says is_test")
        if len(options) > 1 and options[1] is not None and op.constant(options[1]).any():
            raise Decline(f"{kept.name} is in training mode")
        for mask in node.outputs[1:]:
            if mask.uses() or mask.is_graph_output():
                raise Decline(f"the mask {mask.name} is read")
        return x


def _is_test(node: onnx_ir.Node) -> bool:
    """Return True for a Dropout of an old opset that is told to keep its input."""
    attribute = node.attributes.get("is_test")
    return attribute is not None and attribute.as_int() != 0


def is_own_shape(x: onnx_ir.Value, shape: onnx_ir.Value) -> bool:
    """Return True if the target shape consists of the lengths of `x` itself."""
    dims, target = dimensions(x), elements(shape)
    if dims is None or target is None or len(dims) != len(target):
        return False
    return all(_is_length(item, x, axis) for axis, item in enumerate(target))


def _means_same_lengths(x: onnx_ir.Value, between: onnx_ir.Value, shape: onnx_ir.Value) -> bool:
    """Return True if no element of a target is 0, or if a 0 means the same length in both values."""
    target, here, there = target_lengths(shape), dimensions(x) or [], dimensions(between) or []
    if target is None:
        return False
    for axis, length in enumerate(target):
        if isinstance(length, int) and length:
            continue
        one, other = (dims[axis] if axis < len(dims) else None for dims in (here, there))
        both_vanish = isinstance(length, str) and is_zero_with(length, [one]) and is_zero_with(length, [other])
        if not both_vanish and (one is None or one != other):
            return False
    return True


def _is_length(item: object, x: onnx_ir.Value, axis: int) -> bool:
    """Return True if an element of a target shape is the length of this axis of `x`."""
    dim = (dimensions(x) or [])[axis]
    if isinstance(item, ConstantElement):
        return item.number == dim
    if not isinstance(item, DimOf):
        return False
    if item.value is x and item.axis == axis:
        return True
    other = (dimensions(item.value) or [])[item.axis]
    return dim is not None and other == dim


def _same_known_shape(x: onnx_ir.Value, result: onnx_ir.Value) -> bool:
    """Return True if both shapes are stated in full and are equal.

    A symbol means the same length wherever it stands.
    """
    dims, others = dimensions(x), dimensions(result)
    return dims is not None and dims == others and None not in dims
