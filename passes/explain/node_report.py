"""Report what the rules of a pass say about one node: each rule, and each label of its alternatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir

from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.provenance import origin_of
from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import describe_node, operator, provenance
from passopt.passes.explain.misses import Miss, nearness, short_rule
from passopt.passes.explain.nearest_match import nearest
from passopt.passes.explain.sites import Site, find_node, sites
from passopt.passes.patterns.language import Alternatives, NodePattern, Output, Pattern
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rule, rules_of

#: How many places of a rule are reported that hold the node as an inner node.
_PLACES = 2


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The nearest attempt with one label of one alternative."""

    name: str
    label: str
    attempt: Attempt

    def __str__(self) -> str:
        first = f": {self.attempt.differences[0]}" if self.attempt.differences else ""
        return f"{self.name}={self.label}: {self.attempt.matched} of {self.attempt.total} nodes fit{first}"


@dataclasses.dataclass(frozen=True)
class RuleOnNode:
    """One rule at one node: the places where the node takes part in it, nearest first.

    There are none if the rule has no such operator, or if nothing that reads the node fits.
    """

    rule: Rule
    sites: tuple[Site, ...]
    spellings: tuple[Spelling, ...]
    remark: str

    def lines(self) -> Iterator[str]:
        """Yield the lines of text about this rule."""
        yield f"rule {self.rule.name} ({short_rule(self.rule.where)}): {self.remark}"
        for site in self.sites:
            yield f"    {_verdict(site)}"
            if site.miss is not None:
                yield from (f"      {text}" for text in _details(site.miss))
        yield from (f"    {spelling}" for spelling in self.spellings)

    def to_json(self) -> dict[str, Any]:
        """Return the rule, all its places and all its spellings, with every difference."""
        return {
            "rule": self.rule.where,
            "rule_name": self.rule.name,
            "remark": self.remark,
            "sites": [
                {"root": site.node.name, "matches": site.is_match, **(site.miss.to_json() if site.miss else {})}
                for site in self.sites
            ],
            "spellings": [
                {
                    "name": item.name,
                    "label": item.label,
                    "matched_nodes": item.attempt.matched,
                    "pattern_nodes": item.attempt.total,
                    "differences": [difference.to_json() for difference in item.attempt.differences],
                }
                for item in self.spellings
            ],
        }


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """All rules of a pass at one node of the graph as it stands."""

    name: str
    node: onnx_ir.Node
    rules: tuple[RuleOnNode, ...]

    def lines(self) -> list[str]:
        """Return the lines of text: where the node comes from, then every rule."""
        made = provenance(self.node)
        history = f"; made by {made['made_by']} from {made.get('made_from', '?')}" if "made_by" in made else ""
        origin = origin_of(self.node)
        head = f"{self.name} at {describe_node(self.node)}" + (f", {origin}" if origin else "") + history
        return [head, *(line for rule in self.rules for line in rule.lines())]

    def to_json(self) -> dict[str, Any]:
        """Return the node, where it comes from, and every rule."""
        return {
            "pass": self.name,
            "node": self.node.name,
            "op_type": self.node.op_type,
            **provenance(self.node),
            "rules": [rule.to_json() for rule in self.rules],
        }


def explain_node(item: RewritePass, model: onnx_ir.Model, name: str) -> NodeReport:
    """Try every rule of a pass at one node, as the root or as an inner node.

    Args:
        item: The pass.
        model: The model, which is not changed.
        name: The name of the node, or of a value that it makes.

    Returns:
        What every rule says about the node.

    Raises:
        UsageError: If there is no such node; the message gives the nearest names.
    """
    model = model.clone()
    complete_types(model)
    node = find_node(model, name)
    rules = rules_of(item)
    everywhere = list(sites(item, model, rules))
    opset = model.graph.opset_imports.get("", 0)
    found = []
    for rule in rules:
        mine = [site for site in everywhere if site.rule is rule]
        found.append(_rule_on_node(rule, node, mine, opset))
    return NodeReport(item.name, node, tuple(found))


def _rule_on_node(rule: Rule, node: onnx_ir.Node, everywhere: Sequence[Site], opset: int) -> RuleOnNode:
    at_root = [site for site in everywhere if site.node is node]
    if at_root:
        spellings = () if at_root[0].is_match else tuple(_spellings(rule.pattern, node, opset))
        return RuleOnNode(rule, tuple(at_root), spellings, "starts here")
    inside = sorted((site for site in everywhere if node in site.nodes), key=_nearness)
    if inside and inside[0].is_match:
        inside = [site for site in inside if site.is_match]
    if inside:
        return RuleOnNode(rule, tuple(inside[:_PLACES]), (), "takes this node as an inner one")
    key = (node.domain, node.op_type)
    inner = {(item.domain, item.op_type) for item in _node_patterns(rule.pattern)}
    if key in inner and key not in rule.pattern.root_keys:
        return RuleOnNode(rule, (), (), f"has a {operator(node)} inside, but nothing that reads this one fits")
    roots = " or ".join(operator(root) for root in rule.pattern.root_nodes[:1])
    return RuleOnNode(rule, (), (), f"has no {operator(node)}; it starts at {roots}")


def _nearness(site: Site) -> tuple[float, ...]:
    return site.miss.rank if site.miss is not None else (-1,)


def _verdict(site: Site) -> str:
    if site.miss is None:
        return f"matches at {describe_node(site.node)}, {len(site.nodes)} nodes"
    if site.miss.reason is not None:
        return f"declines at {describe_node(site.node)}, where all {site.miss.total} nodes fit"
    return f"{nearness(site.miss)} at {describe_node(site.node)}"


def _details(miss: Miss) -> list[str]:
    return miss.reason.splitlines() if miss.reason is not None else [str(item) for item in miss.differences]


def _spellings(pattern: Pattern, node: onnx_ir.Node, opset: int) -> Iterator[Spelling]:
    """Yield the nearest attempt at `node` for every label of every alternative of the pattern."""
    names: dict[str, dict[str, None]] = {}
    for item in _pieces(pattern):
        if isinstance(item, Alternatives):
            names.setdefault(item.name, {}).update(dict.fromkeys(item.choices))
    for name, labels in names.items():
        for label in labels:
            yield Spelling(name, label, nearest(pattern, node, opset, {name: label}))


def _node_patterns(pattern: Pattern) -> Iterator[NodePattern]:
    return (item.node for item in _pieces(pattern) if isinstance(item, Output))


def _pieces(pattern: Pattern) -> Iterator[Any]:
    """Yield all pieces of a pattern, including those of alternatives, each once."""
    work: list[Any] = list(reversed(pattern.roots))
    seen: set[int] = set()
    while work:
        item = work.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, Alternatives):
            work.extend(reversed(list(item.choices.values())))
        elif isinstance(item, Output):
            work.extend(reversed(item.node.inputs))
