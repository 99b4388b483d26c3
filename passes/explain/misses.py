"""Collect the places where rules came near without matching: those that differ alike in one group, nearest first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir

from passopt.ir.graph.provenance import origin_of
from passopt.passes.explain.differences import Difference, describe_node, provenance

_NAME = re.compile(r"[\w./:]*\w")
_NUMBERED = re.compile(r"(?=[\w./:]*[A-Za-z])[\w./:]+")
#: A miss of fewer nodes is a place of its own, unless all of its nodes lie inside of a better one.
_LEAST_SHARED = 3
#: The label of an optional operator that is not there, which is not worth showing.
_DEFAULT = "absent"
#: How many of the other labels are shown.
_LABELS = 4
_DIGITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True, eq=False)
class Miss:
    """A place where a rule did not apply: its pattern differs, or the rule or pass itself declined it for a `reason`.

    `node` is the root, or None for the whole graph. `nodes` are all nodes that the pattern was laid over; `matched` of
    the pattern's `total` nodes fit. `rule` is where the rule is written, and `rule_name` the name of its pattern
    method. For a pass over the whole graph, `rule` is the name of the pass and `rule_name` is empty.
    """

    rule: str
    node: onnx_ir.Node | None
    matched: int = 0
    total: int = 0
    differences: tuple[Difference, ...] = ()
    reason: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rule_name: str = ""
    nodes: frozenset[onnx_ir.Node] = frozenset()

    @property
    def rank(self) -> tuple[float, ...]:
        """Return a key that sorts declines first, then places by the share of nodes that fit."""
        if self.reason is not None:
            return (0, 0, 0)
        return (1, -self.matched / max(self.total, 1), len(self.differences))

    @property
    def is_near(self) -> bool:
        """Return True for a decline, and where more than half of the pattern fits."""
        return self.reason is not None or 2 * self.matched > self.total

    @functools.cached_property
    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for the same miss in another layer."""
        op_type = self.node.op_type if self.node is not None else None
        keys = tuple(item.key for item in self.differences)
        return (self.rule, op_type, self.matched, self.total, keys, self._reason_without_names())

    def _reason_without_names(self) -> str:
        """Return the reason without what differs between layers.

        Names of this very place are replaced, and in other names the digits, such as the number of the layer.
        """
        if self.reason is None:
            return ""
        nodes = self.nodes or {node for node in (self.node,) if node is not None}
        values = (value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None)
        names = {name for value in values if (name := value.name)} | {node.name for node in nodes}
        text = _NAME.sub(lambda found: "*" if found[0] in names else found[0], self.reason)
        return _NUMBERED.sub(lambda found: _DIGITS.sub("#", found[0]), text)

    @property
    def origin(self) -> str:
        """Return where to look in the model's source, such as `modeling_x.py:12 in model.layers.0.mlp`.

        That is the place of the first difference or else of the root, as far as the graph tells; empty if it does not.
        """
        first = self.differences[0] if self.differences else None
        nodes = [first.found_node, first.node] if first is not None else []
        for node in (*nodes, self.node):
            if node is not None and (text := origin_of(node)):
                return text
        return ""

    def lines(self, count: int) -> list[str]:
        """Return the explanation itself: the reason, or the first `count` differences."""
        if self.reason is not None:
            return self.reason.splitlines()
        lines = [str(item) for item in self.differences[:count]]
        more = len(self.differences) - len(lines)
        return [*lines[:-1], f"{lines[-1]} (and {more} more)"] if more else lines

    def to_json(self) -> dict[str, Any]:
        """Return everything about this place, with all differences."""
        return {
            "rule": self.rule,
            "rule_name": self.rule_name,
            "labels": dict(self.labels),
            "node": self.node.name if self.node is not None else None,
            "value": self.node.outputs[0].name if self.node is not None else None,
            "op_type": self.node.op_type if self.node is not None else None,
            "declined": self.reason,
            "matched_nodes": self.matched,
            "pattern_nodes": self.total,
            "differences": [item.to_json() for item in self.differences],
            **(provenance(self.node) if self.node is not None else {}),
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """Misses that differ alike, one per layer."""

    misses: tuple[Miss, ...]

    @property
    def example(self) -> Miss:
        """Return the first miss, which stands for all of them."""
        return self.misses[0]

    @property
    def title(self) -> str:
        """Return a title such as `declined × 40, such as mul_3 (Mul)`."""
        first = self.example
        how = "declined" if first.reason is not None else nearness(first)
        count = len(self.misses)
        if first.node is None:
            return f"{how} × {count}" if count > 1 else how
        return (
            f"{how} × {count}, such as {describe_node(first.node)}"
            if count > 1
            else f"{how} at {describe_node(first.node)}"
        )

    def lines(self, differences: int = 1) -> list[str]:
        """Return the title, the first differences, and where to look."""
        first = self.example
        chosen = [f"{name}={label}" for name, label in first.labels.items() if label != _DEFAULT]
        labels = ", ".join(chosen[:_LABELS]) + (" …" if len(chosen) > _LABELS else "")
        rule = f"rule {first.rule_name} ({short_rule(first.rule)})" if first.rule_name else ""
        tail = "; ".join(part for part in (first.origin, rule, labels) if part)
        return [self.title, *(f"    {line}" for line in (*first.lines(differences), tail) if line)]

    def to_json(self) -> dict[str, Any]:
        """Return the example, how many misses there are, and the first output of each one's root."""
        sites = [miss.node.outputs[0].name for miss in self.misses if miss.node is not None]
        return {"count": len(self.misses), **self.example.to_json(), "sites": sites}


def grouped(misses: Iterable[Miss]) -> list[Group]:
    """Group misses of equal key, and return the groups nearest first.

    Within a group, misses keep their order.
    """
    found: dict[tuple[object, ...], list[Miss]] = {}
    for miss in misses:
        found.setdefault(miss.key, []).append(miss)
    return sorted((Group(tuple(same)) for same in found.values()), key=lambda group: group.example.rank)


def distinct(misses: Iterable[Miss], matches: Iterable[frozenset[onnx_ir.Node]] = ()) -> list[Miss]:
    """Return the misses, in their own order, without those that a match or a nearer miss explains better.

    Such a miss lies inside of that with all of its nodes, or with all but one, such as its root.
    """
    misses = _best_of_root(misses)
    covering: dict[onnx_ir.Node, list[Miss | frozenset[onnx_ir.Node]]] = {}
    for nodes in matches:
        for node in nodes:
            covering.setdefault(node, []).append(nodes)
    kept: set[int] = set()
    for index in sorted(range(len(misses)), key=lambda index: _coverage(misses[index])):
        miss = misses[index]
        # At most one of its nodes may lie outside, so whatever covers it holds one of any two of its nodes.
        others = [other for node in itertools.islice(miss.nodes, 2) for other in covering.get(node, ())]
        if any(_lies_inside(miss, other) for other in others):
            continue
        kept.add(index)
        for node in miss.nodes:
            covering.setdefault(node, []).append(miss)
    return [miss for index, miss in enumerate(misses) if index in kept]


def _best_of_root(misses: Iterable[Miss]) -> list[Miss]:
    """Keep the nearest miss of each root, and of rules that decline there, every distinct reason."""
    misses = list(misses)
    best: dict[onnx_ir.Node | None, tuple[float, ...]] = {}
    for miss in misses:
        best[miss.node] = min(best.get(miss.node, miss.rank), miss.rank)
    kept: list[Miss] = []
    said: set[tuple[onnx_ir.Node | None, str | None]] = set()
    for miss in misses:
        if miss.rank == best[miss.node] and (miss.node, miss.reason) not in said:
            said.add((miss.node, miss.reason))
            kept.append(miss)
    return kept


def _coverage(miss: Miss) -> tuple[int, ...]:
    """Return a key that sorts declines first, then misses by how much of the pattern and graph they cover."""
    return (miss.reason is None, -miss.matched, -len(miss.nodes), len(miss.differences))


def _lies_inside(miss: Miss, other: Miss | frozenset[onnx_ir.Node]) -> bool:
    """Return True if `other` is the better explanation of the same place."""
    nodes = other if isinstance(other, frozenset) else other.nodes
    alone = len(miss.nodes - nodes)
    if alone > 1 or (alone == 1 and (miss.reason is not None or len(miss.nodes) < _LEAST_SHARED)):
        return False
    if isinstance(other, frozenset):
        return True
    if miss.reason is not None:
        return False  # what another rule does there does not explain why this one declines
    if other.key == miss.key:
        return False  # the same miss in another layer, which shares a mask or a table
    return other.rule == miss.rule or other.rank <= miss.rank


def short_rule(where: str) -> str:
    """Shorten `pass (folder/file.py:12)` to `file.py:12`."""
    return where.partition(" (")[2].rstrip(")").replace("\\", "/").rpartition("/")[2] or where


def nearness(miss: Miss) -> str:
    """Return how much of a pattern fits, as `2 of 3 nodes fit`."""
    if miss.matched == miss.total:
        return f"all {miss.total} nodes fit, but not next to each other"
    return f"{miss.matched} of {miss.total} nodes fit"
