"""Match a traced pattern at a node, trying all orders of commuting inputs, alternatives and places of further roots.

`Matcher` compiles a pattern once into closures (see `compiler`), and then runs them at one node after another.
"""

from __future__ import annotations

from typing import Any

import onnx_ir

from passopt.passes.patterns.compiler import PatternCompiler
from passopt.passes.patterns.language import Alternatives, NodePattern, Output, Pattern, ValuePattern
from passopt.passes.patterns.quick_tests import Constants
from passopt.passes.patterns.root_search import UNSET


class Match:
    """One way in which a pattern matched.

    Attributes:
        pattern: The pattern.
        bindings: What every bound name stands for: a value, a list of values, an attribute, a label or None.
        nodes: The graph node that each matched node pattern stands for.
    """

    def __init__(self, pattern: Pattern, bindings: dict[str, Any], nodes: dict[NodePattern, onnx_ir.Node]) -> None:
        self.pattern = pattern
        self.bindings = bindings
        self.nodes = nodes

    def roots(self) -> list[onnx_ir.Value]:
        """Return the values that the rewrite replaces, in the order in which the pattern returned its roots."""
        outputs = [self._chosen(root) for root in self.pattern.roots]
        return [self.nodes[output.node].outputs[output.index] for output in outputs]

    def _chosen(self, root: ValuePattern) -> Output:
        while isinstance(root, Alternatives):
            root = root.choices[self.bindings[root.name]]
        assert isinstance(root, Output)
        return root


class Matcher:
    """A pattern compiled for graphs of one opset; matchers that are given the same `constants` read each one once."""

    def __init__(self, pattern: Pattern, opset: int, constants: Constants | None = None) -> None:
        self.pattern = pattern
        compiler = PatternCompiler(opset, constants or Constants())
        self._start = compiler.pattern(pattern)
        self._registers = [UNSET] * compiler.size  # copied for every match
        self._nodes = tuple(compiler.nodes.items())
        self._names = tuple(compiler.names.items())

    def match(self, node: onnx_ir.Node) -> Match | None:
        """Return the first match whose first root is made by `node`, or None.

        The caller must make sure that the operator of `node` is one of the pattern's `root_keys`.
        """
        registers = self._registers.copy()
        if not self._start(node, registers):
            return None
        bindings = {name: registers[slot] for name, slot in self._names if registers[slot] is not UNSET}
        nodes = {pattern: registers[slot] for pattern, slot in self._nodes if registers[slot] is not UNSET}
        return Match(self.pattern, bindings, nodes)
