"""List the expansions of onnxruntime's own operators by name: functions that build what a node computes.

A node with an attribute or input that its expansion does not know is declined, since it may mean something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.editor import is_read
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.base import Decline

Values: TypeAlias = "Sequence[onnx_ir.Value | None]"
Expand: TypeAlias = Callable[[Any, onnx_ir.Node], Values]


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How a node is expanded: the function, the attributes and the number of inputs that it knows, its least opset."""

    build: Expand
    attributes: frozenset[str]
    inputs: int
    opset: int

    def __call__(self, op: Any, node: onnx_ir.Node) -> Values:
        """Build what the node computes, and return a value per output, with None for those that nobody reads.

        Raises:
            Decline: If the node has parts that are not known here, or no standard form.
        """
        if op.opset < self.opset:
            raise Decline(f"{node.op_type} needs opset {self.opset}, this model has {op.opset}; run legalize first")
        unknown = sorted(node.attributes.data.keys() - self.attributes)
        if unknown:
            raise Decline(f"{called(node)} has the attribute {unknown[0]}, which has no standard form")
        more = [value for value in node.inputs[self.inputs :] if value is not None]
        if more:
            raise Decline(f"{called(node)} reads {more[0].name}, for which there is no standard form")
        values = list(self.build(op, node))
        values += [None] * (len(node.outputs) - len(values))
        for value, output in zip(values, node.outputs, strict=False):
            if value is None and is_read(output):
                raise Decline(f"{called(node)}: its output {output.index()} has no standard form")
        return values


#: The expansions by domain and operator.
EXPANSIONS: dict[tuple[str, str], Expansion] = {}


def expands(
    *op_types: str, attributes: Collection[str] = (), inputs: int, opset: int = 13, domain: str = MICROSOFT
) -> Callable[[Expand], Expand]:
    """Register a function as the expansion of operators.

    Args:
        *op_types: The operators.
        attributes: The attributes that it knows.
        inputs: The number of inputs that it knows.
        opset: The least version of the standard operators that it builds.
        domain: The domain of the operators.
    """

    def register(build: Expand) -> Expand:
        for op_type in op_types:
            EXPANSIONS[domain, op_type] = Expansion(build, frozenset(attributes), inputs, opset)
        return build

    return register


def ndim(value: onnx_ir.Value) -> int:
    """Return the number of axes of a value. Raises Decline if it is unknown."""
    dims = dimensions(value)
    if dims is None:
        raise Decline(f"the number of axes of {value.name} is unknown")
    return len(dims)


def known_length(value: onnx_ir.Value, axis: int) -> int:
    """Return the length of an axis. Raises Decline unless it is a known number."""
    ndim(value)
    length = (dimensions(value) or [])[axis]
    if not isinstance(length, int):
        raise Decline(f"the length of axis {axis} of {value.name} is unknown")
    return length


def length_of(op: Any, value: onnx_ir.Value, axis: int) -> Any:
    """Return the length of an axis as an int64 scalar: a number where it is known, else computed in the graph."""
    known = (dimensions(value) or [])[axis]
    if isinstance(known, int):
        return np.int64(known)
    return op.Squeeze(op.Gather(op.Shape(value), np.array([axis % ndim(value)])), [0])


def reduced_mean(op: Any, value: onnx_ir.Value, axes: list[int]) -> Any:
    """Return the mean over axes, which are kept; before opset 18, they are an attribute."""
    if op.opset < 18:
        return op.ReduceMean(value, axes=axes, keepdims=1)
    return op.ReduceMean(value, axes, keepdims=1)
