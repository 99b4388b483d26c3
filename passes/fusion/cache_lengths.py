"""Read the lengths of a grown cache off its parts, so that a mask computed from them does not depend on the cache.

GPT-2 cuts its causal mask to the length of the joined keys, or of the scores. Attention gives the joined keys itself,
so a mask that reads their length would be a cycle; the sum of both lengths is the same number, and is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rules import Rewriter

#: How many operators are looked at between the length and the softmax of a mask.
_FURTHEST = 100


def shape_of_joined(op: Any, past: Any, new: Any, along: Any, left: Any) -> Any:
    """Match the shape of joined keys, turned or not, or of the scores that they make with the queries `left`."""
    joined = op.Concat(past, new, axis=along, bind="joined")
    turned = op.Transpose(joined, perm=op.variable("perm"))
    product = op.MatMul(left, op.any_of("right", turned=turned, plain=joined))
    factor = op.scalar("factor")
    scaled = op.any_of("scores", product=op.Mul(product, factor), quotient=op.Div(product, factor), none=product)
    source = op.any_of("source", joined=joined, turned=turned, scores=scaled)
    start, end = (op.maybe(op.variable(name)) for name in ("start", "end"))
    return op.Shape(source, start=start, end=end, bind="shape")


def lengths_of_parts(
    op: Rewriter,
    past: onnx_ir.Value,
    new: onnx_ir.Value,
    along: int,
    joined: onnx_ir.Value,
    shape: onnx_ir.Value,
    left: onnx_ir.Value | None = None,
    perm: Sequence[int] | None = None,
    start: int | None = None,
    end: int | None = None,
) -> onnx_ir.Value:
    """Build the shape from those of the cache, the new keys and the queries."""
    dims = dimensions(joined) or []
    if len(dims) != 4:
        raise Decline(f"{joined.name} {dims} is no cache of four axes")
    if not _reaches_softmax(shape):
        raise Decline(f"no mask is made from the shape {shape.name}")
    axis = along % 4
    grown = op.Add(op.Shape(past, start=axis, end=axis + 1), op.Shape(new, start=axis, end=axis + 1))
    lengths = [grown if index == axis else op.Shape(past, start=index, end=index + 1) for index in range(4)]
    if perm is not None:
        lengths = [lengths[index] for index in perm]
    if left is not None:
        here, there = dimensions(left) or [], [dims[index] for index in perm] if perm is not None else dims
        if len(here) != 4 or any(one is None or one != two for one, two in zip(here[:2], there[:2])):
            raise Decline(f"{left.name} {here} and {joined.name} {dims} may be of other batches or heads")
        lengths = [op.Shape(left, start=index, end=index + 1) for index in range(3)] + lengths[3:]
    chosen = lengths[slice(start, end)]
    if not chosen:
        raise Decline(f"the shape {shape.name} is empty")
    made: onnx_ir.Value = op.Concat(*chosen, axis=0) if len(chosen) > 1 else chosen[0]
    return made


def _reaches_softmax(shape: onnx_ir.Value) -> bool:
    """Return True if something that is computed from the shape leads to a Softmax."""
    work, seen = [use.node for use in shape.uses()], set[onnx_ir.Node]()
    while work and len(seen) < _FURTHEST:
        node = work.pop(0)
        if node.op_type == "Softmax":
            return True
        if node not in seen:
            seen.add(node)
            work += [use.node for output in node.outputs for use in output.uses()]
    return False
