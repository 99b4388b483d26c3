"""Match a traced pattern at a node: complete search over commuted inputs, alternatives and places of further roots.

`Matcher` compiles a pattern once into closures (`compiler`), and runs them at one node after another.
"""

from __future__ import annotations

from typing import Any

import onnx_ir

from passopt.passes.patterns.compiler import PatternCompiler
from passopt.passes.patterns.language import Alternatives, NodePattern, Output, Pattern, ValuePattern
from passopt.passes.patterns.quick_tests import Constants
from passopt.passes.patterns.root_search import UNSET


class Match:
    """One way in which a pattern matched: what the names are bound to, and the nodes, in the order of the search."""

    def __init__(self, pattern: Pattern, bindings: dict[str, Any], nodes: dict[NodePattern, onnx_ir.Node]) -> None:
        self.pattern = pattern
        self.bindings = bindings
        self.nodes = nodes

    def roots(self) -> list[onnx_ir.Value]:
        """The values that the rewrite replaces, in the order of the pattern's return."""
        outputs = [self._chosen(root) for root in self.pattern.roots]
        return [self.nodes[output.node].outputs[output.index] for output in outputs]

    def _chosen(self, root: ValuePattern) -> Output:
        while isinstance(root, Alternatives):
            root = root.choices[self.bindings[root.name]]
        assert isinstance(root, Output)
        return root


class Matcher:
    """A pattern made ready for graphs of one opset. The matchers of a run share what `constants` has read."""

    def __init__(self, pattern: Pattern, opset: int, constants: Constants | None = None) -> None:
        self.pattern = pattern
        compiler = PatternCompiler(opset, constants or Constants())
        self._start = compiler.pattern(pattern)
        self._registers = [UNSET] * compiler.size  # copied for every match
        self._nodes = tuple(compiler.nodes.items())
        self._names = tuple(compiler.names.items())

    def match(self, node: onnx_ir.Node) -> Match | None:
        """The first way in which the first root matches `node`, whose operator is one of `root_keys`; or None."""
        registers = self._registers.copy()
        if not self._start(node, registers):
            return None
        bindings = {name: registers[slot] for name, slot in self._names if registers[slot] is not UNSET}
        nodes = {pattern: registers[slot] for pattern, slot in self._nodes if registers[slot] is not UNSET}
        return Match(self.pattern, bindings, nodes)
