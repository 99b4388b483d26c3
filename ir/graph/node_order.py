"""Which of two nodes of a graph comes first, kept up to date while nodes are inserted, without counting anew."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

#: Gaps narrower than this are exhausted, and the graph is counted again.
_NARROWEST = 1e-9


class NodeOrder:
    """Positions of the nodes of a graph as numbers between which others fit.

    Whoever inserts nodes says so; nodes that entered in another way are counted when they are asked for. A removed node
    keeps its number, which means nothing.
    """

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._positions: dict[onnx_ir.Node, float] = {}
        #: The free numbers on both sides of a node.
        self._gaps: dict[onnx_ir.Node, tuple[float, float]] = {}

    def position(self, node: onnx_ir.Node) -> float:
        """Smaller for what comes first; for nodes of the graph only."""
        if node not in self._positions:
            self._count()
        return self._positions[node]

    def insert(
        self, nodes: Sequence[onnx_ir.Node], *, before: onnx_ir.Node | None = None, after: onnx_ir.Node | None = None
    ) -> None:
        """These nodes, in this order, were put right before or right after a node (neither: at the end)."""
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
