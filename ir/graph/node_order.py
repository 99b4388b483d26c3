"""Tell which of two nodes of a graph comes first, and stay up to date on insertion without renumbering all nodes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

#: If the gap between two nodes gets narrower than this, the whole graph is numbered again.
_NARROWEST = 1e-9


class NodeOrder:
    """Gives each node of a graph a number that grows with its position, and leaves room for numbers in between.

    Whoever inserts nodes must report them with `insert`. If a node without a number is asked for, the graph is numbered
    again. A removed node keeps its number, which then means nothing.
    """

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._positions: dict[onnx_ir.Node, float] = {}
        #: For each node, the limits below and above it between which numbers are free.
        self._gaps: dict[onnx_ir.Node, tuple[float, float]] = {}

    def position(self, node: onnx_ir.Node) -> float:
        """Return the node's number, which is smaller for a node that comes first; the node must be in the graph."""
        if node not in self._positions:
            self._count()
        return self._positions[node]

    def insert(
        self, nodes: Sequence[onnx_ir.Node], *, before: onnx_ir.Node | None = None, after: onnx_ir.Node | None = None
    ) -> None:
        """Report that these nodes, in this order, were inserted next to a node, or at the end if none is given.

        Args:
            nodes: The inserted nodes.
            before: The node in front of which they stand.
            after: The node behind which they stand; it takes precedence over `before`.
        """
        anchor = after if after is not None else before
        if not nodes or not self._positions:
            return
        if anchor is None or anchor not in self._positions:
            self._positions.clear()
            return
        position, (low, high) = self._positions[anchor], self._gaps[anchor]
        start, end = (position, high) if after is not None else (low, position)
        step = (end - start) / (len(nodes) + 1)
        if step < _NARROWEST:
            self._positions.clear()
            return
        for index, node in enumerate(nodes, start=1):
            place = start + index * step
            self._positions[node] = place
            self._gaps[node] = (place - step / 2, place + step / 2)
        self._gaps[anchor] = (low, position + step / 2) if after is not None else (position - step / 2, high)

    def _count(self) -> None:
        self._positions = {node: float(index) for index, node in enumerate(self._graph)}
        self._gaps = {node: (place - 0.5, place + 0.5) for node, place in self._positions.items()}
