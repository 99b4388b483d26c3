"""Hold one attempt to lay a pattern over a graph, with everything that does not fit.

Attempts are immutable, because a search follows several at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir

from passopt.passes.explain.differences import Difference, Words
from passopt.passes.patterns.language import NodePattern

#: Kinds of differences at a node that has the right operator.
DETAILS = frozenset({"attribute", "constant", "weight", "value", "inputs", "outputs"})


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to lay a pattern over the graph.

    `nodes` gives the graph node that each pattern node was laid over, `bindings` what the variables and alternatives
    took, and `labels` which alternatives were chosen. `matched` counts the pattern nodes that fit; `missed` are those
    that do not, or were given up.
    """

    nodes: Mapping[NodePattern, onnx_ir.Node] = dataclasses.field(default_factory=dict)
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    matched: int = 0
    missed: frozenset[NodePattern] = frozenset()

    @property
    def total(self) -> int:
        """Return the number of pattern nodes, of the alternatives that were chosen."""
        return self.matched + len(self.missed)

    @property
    def score(self) -> int:
        """Return how near the attempt comes: the higher, the nearer.

        That is the number of nodes that fit, less one for each pattern node that was laid over nothing, less two for
        each difference of operators and one for each different detail. So stepping over an operator must pay, and a
        spelling with the right operators is nearer than one with others.
        """
        absent = sum(pattern not in self.nodes for pattern in self.missed)
        return self.matched - absent - sum(1 if item.kind in DETAILS else 2 for item in self.differences)

    def differs(self, difference: Difference, missed: Iterable[NodePattern] = ()) -> Attempt:
        """Return this attempt with one more difference, for which the pattern nodes `missed` are given up."""
        return dataclasses.replace(self, differences=(*self.differences, difference)).gives_up(missed)

    def lays(self, pattern: NodePattern, node: onnx_ir.Node) -> Attempt:
        """Return this attempt with a pattern node laid over a graph node, whether or not it fits."""
        return dataclasses.replace(self, nodes={**self.nodes, pattern: node}, missed=self.missed - {pattern})

    def allows(self, labels: Mapping[str, str]) -> bool:
        """Return True if no other label of these alternatives was taken."""
        return all(self.bindings.get(name, label) == label for name, label in labels.items())

    def binds(self, name: str, value: Any) -> Attempt:
        """Return this attempt with `name` bound to `value`."""
        return dataclasses.replace(self, bindings={**self.bindings, name: value})

    def expects(self, index: int, expected: Words) -> Attempt:
        """Return this attempt with other words for what difference number `index` expected."""
        changed = dataclasses.replace(self.differences[index], expected=expected)
        return dataclasses.replace(
            self, differences=(*self.differences[:index], changed, *self.differences[index + 1 :])
        )

    def takes(self, labels: Mapping[str, str]) -> Attempt:
        """Return this attempt with these alternatives chosen."""
        if not labels:
            return self
        bindings, chosen = {**self.bindings, **labels}, {**self.labels, **labels}
        return dataclasses.replace(self, bindings=bindings, labels=chosen)

    def gives_up(self, nodes: Iterable[NodePattern]) -> Attempt:
        """Return this attempt with these pattern nodes given up, unless they were laid over a node."""
        lost = self.missed.union(node for node in nodes if node not in self.nodes)
        return dataclasses.replace(self, missed=lost)
