"""Provide the steps over patterns and graphs that the search for the nearest attempt takes."""

from __future__ import annotations

import onnx_ir

from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import children
from passopt.passes.patterns.language import (
    Alternatives,
    Maybe,
    NodePattern,
    Output,
    Pattern,
    Scalar,
    ValuePattern,
    Variable,
    Weight,
)

#: How many extra operators in a row may stand between two nodes of a pattern.
_EXTRA_IN_A_ROW = 2
#: Operators that no exporter slips in or leaves out: what lies behind them is another part of the model.
_LANDMARKS = frozenset(
    {"MatMul", "Gemm", "Conv", "Gather", "Softmax", "Attention", "AlibiAttention", "AlibiAttentionNoCache"}
    | {"LayerNormalization", "RMSNormalization", "RotaryEmbedding"}
)


def choices(root: ValuePattern) -> list[tuple[Output, dict[str, str]]]:
    """Return the outputs that a root may be, each with the labels that choose it."""
    if isinstance(root, Output):
        return [(root, {})]
    if not isinstance(root, Alternatives):
        return []
    below = [(label, found) for label, choice in root.choices.items() for found in choices(choice)]
    return [(output, {root.name: label, **labels}) for label, (output, labels) in below]


def same_operator(pattern: NodePattern, node: onnx_ir.Node) -> bool:
    """Return True if the pattern node and the graph node have the same operator and domain."""
    return (pattern.op_type, pattern.domain) == (node.op_type, node.domain)


def behind(node: onnx_ir.Node, pattern: NodePattern, levels: int = _EXTRA_IN_A_ROW) -> list[onnx_ir.Node]:
    """Return the nodes of the pattern's operator that `node` computes from, at most `levels` operators away.

    The search goes through other operators, but not through landmarks.
    """
    edge, found = [node], dict[onnx_ir.Node, None]()
    for _ in range(levels):
        edge = [item for item in edge if not is_landmark(item)]
        sources = dict.fromkeys(
            producer for item in edge for value in item.inputs if value is not None and (producer := value.producer())
        )
        found.update(dict.fromkeys(source for source in sources if same_operator(pattern, source)))
        edge = [source for source in sources if source not in found]
    return list(found)


def is_landmark(item: NodePattern | onnx_ir.Node) -> bool:
    """Return True for an operator that is not stepped over."""
    return item.op_type in _LANDMARKS


def may_stand_for(node: onnx_ir.Node, pattern: NodePattern) -> bool:
    """Return True if the node could be another spelling of the pattern node, such as Mul for Div.

    Then it has as many inputs, and one of the operators that the pattern node reads is among them.
    """
    if is_landmark(node) != is_landmark(pattern) or len(node.inputs) != len(pattern.inputs):
        return False
    producers = {producer for value in node.inputs if value is not None and (producer := value.producer())}
    return any(same_operator(child.node, producer) for child in children(pattern) for producer in producers)


def readers(
    attempt: Attempt, pattern: NodePattern
) -> tuple[list[onnx_ir.Node], tuple[NodePattern, onnx_ir.Value] | None]:
    """Find the nodes that may be `pattern`, upward from what is bound: among its users, or users of users.

    Returns these nodes, and the pattern node and the value whose users were looked at last; the latter is None if
    nothing is bound.
    """
    stuck: tuple[NodePattern, onnx_ir.Value] | None = None
    for item in pattern.inputs:
        values, below = _climb(attempt, item)
        stuck = stuck or below
        if not values:
            continue
        users = dict.fromkeys(user for value in values for user in value.consumers())
        found = [user for user in users if same_operator(pattern, user)]
        return found, (pattern, values[0])
    return [], stuck


def _climb(
    attempt: Attempt, item: ValuePattern
) -> tuple[list[onnx_ir.Value], tuple[NodePattern, onnx_ir.Value] | None]:
    """Return the values that `item` may be, given what is bound below it, and where the climb ended.

    The second is the pattern node and the value whose users were looked at last, or None.
    """
    if isinstance(item, (Weight, Scalar, Maybe)):
        item = item.variable
    if isinstance(item, Variable):
        value = attempt.bindings.get(item.name)
        return [value] if isinstance(value, onnx_ir.Value) else [], None
    if isinstance(item, Alternatives):
        pairs = [_climb(attempt, choice) for choice in item.choices.values()]
        return [value for values, _ in pairs for value in values], next((stuck for _, stuck in pairs if stuck), None)
    if not isinstance(item, Output):
        return [], None
    if item.node in attempt.nodes:
        nodes, stuck = [attempt.nodes[item.node]], None
    else:
        nodes, stuck = readers(attempt, item.node)
    return [node.outputs[item.index] for node in nodes if item.index < len(node.outputs)], stuck


def levels_of(pattern: Pattern) -> int:
    """Return the largest number of nodes on a way from a root to a leaf."""
    known: dict[NodePattern, int] = {}

    def levels(item: ValuePattern) -> int:
        if isinstance(item, Alternatives):
            return max(map(levels, item.choices.values()), default=0)
        if not isinstance(item, Output):
            return 0
        if item.node not in known:
            known[item.node] = 1 + max(map(levels, item.node.inputs), default=0)
        return known[item.node]

    return max(map(levels, pattern.roots))
