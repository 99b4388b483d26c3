"""What the rules of a pass say about one node: each rule, and each label of its alternatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir

from passopt.ir.graph.shapes import complete_types
from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import describe_node, operator, provenance
from passopt.passes.explain.misses import Miss, origin_of, short_rule
from passopt.passes.explain.nearest_match import nearest
from passopt.passes.explain.sites import Site, find_node, sites
from passopt.passes.patterns.language import Alternatives, NodePattern, Output, Pattern
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rule, rules_of

#: Places of a rule that hold the node as an inner node.
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
    """One rule at one node: the places where it takes part, nearest first; none if the rule has no such operator."""

    rule: Rule
    sites: tuple[Site, ...]
    spellings: tuple[Spelling, ...]
    remark: str

    def lines(self) -> Iterator[str]:
        yield f"rule {self.rule.name} ({short_rule(self.rule.where)}): {self.remark}"
        for site in self.sites:
            yield f"    {_verdict(site)}"
            if site.miss is not None:
                yield from (f"      {text}" for text in _details(site.miss))
        yield from (f"    {spelling}" for spelling in self.spellings)

    def as_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule.where,
            "rule_name": self.rule.name,
            "remark": self.remark,
            "sites": [
                {"root": site.node.name, "matches": site.is_match, **(site.miss.as_json() if site.miss else {})}
                for site in self.sites
            ],
            "spellings": [
                {
                    "name": item.name,
                    "label": item.label,
                    "matched_nodes": item.attempt.matched,
                    "pattern_nodes": item.attempt.total,
                    "differences": [difference.as_json() for difference in item.attempt.differences],
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
        made = provenance(self.node)
        history = f"; made by {made['made_by']} from {made.get('made_from', '?')}" if "made_by" in made else ""
        origin = origin_of(self.node)
        head = f"{self.name} at {describe_node(self.node)}" + (f", {origin}" if origin else "") + history
        return [head, *(line for rule in self.rules for line in rule.lines())]

    def as_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "node": self.node.name,
            "op_type": self.node.op_type,
            **provenance(self.node),
            "rules": [rule.as_json() for rule in self.rules],
        }


def explain_node(item: RewritePass, model: onnx_ir.Model, name: str) -> NodeReport:
    """Try every rule at the node `name` (or that makes the value `name`), as root or as an inner node.

    The model is not changed. Raises UsageError with the nearest names if there is no such node.
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
    return f"{site.miss.matched} of {site.miss.total} nodes fit at {describe_node(site.node)}"


def _details(miss: Miss) -> list[str]:
    return miss.reason.splitlines() if miss.reason is not None else [str(item) for item in miss.differences]


def _spellings(pattern: Pattern, node: onnx_ir.Node, opset: int) -> Iterator[Spelling]:
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
    """All pieces of a pattern, those of alternatives included, each once."""
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
