"""Find where the rules of a pass match, decline or come near in a graph, without changing the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence

import onnx_ir

from passopt.ir.errors import PassoptError, UsageError
from passopt.ir.graph.editor import Editor, discard
from passopt.ir.graph.provenance import MADE_BY
from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import children
from passopt.passes.explain.misses import Miss, distinct
from passopt.passes.explain.nearest_match import nearest, nearest_below
from passopt.passes.explain.neighbourhoods import Neighbourhood, Surveyor
from passopt.passes.explain.search_steps import levels_of
from passopt.passes.framework.base import Decline
from passopt.passes.framework.defects import failure
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.patterns.language import Output, outputs_of
from passopt.passes.patterns.matcher import Match, Matcher
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter, Rule, rules_of

#: How many nodes must fit where the root itself is another operator: any single MatMul is half of a small pattern.
_FITTING_BELOW = 3
#: How many levels deeper than its pattern a search may look, for operators that it steps over.
_FURTHER_LEVELS = 4


def misses(item: RewritePass, model: onnx_ir.Model) -> list[Miss]:
    """Return every place where a rule declines or does not fit, each once, in the order of rules and graph.

    Nodes that the pass itself made are left out, since it did not miss those.
    """
    found = list(sites(item, model, rules_of(item)))
    matches = [site.nodes for site in found if site.is_match]
    foreign = (site.miss for site in found if site.miss is not None and not _is_made_by(item.name, site.node))
    return distinct(foreign, matches)


def _is_made_by(name: str, node: onnx_ir.Node) -> bool:
    return node.metadata_props.get(MADE_BY, "").split(",")[-1] == name


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A place where a rule was tried; it is a match if `miss` is None."""

    rule: Rule
    node: onnx_ir.Node
    nodes: frozenset[onnx_ir.Node]
    miss: Miss | None

    @property
    def is_match(self) -> bool:
        return self.miss is None


def sites(item: RewritePass, model: onnx_ir.Model, rules: Sequence[Rule]) -> Iterator[Site]:
    """Yield every node at which one of the rules may start, and places where all but the root is there."""
    editor, surveyor = Editor(model, item.name), Surveyor()
    operators = {(node.domain, node.op_type) for node in model.graph}
    starting = [rule for rule in rules if operators.intersection(rule.pattern.root_keys)]
    for rule in rules:
        explorer = _Explorer(rule, editor, surveyor)
        for node in model.graph:
            if (node.domain, node.op_type) in rule.pattern.root_keys:
                yield explorer.at(node)
        # Where some rules can start, a rule whose root operators the graph has nowhere is not the one meant.
        if rule in starting or not starting:
            yield from explorer.without_root(model.graph)


class _Explorer:
    """Try one rule everywhere in a graph.

    What is the same in every layer is searched once, and the attempt is moved to the other layers.
    """

    def __init__(self, rule: Rule, editor: Editor, surveyor: Surveyor) -> None:
        self._rule = rule
        self._pattern = rule.pattern
        self._editor = editor
        self._surveyor = surveyor
        self._matcher = Matcher(rule.pattern, editor.opset)
        self._levels = levels_of(rule.pattern) + _FURTHER_LEVELS
        self._known: dict[Hashable, tuple[Neighbourhood, Attempt]] = {}

    def at(self, node: onnx_ir.Node) -> Site:
        """Try the rule with its first root at `node`."""
        match = self._matcher.match(node)
        if match is not None:
            return _matched(self._rule, node, match, self._editor)
        opset = self._editor.opset
        return _near(self._rule, node, self._once("at", [node], lambda: nearest(self._pattern, node, opset)))

    def without_root(self, graph: onnx_ir.Graph) -> Iterator[Site]:
        """Yield places where every node of the pattern is present except the root.

        At least half of the pattern must fit there, and at least `_FITTING_BELOW` nodes.
        """
        keys = self._pattern.root_keys
        kinds = self._surveyor.kinds(graph, self._levels)
        hopeless: set[Hashable] = set()
        roots = outputs_of(self._pattern.roots[0])
        for child in {output.node: output for root in roots for output in children(root.node)}.values():
            for node in graph:
                if (node.domain, node.op_type) != (child.node.domain, child.node.op_type):
                    continue
                readers = node.outputs[child.index].consumers() if child.index < len(node.outputs) else ()
                if any((reader.domain, reader.op_type) in keys for reader in readers):
                    continue
                reader = next(iter(readers), None)
                kind = (child.node, kinds[node], kinds.get(reader) if reader is not None else None)
                if kind in hopeless:
                    continue
                attempt = self._below(child, node, reader)
                if attempt.matched >= _FITTING_BELOW and 2 * attempt.matched >= attempt.total:
                    yield _near(self._rule, node, attempt)
                else:
                    hopeless.add(kind)

    def _below(self, child: Output, node: onnx_ir.Node, reader: onnx_ir.Node | None) -> Attempt:
        starts = [node, reader] if reader is not None else [node]
        search = functools.partial(nearest_below, self._pattern, child, node, reader, self._editor.opset)
        return self._once(child.node, starts, search)

    def _once(self, kind: Hashable, starts: Sequence[onnx_ir.Node], search: Callable[[], Attempt]) -> Attempt:
        """Return the attempt that `search` finds, or that of an equal place, moved here."""
        here = self._surveyor.survey(starts, self._levels, users=len(self._pattern.roots) > 1)
        known = self._known.get((kind, here.key))
        moved = known[0].moved(known[1], here) if known is not None else None
        if moved is not None:
            return moved
        found = search()
        self._known.setdefault((kind, here.key), (here, found))
        return found


def _matched(rule: Rule, node: onnx_ir.Node, match: Match, editor: Editor) -> Site:
    nodes = frozenset(match.nodes.values())
    reason = _reason(rule, match, editor)
    if reason is None:
        return Site(rule, node, nodes, None)
    count = len(match.nodes)
    labels = {name: label for name, label in match.bindings.items() if isinstance(label, str)}
    return Site(rule, node, nodes, Miss(rule.where, node, count, count, (), reason, labels, rule.name, nodes))


def _reason(rule: Rule, match: Match, editor: Editor) -> str | None:
    """Return why the rule declines this match; None if it does not.

    The rule's own `rewrite` is run to find out, and the nodes that it builds are thrown away.
    """
    op = Rewriter(editor.opset, editor.unique, match.roots()[0].name or "value")
    try:
        rule.rewrite(op, **rule.arguments(match))
    except Decline as declined:
        return str(declined)
    except PassoptError as error:
        return f"the rewrite fails: {error}"
    except Exception as error:  # a defect of the rule is what its author asks about
        return f"the rewrite {failure(error, rule.rewrite)}"
    finally:
        discard(op.built)
    return None


def _near(rule: Rule, node: onnx_ir.Node, attempt: Attempt) -> Site:
    nodes = frozenset(attempt.nodes.values())
    differences, labels = attempt.differences, attempt.labels
    miss = Miss(rule.where, node, attempt.matched, attempt.total, differences, None, labels, rule.name, nodes)
    return Site(rule, node, nodes, miss)


def find_node(model: onnx_ir.Model, name: str) -> onnx_ir.Node:
    """Return the node of this name, or the one with an output of this name.

    Raises UsageError with the nearest names if there is none.
    """
    names: dict[str, onnx_ir.Node] = {}
    for node in model.graph:
        names.setdefault(node.name or "", node)
    for node in model.graph:
        for value in node.outputs:
            names[value.name or ""] = node
    if name not in names:
        raise UsageError(unknown_name("node", name, list(names), "passopt print"))
    return names[name]
