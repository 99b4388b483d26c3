"""Check what the bodies of If, Loop and Scan read from the graph around them."""

from __future__ import annotations

import onnx_ir

from passopt.ir.errors import PassError
from passopt.passes.sharding.placement import REPLICATED, Replicated
from passopt.passes.sharding.propagate import Propagation, describe


def check_captures(state: Propagation) -> None:
    """Raise PassError if the body of a node reads a value that not every rank holds whole.

    The sharding rules do not look into bodies, so these may only read replicated values.
    """
    sharded = {use.node.inputs[use.index] for use in state.constant_uses}
    for node in state.model.graph:
        for value in _captured(node):
            spec = state.specs.get(value, REPLICATED)
            if not isinstance(spec, Replicated) or value in sharded:
                found = "a weight that is sharded elsewhere" if value in sharded else spec
                raise PassError(
                    f"{describe(node)}: a subgraph reads {value.name}: expected a replicated value, found {found}"
                )


def _captured(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """List the values of outer graphs that the bodies of a node read, those of nested bodies included."""
    bodies: list[onnx_ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            bodies.extend(attribute.as_graphs())
    found: list[onnx_ir.Value] = []
    for body in bodies:
        read = [item for inner in body for item in (*inner.inputs, *_captured(inner)) if item is not None]
        inside = {*body.inputs, *body.initializers.values(), *(item for inner in body for item in inner.outputs)}
        found.extend(item for item in (*read, *body.outputs) if item not in inside)
    return found
