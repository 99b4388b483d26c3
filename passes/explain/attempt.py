"""An attempt to lay a pattern over a graph, with everything that does not fit. Immutable: a search keeps several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir

from passopt.passes.explain.differences import Difference, Words
from passopt.passes.patterns.language import NodePattern

#: Kinds of differences at a node of the right operator.
DETAILS = frozenset({"attribute", "constant", "weight", "value", "inputs", "outputs"})


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to lay a pattern over the graph. `total` counts the nodes of the alternatives that were chosen."""

    nodes: Mapping[NodePattern, onnx_ir.Node] = dataclasses.field(default_factory=dict)
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    matched: int = 0
    missed: frozenset[NodePattern] = frozenset()

    @property
    def total(self) -> int:
        return self.matched + len(self.missed)

    @property
    def score(self) -> int:
        """What fits, less what is missing, less two for another operator and one for another detail.

        So stepping over an operator must pay, and a spelling of the right operators is nearer than one of others.
        """
        absent = sum(pattern not in self.nodes for pattern in self.missed)
        return self.matched - absent - sum(1 if item.kind in DETAILS else 2 for item in self.differences)

    def differs(self, difference: Difference, missed: Iterable[NodePattern] = ()) -> Attempt:
        """With one difference more; `missed` are the pattern nodes that are given up for it."""
        return dataclasses.replace(self, differences=(*self.differences, difference)).gives_up(missed)

    def lays(self, pattern: NodePattern, node: onnx_ir.Node) -> Attempt:
        """With a pattern node laid over a node; whether it fits is not said."""
        return dataclasses.replace(self, nodes={**self.nodes, pattern: node}, missed=self.missed - {pattern})

    def allows(self, labels: Mapping[str, str]) -> bool:
        """True if no other label of these alternatives was taken."""
        return all(self.bindings.get(name, label) == label for name, label in labels.items())

    def binds(self, name: str, value: Any) -> Attempt:
        return dataclasses.replace(self, bindings={**self.bindings, name: value})

    def expects(self, index: int, expected: Words) -> Attempt:
        """With other words for what difference `index` expected."""
        changed = dataclasses.replace(self.differences[index], expected=expected)
        return dataclasses.replace(
            self, differences=(*self.differences[:index], changed, *self.differences[index + 1 :])
        )

    def takes(self, labels: Mapping[str, str]) -> Attempt:
        """With these alternatives chosen."""
        if not labels:
            return self
        bindings, chosen = {**self.bindings, **labels}, {**self.labels, **labels}
        return dataclasses.replace(self, bindings=bindings, labels=chosen)

    def gives_up(self, nodes: Iterable[NodePattern]) -> Attempt:
        """Without these pattern nodes."""
        lost = self.missed.union(node for node in nodes if node not in self.nodes)
        return dataclasses.replace(self, missed=lost)
