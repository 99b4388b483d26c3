"""Match a traced pattern at a node: complete search over commuted inputs and alternatives, undone on failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir

from passopt.ir.weights import is_checkpoint_weight
from passopt.passes.comparing import attribute_value, is_constant, same_attribute
from passopt.passes.pattern import (
    Alternatives,
    NodePattern,
    Number,
    Numbers,
    Output,
    Pattern,
    ValuePattern,
    Variable,
    Weight,
)

_MISSING = object()


class Match:
    """One way in which a pattern matched: what the variables are bound to, and the nodes, roots first."""

    def __init__(self, pattern: Pattern, opset: int) -> None:
        self.pattern = pattern
        self.bindings: dict[str, Any] = {}
        self.nodes: dict[NodePattern, onnx_ir.Node] = {}
        self._opset = opset

    def roots(self) -> list[onnx_ir.Value]:
        """The values that the rewrite replaces, in the order of the pattern's return."""
        return [self.nodes[root.node].outputs[root.index] for root in self.pattern.roots]


def find_match(pattern: Pattern, node: onnx_ir.Node, opset: int) -> Match | None:
    """The first way in which the pattern's first root matches `node`, or None."""
    match = Match(pattern, opset)
    first, *others = pattern.root_nodes
    for _ in _match_node(match, first, node):
        if _match_others(match, others):
            return match
    return None


def _match_others(match: Match, roots: Sequence[NodePattern]) -> bool:
    """Further roots are found among the users of what is bound already."""
    if not roots:
        return True
    first, *others = roots
    if first in match.nodes:  # it stands inside of an earlier root
        return _match_others(match, others)
    for candidate in _candidates(match, first):
        if candidate in match.nodes.values():
            continue
        for _ in _match_node(match, first, candidate):
            if _match_others(match, others):
                return True
    return False


def _candidates(match: Match, pattern: NodePattern) -> Iterator[onnx_ir.Node]:
    for item in pattern.inputs:
        value = _bound(match, item)
        if value is None:
            continue
        for use in value.uses():
            node = use.node
            if (node.op_type, node.domain) == (pattern.op_type, pattern.domain):
                yield node
        return


def _bound(match: Match, item: ValuePattern) -> onnx_ir.Value | None:
    if isinstance(item, (Variable, Weight)):
        value = match.bindings.get(item.name if isinstance(item, Variable) else item.variable.name)
        return value if isinstance(value, onnx_ir.Value) else None
    if isinstance(item, Output) and item.node in match.nodes:
        return match.nodes[item.node].outputs[item.index]
    return None


# Every matcher below is a generator: it yields once per way to match, with the match extended, and undoes on resume.


def _match_node(match: Match, pattern: NodePattern, node: onnx_ir.Node) -> Iterator[None]:
    if node.op_type != pattern.op_type or node.domain != pattern.domain:
        return
    if len(node.inputs) < len(pattern.inputs) or any(v is not None for v in node.inputs[len(pattern.inputs) :]):
        return
    if pattern.outputs > 1 and len(node.outputs) != pattern.outputs:
        return
    known = match.nodes.get(pattern)
    if known is not None:
        if known is node:
            yield
        return
    saved = dict(match.bindings)
    if not _match_attributes(match, pattern, node):
        match.bindings = saved
        return
    match.nodes[pattern] = node
    if pattern.bind:
        match.bindings[pattern.bind] = node.outputs[0]
    orders = [(0, 1), (1, 0)] if pattern.commutes else [tuple(range(len(pattern.inputs)))]
    for order in orders:
        yield from _match_inputs(match, [(pattern.inputs[i], node.inputs[j]) for i, j in enumerate(order)])
    del match.nodes[pattern]
    match.bindings = saved


def _match_inputs(match: Match, pairs: Sequence[tuple[ValuePattern, onnx_ir.Value | None]]) -> Iterator[None]:
    if not pairs:
        yield
        return
    (pattern, value), *rest = pairs
    for _ in _match_value(match, pattern, value):
        yield from _match_inputs(match, rest)


def _match_value(match: Match, pattern: ValuePattern, value: onnx_ir.Value | None) -> Iterator[None]:
    if isinstance(pattern, Variable):
        yield from _match_variable(match, pattern, value)
    elif isinstance(pattern, Weight):
        if value is not None and is_checkpoint_weight(value):
            yield from _match_variable(match, pattern.variable, value)
    elif isinstance(pattern, (Number, Numbers)):
        if is_constant(pattern, value):
            yield
    elif isinstance(pattern, Output):
        producer = value.producer() if value is not None else None
        if producer is not None and value is not None and value.index() == pattern.index:
            yield from _match_node(match, pattern.node, producer)
    else:
        yield from _match_alternatives(match, pattern, value)


def _match_variable(match: Match, pattern: Variable, value: onnx_ir.Value | None) -> Iterator[None]:
    bound = match.bindings.get(pattern.name, _MISSING)
    if bound is _MISSING:
        match.bindings[pattern.name] = value
        yield
        match.bindings.pop(pattern.name, None)
    elif bound is value:
        yield


def _match_alternatives(match: Match, pattern: Alternatives, value: onnx_ir.Value | None) -> Iterator[None]:
    bound = match.bindings.get(pattern.name, _MISSING)
    for label, choice in pattern.choices.items():
        if bound is not _MISSING and bound != label:
            continue
        match.bindings[pattern.name] = label
        yield from _match_value(match, choice, value)
        if bound is _MISSING:
            match.bindings.pop(pattern.name, None)


def _match_attributes(match: Match, pattern: NodePattern, node: onnx_ir.Node) -> bool:
    for name, expected in pattern.attributes.items():
        found = attribute_value(node, name, match._opset)
        if isinstance(expected, Variable):
            if found is None or match.bindings.setdefault(expected.name, found) != found:
                return False
        elif not same_attribute(expected, found):
            return False
    return True
