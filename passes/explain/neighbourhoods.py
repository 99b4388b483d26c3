"""Survey what a search sees of the graph from a node on, so that one layer is searched for all equal ones.

Two places of one key have the same operators, attributes, constants and sharing of values, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import Difference, Words, found_words

#: If more nodes read a value, they are not surveyed: a mask, for example, is read by every layer.
_MOST_USERS = 4


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """The nodes around a place and the names of the values there, in one order for all places of the same key."""

    key: Hashable
    nodes: Sequence[onnx_ir.Node]
    names: Sequence[str]

    def moved(self, attempt: Attempt, other: Neighbourhood) -> Attempt | None:
        """Return an attempt found here, as it stands at `other`, which has the same key.

        Returns None if the attempt reaches beyond this neighbourhood.
        """
        nodes = dict(zip(self.nodes, other.nodes, strict=True))
        names = {"": "", **dict(zip(self.names, other.names, strict=True))}
        try:
            laid = {pattern: nodes[node] for pattern, node in attempt.nodes.items()}
            differences = tuple(_moved(item, nodes, names) for item in attempt.differences)
        except KeyError:
            return None
        return dataclasses.replace(attempt, nodes=laid, differences=differences, bindings={})


def _moved(item: Difference, nodes: dict[onnx_ir.Node, onnx_ir.Node], names: dict[str, str]) -> Difference:
    """Return the difference as it stands at the other place."""
    return dataclasses.replace(
        item,
        node=nodes[item.node],
        found_node=nodes[item.found_node] if item.found_node is not None else None,
        expected=Words(item.expected.text, names[item.expected.symbol]),
        found=Words(item.found.text, names[item.found.symbol]),
    )


class Surveyor:
    """Make the neighbourhoods of one graph."""

    def __init__(self) -> None:
        self._of_node: dict[onnx_ir.Node, Hashable] = {}
        self._of_leaf: dict[onnx_ir.Value, Hashable] = {}
        self._kinds: dict[int, dict[onnx_ir.Node, int]] = {}

    def kinds(self, graph: onnx_ir.Graph, levels: int) -> dict[onnx_ir.Node, int]:
        """Return a number per node that is equal where the trees of `levels` operators above the nodes are.

        Above a node is what it is computed from. This is cheap, and does not see which values are shared.
        """
        if levels not in self._kinds:
            own = {node: hash(self._node(node)) for node in graph}
            found = own
            for _ in range(levels):
                found = {node: hash((own[node], *(self._above(value, found) for value in node.inputs))) for node in own}
            self._kinds[levels] = found
        return self._kinds[levels]

    def _above(self, value: onnx_ir.Value | None, kinds: dict[onnx_ir.Node, int]) -> Hashable:
        if value is None:
            return None
        producer = value.producer()
        return self._leaf(value) if producer is None else (kinds.get(producer), value.index())

    def survey(self, starts: Sequence[onnx_ir.Node], levels: int, *, users: bool) -> Neighbourhood:
        """Survey what lies up to `levels` operators above the start nodes, that is, what they are computed from.

        With `users`, also survey who reads these values.
        """
        nodes: dict[onnx_ir.Node, int] = {node: index for index, node in enumerate(starts)}
        values: dict[onnx_ir.Value, int] = {}
        key: list[Hashable] = []
        edge = list(starts)
        for _ in range(levels):
            above: list[onnx_ir.Node] = []
            for node in edge:
                key.append(self._node(node))
                for value in node.inputs:
                    key.append(self._input(value, nodes, values, above))
                self._outputs(node, nodes, values, key, users)
            edge = above
        for node in edge:
            key.append(self._node(node))
            self._outputs(node, nodes, values, key, users=False)
        return Neighbourhood(tuple(key), list(nodes), [value.name or "" for value in values])

    def _input(
        self,
        value: onnx_ir.Value | None,
        nodes: dict[onnx_ir.Node, int],
        values: dict[onnx_ir.Value, int],
        above: list[onnx_ir.Node],
    ) -> Hashable:
        if value is None or value in values:
            return None if value is None else values[value]
        values[value] = len(values)
        producer = value.producer()
        if producer is None:
            return self._leaf(value)
        if producer not in nodes:
            nodes[producer] = len(nodes)
            above.append(producer)
        return nodes[producer], value.index()

    def _outputs(
        self,
        node: onnx_ir.Node,
        nodes: dict[onnx_ir.Node, int],
        values: dict[onnx_ir.Value, int],
        key: list[Hashable],
        users: bool,
    ) -> None:
        for value in node.outputs:
            values.setdefault(value, len(values))
            consumers = value.consumers() if users else ()
            if len(consumers) > _MOST_USERS:
                continue
            for user in consumers:
                key.append((self._node(user), nodes.setdefault(user, len(nodes))))
                for output in user.outputs:
                    values.setdefault(output, len(values))

    def _node(self, node: onnx_ir.Node) -> Hashable:
        if node not in self._of_node:
            self._of_node[node] = (node.domain, node.op_type, len(node.outputs), attributes_key(node))
        return self._of_node[node]

    def _leaf(self, value: onnx_ir.Value) -> Hashable:
        if value not in self._of_leaf:
            constant = small_constant(value)
            content = constant.tobytes() if constant is not None else b""
            self._of_leaf[value] = found_words(value).text, content
        return self._of_leaf[value]
