"""What a rewrite may not do: change the graph that it matched in. It builds nodes; the driver replaces and removes.

A node that others still read would otherwise change under them, and the fault show far from the rule that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import VerifyError


class Untouched:
    """The matched nodes, who reads what they read and give, and the graph's outputs, as they stood before a rewrite."""

    def __init__(self, graph: onnx_ir.Graph, nodes: Iterable[onnx_ir.Node]) -> None:
        self._graph = graph
        self._count = len(graph)
        self._outputs = tuple(graph.outputs)
        self._nodes = [(node, _facts(node)) for node in nodes]
        self._readers = [(value, set(value.uses())) for node, _ in self._nodes for value in node.outputs]
        # All layers may read one mask: its readers are counted, and those of a constant not even that.
        read = {value for node, _ in self._nodes for value in node.inputs if value is not None}
        read -= {value for value, _ in self._readers}
        self._counts = [(value, len(value.uses())) for value in read if value.const_value is None]

    def check(self, where: str, root: str | None, built: Sequence[onnx_ir.Node]) -> None:
        """Raise VerifyError, naming the rule `where` and its site, if anything is not as it was.

        `built` are the nodes that the rewrite made; they may read whatever they like.
        """
        fault = self._fault(set(built))
        if fault:
            raise VerifyError(
                f"{where}: its rewrite at {root!r} {fault}. "
                f"A rule only builds nodes and returns values; the driver replaces and removes."
            )

    def _fault(self, built: set[onnx_ir.Node]) -> str:
        for node, facts in self._nodes:
            if node.graph is None:
                return f"removed {node.op_type} {node.name!r}{_read_by(node.outputs)}"
            if _facts(node) != facts:
                return f"changed {facts[1]} {node.name!r}{_read_by(node.outputs)}"
        for value, before in self._readers:
            if {use for use in value.uses() if use.node not in built} != before:
                return f"changed who reads {value.name!r}"
        for value, count in self._counts:
            if len(value.uses()) - sum(item is value for node in built for item in node.inputs) != count:
                return f"changed who reads {value.name!r}"
        for output in self._outputs:
            if output not in self._graph.outputs:
                return f"dropped the graph output {output.name!r}"
        if tuple(self._graph.outputs) != self._outputs:
            return "changed the graph's outputs"
        if len(self._graph) != self._count:
            return f"changed the graph from {self._count} to {len(self._graph)} nodes"
        return ""


def _facts(node: onnx_ir.Node) -> tuple[Any, ...]:
    """Attributes by identity: they are immutable, and comparing their tensors would read them."""
    attributes = tuple((name, id(attribute)) for name, attribute in node.attributes.items())
    outputs = tuple((value.name, value.dtype) for value in node.outputs)
    return node.domain, node.op_type, tuple(map(id, node.inputs)), attributes, outputs


def _read_by(values: Iterable[onnx_ir.Value]) -> str:
    names = dict.fromkeys(str(use.node.name) for value in values for use in value.uses())
    return f", which {', '.join(names)} still read" if names else ""
