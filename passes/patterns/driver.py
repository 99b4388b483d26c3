"""Apply the rules of one pass to one model with a worklist, until nothing matches any more.

The driver decides everything that a rule does not: the names of new nodes and values, where they are inserted, their
order, types and provenance. It also counts tries, matches and declines.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Hashable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import PassError, PassoptError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.editor import Editor, discard
from passopt.ir.graph.run_context import RunContext
from passopt.passes.framework.base import Decline
from passopt.passes.framework.defects import NEXT_STEP, describe_site, failure
from passopt.passes.framework.records import PassResult, RuleStatistics
from passopt.passes.patterns.matcher import Match, Matcher
from passopt.passes.patterns.mutation_guard import Untouched
from passopt.passes.patterns.quick_tests import Constants
from passopt.passes.patterns.rules import Rewriter, Rule, RuleOwner, rules_of, source_line

#: If the rules of a pass apply more often than this per node of the graph, they are taken to loop for ever.
_REWRITES_PER_NODE = 20


#: A pass may apply this often in a row to its own results, since it may push one operator past a thousand others.
_MOST_GENERATIONS = 1000


class _Active:
    """A rule at work on one model, with its matcher, its counts and the reasons of the nodes where it declined."""

    def __init__(self, rule: Rule, opset: int, constants: Constants, *, timed: bool) -> None:
        self.rule = rule
        self._matcher = Matcher(rule.pattern, opset, constants)
        self.match = self._timed_match if timed else self._matcher.match
        self.tries = 0
        self.hits = 0
        self.seconds = 0.0
        self.declined: dict[onnx_ir.Node, str] = {}

    def _timed_match(self, node: onnx_ir.Node) -> Match | None:
        start = time.process_time()
        found = self._matcher.match(node)
        self.seconds += time.process_time() - start
        return found

    def statistics(self, *, timed: bool) -> RuleStatistics:
        """Return the counts of this run, with the CPU seconds if `timed`."""
        declines = collections.Counter(self.declined.values())
        seconds = self.seconds if timed else None
        return RuleStatistics(self.rule.name, self.rule.source, self.tries, self.hits, declines, seconds)


class Driver:
    """Apply the rules of one pass to one model.

    The driver sweeps over the nodes in the order of the graph. Nodes that a rewrite makes are tried right after it. The
    sweeps are repeated until nothing matches any more, so a second run of the pass finds nothing to do.

    Args:
        owner: The pass, with its name and rules.
        model: The model to change in place.

    Raises:
        PassError: If a rule can never work.
    """

    def __init__(self, owner: RuleOwner, model: onnx_ir.Model) -> None:
        self.owner = owner
        rules = rules_of(owner)
        self.editor = Editor(model, owner.name)
        context = RunContext.of(model)
        self.result = PassResult()
        self._memory: dict[Hashable, onnx_ir.Value] = {}
        self._constants = Constants()
        self._timed = context.times_rules
        self._active = [_Active(rule, self.editor.opset, self._constants, timed=self._timed) for rule in rules]
        self._at: dict[tuple[str, str], list[_Active]] = collections.defaultdict(list)
        for active in self._active:
            for key in active.rule.pattern.root_keys:
                self._at[key].append(active)
        self._is_typed = False
        self._generations: dict[onnx_ir.Node, int] = {}
        self._most_generations = min(len(model.graph) + 20, _MOST_GENERATIONS)
        self._budget = context.rewrite_limit
        self._limit = _REWRITES_PER_NODE * (len(model.graph) + 100)

    def run(self) -> PassResult:
        """Apply the rules until nothing matches, and return the counts.

        Raises:
            PassError: If a rewrite fails with an exception, returns something else than one value per root, or if the
                rules never come to an end.
            VerifyError: If a rewrite changed the graph itself.
        """
        at = self._at
        op_types = {op_type for _, op_type in at}
        nodes = (node for node in self.editor.graph if node.op_type in op_types)
        candidates: Sequence[onnx_ir.Node] = [node for node in nodes if (node.domain, node.op_type) in at]
        while candidates:
            candidates = self._sweep(candidates)
        self.result.modified = self.result.matches > 0
        self.result.rules = [active.statistics(timed=self._timed) for active in self._active]
        self.result.tries = sum(rule.tries for rule in self.result.rules)
        for rule in self.result.rules:
            self.result.declines.update(rule.declines)
        return self.result

    def _sweep(self, candidates: Sequence[onnx_ir.Node]) -> Sequence[onnx_ir.Node]:
        """Try the rules at these nodes and at those that rewrites make meanwhile.

        Returns the nodes to try in the next sweep: all of them if a rule applied, and none otherwise.
        """
        at, matches = self._at, self.result.matches
        queue, seen = collections.deque(candidates), []
        while queue:
            node = queue.popleft()
            if node.graph is None:
                continue
            seen.append(node)
            for active in at[node.domain, node.op_type]:
                active.tries += 1
                match = active.match(node)
                if match is None or (self._budget is not None and self._budget.reached):
                    continue
                try:
                    made = self._rewrite(active, node, match)
                except PassoptError:
                    raise
                except Exception as error:
                    raise defect_of_rule(active.rule, node, error) from error
                queue.extendleft(new for new in reversed(made) if (new.domain, new.op_type) in at)
                if node.graph is None:
                    break
        return seen if self.result.matches > matches else ()

    def _rewrite(self, active: _Active, node: onnx_ir.Node, match: Match) -> Sequence[onnx_ir.Node]:
        """Apply a rule to a match and return the nodes that it made, or nothing if it declined."""
        start = time.process_time() if self._timed else 0.0
        root = match.roots()[0].name
        op = self._rewriter(root or node.op_type)
        untouched = Untouched(self.editor.graph, match.nodes.values())
        try:
            returned = active.rule.rewrite(op, **active.rule.arguments(match))
            untouched.check(active.rule.where, root, op.built.nodes)
            active.declined.pop(node, None)
            self._apply(active.rule, node, match, op, returned)
            active.hits += 1
        except Decline as reason:
            untouched.check(active.rule.where, root, op.built.nodes)
            discard(op.built)
            active.declined[node] = str(reason)
            return ()
        finally:
            if self._timed:
                active.seconds += time.process_time() - start
        return op.built.nodes

    def _rewriter(self, hint: str) -> Rewriter:
        editor = self.editor
        if not self._is_typed:  # Types are completed at the first match only: most rules match nothing in most graphs.
            self._is_typed = True
            if not editor.survey():
                complete_types(editor.model)  # The builder gives a number the dtype of the value it is combined with.
        return Rewriter(editor.opset, editor.unique, hint, self._memory, types=editor.types, constants=self._constants)

    def _apply(self, rule: Rule, node: onnx_ir.Node, match: Match, op: Rewriter, returned: Any) -> None:
        """Replace the roots of a match by the values that `rewrite` returned, and check that the pass will end."""
        roots = match.roots()
        site = roots[0].name
        values = list(returned) if isinstance(returned, (list, tuple)) else [returned]
        strange = [value for value in values if not isinstance(value, onnx_ir.Value)]
        if strange or len(values) != len(roots):
            place = f"{self.owner.name} ({source_line(rule.rewrite)})"
            if strange:
                raise PassError(f"{place}: rewrite returned {strange[0]!r}, expected a value per root, at {site!r}")
            raise PassError(f"{place}: rewrite returned {len(values)} values for {len(roots)} roots at {site!r}")
        self.result.matches += 1
        if self._budget is not None:
            self._budget.take(f"{rule.where} at {site!r}")
        size = len(self.editor.graph)
        replaced = dict(zip(roots, values, strict=True))
        self.editor.replace(replaced, op.built, list(match.nodes.values()), rule=rule.where)
        self._check_progress(rule, node, op.built.nodes, site, shrank=len(self.editor.graph) < size)

    def _check_progress(
        self, rule: Rule, root: onnx_ir.Node, made: Sequence[onnx_ir.Node], site: str | None, *, shrank: bool
    ) -> None:
        """Raise PassError if a rule seems to apply for ever, at one place or in the whole graph.

        The generation of a rewrite is how many rewrites in a row led to it, each at a node that the one before it made.
        A rewrite that makes the graph smaller does not count, since such a chain ends by itself.
        """
        generation = self._generations.get(root, 0) + (not shrank)
        self._generations.update(dict.fromkeys(made, generation))
        if generation > self._most_generations:
            raise PassError(
                f"{rule.where}: fired {generation} times in a row at {site!r}, each time on what it had made; "
                f"its result matches its own pattern, or another rule of the pass turns it back"
            )
        if self.result.matches > self._limit:
            raise PassError(f"{rule.where}: fired {self._limit} times on a graph of this size, last at {site!r}")


def defect_of_rule(rule: Rule, node: onnx_ir.Node, error: Exception) -> PassError:
    """Return the error to raise where the rewrite of a rule failed with an unexpected exception.

    Args:
        rule: The rule.
        node: The node at which it matched.
        error: The exception.

    Returns:
        An error that names the rule, the line that failed, and the place in the graph.
    """
    what = f"{rule.where}: {getattr(rule.rewrite, '__name__', 'rewrite')} {failure(error, rule.rewrite)}"
    return PassError(f"{what}\nsite: {describe_site(node)}\n{NEXT_STEP}")
