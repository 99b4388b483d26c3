"""Where the rules of a pass match, decline or come near in a graph. The model is never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir

from passopt.ir.editing import Editor, discard
from passopt.ir.errors import PassoptError, UsageError
from passopt.ir.provenance import MADE_BY
from passopt.passes.attempts import Attempt
from passopt.passes.base import Decline
from passopt.passes.catalog import unknown_name
from passopt.passes.differences import children
from passopt.passes.matching import Match, Matcher
from passopt.passes.misses import Miss, distinct
from passopt.passes.nearest import nearest, nearest_below
from passopt.passes.rewriting import RewritePass, Rewriter, Rule, rules_of

#: Where the root itself is another operator, so much else must fit: any MatMul is half of a small pattern.
_FITTING_BELOW = 3


def misses(item: RewritePass, model: onnx_ir.Model) -> list[Miss]:
    """Every place where a rule declines or does not fit, each once, in the order of rules and graph.

    What the pass itself made is no place that it missed.
    """
    found = list(sites(item, model, rules_of(item)))
    matches = [site.nodes for site in found if site.is_match]
    foreign = (site.miss for site in found if site.miss is not None and not _is_made_by(item.name, site.node))
    return distinct(foreign, matches)


def _is_made_by(name: str, node: onnx_ir.Node) -> bool:
    return node.metadata_props.get(MADE_BY, "").split(",")[-1] == name


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A place where a rule was tried: a match if `miss` is None."""

    rule: Rule
    node: onnx_ir.Node
    nodes: frozenset[onnx_ir.Node]
    miss: Miss | None

    @property
    def is_match(self) -> bool:
        return self.miss is None


def sites(item: RewritePass, model: onnx_ir.Model, rules: Sequence[Rule]) -> Iterator[Site]:
    """Every node at which one of the rules may start, and places where all but the root is there."""
    editor = Editor(model, item.name)
    for rule in rules:
        keys, matcher = rule.pattern.root_keys, Matcher(rule.pattern, editor.opset)
        for node in model.graph:
            if (node.domain, node.op_type) in keys:
                yield _site(rule, matcher, node, editor)
        yield from _sites_below(rule, model.graph, editor.opset)


def _site(rule: Rule, matcher: Matcher, node: onnx_ir.Node, editor: Editor) -> Site:
    match = matcher.match(node)
    if match is None:
        return _near(rule, node, nearest(rule.pattern, node, editor.opset))
    nodes = frozenset(match.nodes.values())
    reason = _reason(rule, match, editor)
    if reason is None:
        return Site(rule, node, nodes, None)
    count = len(match.nodes)
    labels = {name: label for name, label in match.bindings.items() if isinstance(label, str)}
    return Site(rule, node, nodes, Miss(rule.where, node, count, count, (), reason, labels, rule.name, nodes))


def _reason(rule: Rule, match: Match, editor: Editor) -> str | None:
    """Why the rule declines this match, from its own `rewrite`, whose nodes are thrown away; None if it does not."""
    op = Rewriter(editor.opset, editor.unique, match.roots()[0].name or "value")
    try:
        rule.rewrite(op, **rule.arguments(match))
    except Decline as declined:
        return str(declined)
    except PassoptError as error:
        return f"the rewrite fails: {error}"
    finally:
        discard(op.built)
    return None


def _near(rule: Rule, node: onnx_ir.Node, attempt: Attempt) -> Site:
    nodes = frozenset(attempt.nodes.values())
    differences, labels = attempt.differences, attempt.labels
    miss = Miss(rule.where, node, attempt.matched, attempt.total, differences, None, labels, rule.name, nodes)
    return Site(rule, node, nodes, miss)


def _sites_below(rule: Rule, graph: onnx_ir.Graph, opset: int) -> Iterator[Site]:
    """Places where all is there but the root itself; only where most of the pattern fits."""
    keys = rule.pattern.root_keys
    roots = [root for root in rule.pattern.root_nodes if (root.domain, root.op_type) in keys]
    for child in {output.node: output for root in roots for output in children(root)}.values():
        for node in graph:
            if (node.domain, node.op_type) != (child.node.domain, child.node.op_type):
                continue
            readers = node.outputs[child.index].consumers() if child.index < len(node.outputs) else ()
            if any((reader.domain, reader.op_type) in keys for reader in readers):
                continue
            attempt = nearest_below(rule.pattern, child, node, next(iter(readers), None), opset)
            if attempt.matched >= _FITTING_BELOW and 2 * attempt.matched >= attempt.total:
                yield _near(rule, node, attempt)


def find_node(model: onnx_ir.Model, name: str) -> onnx_ir.Node:
    """The node of this name, or whose output has it. Raises UsageError with the nearest names."""
    names: dict[str, onnx_ir.Node] = {}
    for node in model.graph:
        names.setdefault(node.name or "", node)
    for node in model.graph:
        for value in node.outputs:
            names[value.name or ""] = node
    if name not in names:
        raise UsageError(unknown_name("node", name, list(names), "passopt print"))
    return names[name]
