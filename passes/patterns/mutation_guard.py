"""Check that a rewrite did not change the graph itself: a rewrite builds nodes, and the driver replaces and removes.

If a rewrite changed a node that other nodes still read, the fault would show up far away from the rule that caused it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import VerifyError
from passopt.ir.graph.editor import use_count
from passopt.ir.graph.provenance import called, described

#: If a value has more readers than this, only their number is compared, since all layers may read one mask.
_FEW_READERS = 8


class Untouched:
    """A record of the matched part of a graph before a rewrite: its nodes, their readers, and the graph's outputs.

    Making and checking it takes time in proportion to the match, not to the graph.
    """

    def __init__(self, graph: onnx_ir.Graph, nodes: Iterable[onnx_ir.Node]) -> None:
        self._graph = graph
        self._count = len(graph)
        self._outputs = _outputs(graph)
        self._nodes = [(node, *_facts(node)) for node in nodes]
        values = dict.fromkeys(value for node, *_ in self._nodes for value in (*node.inputs, *node.outputs))
        self._uses = [(value, use_count(value)) for value in values if value is not None]
        own = (value for node, *_ in self._nodes for value in node.outputs)
        self._readers = [(value, set(value.uses())) for value in own if use_count(value) <= _FEW_READERS]

    def check(self, where: str, root: str | None, built: Sequence[onnx_ir.Node]) -> None:
        """Compare the graph with the record.

        Args:
            where: The rule's name and source line, for the message.
            root: The name of the value that the rewrite was to replace, for the message.
            built: The nodes that the rewrite made. They may read any value.

        Raises:
            VerifyError: If a matched node, one of its readers or the graph's outputs changed.
        """
        fault = self._fault(built)
        if fault:
            raise VerifyError(
                f"{where}: its rewrite at {root!r} {fault}. "
                f"A rule only builds nodes and returns values; the driver replaces and removes."
            )

    def _fault(self, built: Sequence[onnx_ir.Node]) -> str:
        """Say what the rewrite changed, as the end of a sentence; "" if it changed nothing."""
        for node, kind, inputs, attributes, outputs in self._nodes:
            if node.graph is None:
                return f"removed {called(node)}{_read_by(node.outputs)}"
            now = _facts(node)
            # Attributes are compared by identity: they are immutable, and comparing their tensors would read them.
            same_attributes = len(now[2]) == len(attributes) and all(x is y for x, y in zip(now[2], attributes))
            if now[0] != kind or now[3] != outputs or not same_attributes or not _same_values(now[1], inputs):
                what = described(kind[1], node.name, [name for name, _ in outputs])
                return f"changed {what}{_read_by(node.outputs)}"
        new = collections.Counter(value for node in built for value in node.inputs)
        for value, count in self._uses:
            if use_count(value) - new[value] != count:
                return f"changed who reads {value.name!r}"
        made = set(built)
        for value, readers in self._readers:
            if {use for use in value.uses() if use.node not in made} != readers:
                return f"changed who reads {value.name!r}"
        return self._fault_of_graph()

    def _fault_of_graph(self) -> str:
        now = _outputs(self._graph)
        if now != self._outputs:
            dropped = next((output for output in self._outputs if output not in now), None)
            return (
                f"dropped the graph output {dropped.name!r}" if dropped is not None else "changed the graph's outputs"
            )
        if len(self._graph) != self._count:
            return f"changed the graph from {self._count} to {len(self._graph)} nodes"
        return ""


def _outputs(graph: onnx_ir.Graph) -> tuple[onnx_ir.Value, ...]:
    return tuple(graph.outputs.data)  # type: ignore[attr-defined]  # ten times as fast as iterating over the container


def _facts(node: onnx_ir.Node) -> tuple[tuple[str, str], Sequence[onnx_ir.Value | None], tuple[Any, ...], list[Any]]:
    outputs = [(value.name, value.dtype) for value in node.outputs]
    return (node.domain, node.op_type), node.inputs, tuple(node.attributes.data.values()), outputs


def _same_values(now: Sequence[onnx_ir.Value | None], before: Sequence[onnx_ir.Value | None]) -> bool:
    return now is before or (len(now) == len(before) and all(x is y for x, y in zip(now, before)))


def _read_by(values: Iterable[onnx_ir.Value]) -> str:
    names = dict.fromkeys(use.node.name or called(use.node) for value in values for use in value.uses())
    return f", which {', '.join(names)} still read" if names else ""
