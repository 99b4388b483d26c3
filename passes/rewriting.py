"""Rewrite passes: a traced pattern, a `rewrite` method, and the driver that applies them with a worklist.

The driver owns names, insertion point, order, types, provenance and the counts of tries, matches and declines.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.builder import Builder
from passopt.ir.editing import Editor, discard
from passopt.ir.errors import PassError
from passopt.ir.expressions import Expression
from passopt.ir.shapes import complete_types
from passopt.ir.weights import expression_of, small_constant
from passopt.passes.base import Decline, Pass, PassResult
from passopt.passes.matching import Match, find_match
from passopt.passes.pattern import Pattern, trace

#: A rule may fire this often per node of the graph before it is taken to loop.
_REWRITES_PER_NODE = 20


class Rewriter(Builder):
    """The `op` of a `rewrite` method: builds nodes, and reads constants and weights (declining if they are not)."""

    def __init__(
        self, opset: int, unique: Callable[[str], str], hint: str, memory: dict[Hashable, onnx_ir.Value] | None = None
    ) -> None:
        super().__init__(opset, unique, hint)
        self._memory = memory if memory is not None else {}

    def shared(self, key: Hashable, make: Callable[[], onnx_ir.Value]) -> onnx_ir.Value:
        """The initializer that `make` returns, made once for all sites of a pass: one table for every layer."""
        value = self._memory.get(key)
        if value is None:
            value = self._memory[key] = make()
        elif value not in self.built.initializers:
            self.built.initializers.append(value)
        return value

    def weight(self, value: onnx_ir.Value) -> Expression:
        """The lazy expression of a constant weight; declines for a computed value."""
        expression = expression_of(value) if not value.is_graph_input() else None
        if expression is None:
            raise Decline(f"{value.name} is not a constant weight")
        return expression

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray[Any, np.dtype[Any]]:
        """The array of a small constant; declines for anything else."""
        array = small_constant(value)
        if array is None:
            raise Decline(f"{value.name if value is not None else 'an absent input'} is not a small constant")
        return array


class RewritePass(Pass):
    """A pass of one rule. `pattern(self, op, …)` says what to match; `rewrite(self, op, …)` gives what replaces it.

    `rewrite` takes any of the pattern's variables by name and returns one value per root, in the pattern's order. It
    raises `Decline` where the rule does not apply. It never deletes a node: the driver removes what died.
    """

    def pattern(self, op: Any, *variables: Any) -> Any:
        """Trace what to match; the parameters after `op` are the variables."""
        raise NotImplementedError(f"{self.name} has no pattern")

    def rewrite(self, op: Any, *variables: Any) -> Any:
        """Build the replacement of one match."""
        raise NotImplementedError(f"{self.name} has no rewrite")

    def rules(self) -> Sequence[tuple[Callable[..., Any], Callable[..., Any]]]:
        """(pattern, rewrite) pairs, tried in order: override where one idea has roots of several operators."""
        return [(self.pattern, self.rewrite)]

    def run(self, model: onnx_ir.Model) -> PassResult:
        return _Driver(self, model).run()


class Rule:
    """A rule made ready: the traced pattern, `where` it is written, and the variables that its rewrite wants."""

    def __init__(self, owner: RewritePass, pattern: Callable[..., Any], rewrite: Callable[..., Any]) -> None:
        self.where = f"{owner.name} ({_source_line(pattern)})"
        self.pattern: Pattern = trace(pattern, self.where)
        self.rewrite = rewrite
        self.wanted = tuple(inspect.signature(rewrite).parameters)[1:]
        unknown = sorted(set(self.wanted) - set(self.pattern.variables))
        if unknown:
            raise PassError(f"{self.where}: rewrite takes {', '.join(unknown)}, which the pattern does not bind")
        first = self.pattern.root_nodes[0]
        self.root_key = (first.domain, first.op_type)


def rules_of(owner: RewritePass) -> tuple[Rule, ...]:
    """The rules of a pass, traced, in the order in which they are tried. Raises PassError for one that cannot work."""
    return tuple(Rule(owner, pattern, rewrite) for pattern, rewrite in owner.rules())


def _source_line(method: Callable[..., Any]) -> str:
    code = inspect.unwrap(method).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


class _Driver:
    def __init__(self, owner: RewritePass, model: onnx_ir.Model) -> None:
        self.owner = owner
        if any(value.type is None for node in model.graph for value in node.outputs):
            complete_types(model)  # a number takes the dtype of what it is multiplied with
        self.editor = Editor(model, owner.name)
        self.result = PassResult()
        self._memory: dict[Hashable, onnx_ir.Value] = {}
        self._rules: dict[tuple[str, str], list[Rule]] = collections.defaultdict(list)
        for rule in rules_of(owner):
            self._rules[rule.root_key].append(rule)
        self._reach = max((rule.pattern.depth for rules in self._rules.values() for rule in rules), default=0)
        self._limit = _REWRITES_PER_NODE * (len(model.graph) + 100)

    def run(self) -> PassResult:
        queue = collections.deque(node for node in self.editor.graph if self._rules_at(node))
        waiting = set(queue)
        while queue:
            node = queue.popleft()
            waiting.discard(node)
            for rule in self._rules_at(node):
                if node.graph is None:
                    break
                candidates = [made for made in self._try(rule, node) if self._rules_at(made) and made not in waiting]
                queue.extend(candidates)
                waiting.update(candidates)
        self.result.modified = self.result.matches > 0
        return self.result

    def _rules_at(self, node: onnx_ir.Node) -> Sequence[Rule]:
        return self._rules.get((node.domain, node.op_type), ())

    def _try(self, rule: Rule, node: onnx_ir.Node) -> Sequence[onnx_ir.Node]:
        """Try a rule at a node; returns the nodes that became new candidates."""
        self.result.tries += 1
        match = find_match(rule.pattern, node, self.editor.opset)
        if match is None:
            return ()
        op = Rewriter(self.editor.opset, self.editor.unique, match.roots()[0].name or node.op_type, self._memory)
        try:
            returned = rule.rewrite(op, *(match.bindings.get(name) for name in rule.wanted))
        except Decline as reason:
            discard(op.built)
            self.result.declines[str(reason)] += 1
            return ()
        self._apply(rule, match, op, returned)
        return _downstream(op.built.nodes, self._reach)

    def _apply(self, rule: Rule, match: Match, op: Rewriter, returned: Any) -> None:
        roots = match.roots()
        values = list(returned) if isinstance(returned, (list, tuple)) else [returned]
        strange = [value for value in values if not isinstance(value, onnx_ir.Value)]
        if strange:
            raise PassError(
                f"{self.owner.name} ({_source_line(rule.rewrite)}): rewrite returned {strange[0]!r}, "
                f"expected a value per root, at {roots[0].name!r}"
            )
        if len(values) != len(roots):
            raise PassError(
                f"{self.owner.name} ({_source_line(rule.rewrite)}): rewrite returned {len(values)} values "
                f"for {len(roots)} roots at {roots[0].name!r}"
            )
        self.result.matches += 1
        if self.result.matches > self._limit:
            raise PassError(
                f"{rule.where}: fired {self._limit} times on a graph of this size, last at {roots[0].name!r}; "
                f"its result matches its own pattern again"
            )
        replaced = dict(zip(roots, values, strict=True))
        self.editor.replace(replaced, op.built, list(match.nodes.values()), rule=rule.where)


def _downstream(nodes: Sequence[onnx_ir.Node], levels: int) -> list[onnx_ir.Node]:
    """The nodes and what reads them, `levels` deep in all."""
    found = dict.fromkeys(nodes)
    edge = list(found)
    for _ in range(levels - 1):
        users = dict.fromkeys(use.node for node in edge for value in node.outputs for use in value.uses())
        edge = [node for node in users if node not in found]
        found.update(dict.fromkeys(edge))
    return list(found)
