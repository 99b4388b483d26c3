"""Find out how near a pattern comes at a node, by a tolerant match that goes on where the matcher gives up.

The search explores commuted inputs and alternatives, steps over an extra or an absent operator, and keeps the attempt
in which most nodes fit. Every difference is recorded. This serves explanations only: the matcher decides what matches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir

from passopt.ir.weights.lazy_weight import is_checkpoint_weight, small_constant
from passopt.passes.explain.attempt import Attempt
from passopt.passes.explain.differences import (
    Difference,
    Words,
    attribute_text,
    children,
    expected_words,
    found_words,
    input_place,
    operator,
)
from passopt.passes.explain.search_steps import behind, choices, is_landmark, may_stand_for, readers, same_operator
from passopt.passes.patterns.language import (
    Absent,
    Alternatives,
    Maybe,
    NodePattern,
    Number,
    Numbers,
    Output,
    Pattern,
    Rest,
    Scalar,
    ValuePattern,
    Variable,
    Weight,
    outputs_of,
)
from passopt.passes.patterns.literals import attribute_value, is_constant, same_attribute

#: How many attempts are followed at the same time: of a rule's commuted inputs, few matter at once.
_BEAM = 6
#: How many pattern nodes are visited per place; after that, no operator is stepped over any more.
_BUDGET = 1500
#: The same where the root is another operator: there are many such places, and most are nothing like the pattern.
_BUDGET_BELOW = 250
_MISSING = object()


def nearest(pattern: Pattern, node: onnx_ir.Node, opset: int, labels: Mapping[str, str] | None = None) -> Attempt:
    """Return the attempt that comes nearest with the pattern's first root at `node`.

    `opset` is the opset of the model, and `labels` fixes alternatives by name.
    """
    return _Search(opset).at_root(pattern, node, _begun(labels or {}))


def nearest_below(
    pattern: Pattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None, opset: int
) -> Attempt:
    """Return the nearest attempt where the root is another operator, or is missing.

    `child`, an operator that the root reads, is laid over `source`. `reader` is the node that reads `source` where the
    root should stand, or None if nothing does. `opset` is the opset of the model.
    """
    return _Search(opset, _BUDGET_BELOW).below_root(pattern, child, source, reader)


def _begun(labels: Mapping[str, str]) -> Attempt:
    """Return an empty attempt with these labels chosen."""
    return Attempt(bindings=dict(labels), labels=dict(labels))


class _Search:
    """One search at one place, which steps over no more operators once its budget of visits is spent."""

    def __init__(self, opset: int, budget: int = _BUDGET) -> None:
        self._opset = opset
        self._budget = budget
        self._visits = 0
        self._below: dict[NodePattern, tuple[NodePattern, ...]] = {}

    def at_root(self, pattern: Pattern, node: onnx_ir.Node, begun: Attempt) -> Attempt:
        """Return the nearest attempt with the first root at `node`; see `nearest`."""
        options = [(root, labels) for root, labels in choices(pattern.roots[0]) if begun.allows(labels)]
        fitting = [option for option in options if same_operator(option[0].node, node)] or options
        found = [made for root, labels in fitting for made in self.node(begun.takes(labels), root.node, node)]
        return self._others(pattern, _best(found))

    def below_root(self, pattern: Pattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None) -> Attempt:
        """Return the nearest attempt without the first root itself; see `nearest_below`."""
        root, labels = next(item for item in choices(pattern.roots[0]) if child in children(item[0].node))
        name = source.outputs[child.index].name or ""
        expected = Words(f"{operator(root.node)} that reads", name)
        found = Words(operator(reader), reader.outputs[0].name or "") if reader is not None else Words("no node")
        difference = Difference("root", root.node, source, "read by", expected, found, reader)
        begun = Attempt().takes(labels).differs(difference, [root.node])
        options = self._siblings(self.node(begun, child.node, source), root.node, child, source, reader)
        return self._others(pattern, options)

    def _others(self, pattern: Pattern, found: list[Attempt]) -> Attempt:
        for index, root in enumerate(pattern.roots[1:], 2):
            place = f"root {index} of {len(pattern.roots)}"
            found = _best([option for begun in found for option in self._further_root(begun, root, place)])
        return found[0]

    # Nodes.

    def node(self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node) -> list[Attempt]:
        """Return the ways in which a node fits a node pattern, best first; there is always at least one."""
        if not same_operator(pattern, node):
            difference = Difference(
                "operator", pattern, node, "", Words(operator(pattern)), Words(operator(node)), node
            )
            return self._astray(attempt, pattern, node, difference, None)
        self._visits += 1
        begun = self._own(attempt.lays(pattern, node), pattern, node)
        if pattern.bind:
            begun = begun.binds(pattern.bind, node.outputs[0])
        found = self._inputs(begun, pattern, node)
        return [_settled(option, pattern) for option in found]

    def _own(self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node) -> Attempt:
        """Record what differs in the node itself: attributes, and the numbers of inputs and outputs."""
        used = len(node.inputs)
        _, most = pattern.input_counts
        while used > most and node.inputs[used - 1] is None:
            used -= 1
        if used > most:
            words = Words(f"{len(pattern.inputs)} inputs"), Words(str(used))
            attempt = attempt.differs(Difference("inputs", pattern, node, "", *words))
        if pattern.outputs > 1 and len(node.outputs) != pattern.outputs:
            words = Words(f"{pattern.outputs} outputs"), Words(str(len(node.outputs)))
            attempt = attempt.differs(Difference("outputs", pattern, node, "", *words))
        for name, expected in pattern.attributes.items():
            attempt = self._attribute(attempt, pattern, node, name, expected)
        return attempt

    def _attribute(
        self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node, name: str, expected: Any
    ) -> Attempt:
        found = attribute_value(node, name, self._opset)
        if isinstance(expected, Maybe):
            if found is None:
                return attempt
            expected = expected.variable
        if isinstance(expected, Variable):
            bound = attempt.bindings.get(expected.name, found)
            if found is not None and bound == found:
                return attempt.binds(expected.name, found)
            wanted = f"the same as {expected.name}, {attribute_text(name, bound)}" if bound is not None else "a value"
        elif same_attribute(expected, found):
            return attempt
        else:
            wanted = attribute_text(name, expected)
        words = Words(wanted), Words(attribute_text(name, found))
        return attempt.differs(Difference("attribute", pattern, node, name, *words))

    def _inputs(self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node) -> list[Attempt]:
        orders = [(0, 1), (1, 0)] if pattern.commutes else [tuple(range(len(pattern.inputs)))]
        found: list[Attempt] = []
        for order in orders:
            options = [attempt]
            for item, position in zip(pattern.inputs, order, strict=True):
                place = _Place(pattern, node, position)
                options = _best([option for begun in options for option in self._value(begun, item, place)])
            found += options
        return _best(found)

    # Values.

    def _value(self, attempt: Attempt, pattern: ValuePattern, place: _Place) -> list[Attempt]:
        """Return the ways in which the value at a place fits a value pattern, best first; always at least one."""
        if isinstance(pattern, Alternatives):
            return self._alternatives(attempt, pattern, place)
        if isinstance(pattern, Output):
            return self._output(attempt, pattern, place)
        if isinstance(pattern, (Number, Numbers)):
            fits = is_constant(pattern, place.value)
            return [attempt if fits else attempt.differs(place.differs("constant", pattern, attempt))]
        if isinstance(pattern, Weight) and not (place.value is not None and is_checkpoint_weight(place.value)):
            return [attempt.differs(place.differs("weight", pattern, attempt))]
        if isinstance(pattern, Scalar) and ((array := small_constant(place.value)) is None or array.size != 1):
            return [attempt.differs(place.differs("constant", pattern, attempt))]
        if isinstance(pattern, Absent):
            return [attempt if place.value is None else attempt.differs(place.differs("value", pattern, attempt))]
        if isinstance(pattern, Rest):
            return [attempt]
        variable = pattern.variable if isinstance(pattern, (Weight, Scalar, Maybe)) else pattern
        wanted = attempt.bindings.get(variable.name, place.value)
        if wanted is not place.value or (place.value is None and not isinstance(pattern, Maybe)):
            return [attempt.differs(place.differs("value", variable, attempt))]
        return [attempt.binds(variable.name, place.value)]

    def _alternatives(self, attempt: Attempt, pattern: Alternatives, place: _Place) -> list[Attempt]:
        bound = attempt.bindings.get(pattern.name, _MISSING)
        found: list[Attempt] = []
        for label, choice in pattern.choices.items():
            if bound is _MISSING or bound == label:
                found += self._value(attempt.takes({pattern.name: label}), choice, place)
        if not found:
            return [attempt.differs(place.differs("value", pattern, attempt))]
        known = len(attempt.differences)
        if bound is _MISSING and all(place.is_where(option.differences[known:]) for option in found):
            expected = expected_words(pattern, attempt.bindings)
            found = [option.expects(known, expected) for option in found]
        return _best(found)

    def _output(self, attempt: Attempt, pattern: Output, place: _Place) -> list[Attempt]:
        value, producer = place.value, place.producer
        if pattern.node in attempt.nodes:
            same = attempt.nodes[pattern.node].outputs[pattern.index]
            if value is same:
                return [attempt]
            difference = place.differs("value", pattern, attempt)
            expected = Words(f"the same {difference.expected.text} as before,", same.name or "")
            return [attempt.differs(dataclasses.replace(difference, expected=expected))]
        if any(item.owner is pattern.node for item in attempt.differences):
            return [attempt]  # the same pattern node is explained already
        difference = dataclasses.replace(place.differs("operator", pattern, attempt), owner=pattern.node)
        if producer is None or value is None:
            return [attempt.differs(difference, self._nodes(pattern))]
        if not same_operator(pattern.node, producer):
            return self._astray(attempt, pattern.node, producer, difference, place)
        if value.index() != pattern.index:
            attempt = attempt.differs(dataclasses.replace(difference, kind="value"))
        return self.node(attempt, pattern.node, producer)

    # Where the operator is another one.

    def _astray(
        self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node, difference: Difference, place: _Place | None
    ) -> list[Attempt]:
        """Return the ways to go on where the graph has another operator than the pattern.

        The pattern node is given up; or `node` is stepped over as an extra operator; or the pattern node is stepped
        over as an absent one; or `node` is taken for another spelling of it; or only the pattern node itself is given
        up, and one of the operators that it reads is looked for behind `node`.
        """
        found = [attempt.differs(difference, self._nodes(pattern))]
        if self._visits > self._budget:
            return found
        for source in behind(node, pattern):
            extra = dataclasses.replace(difference, kind="extra", owner=None)
            found += self.node(attempt.differs(extra), pattern, source)
        if place is not None and not is_landmark(pattern):
            found += self._absent(attempt, pattern, place, difference)
        if may_stand_for(node, pattern):
            taken = attempt.differs(difference).lays(pattern, node)
            found += [_settled(option, pattern) for option in self._inputs(taken, pattern, node)]
            return _best(found)
        for child in children(pattern) if not is_landmark(pattern) else ():
            for source in behind(node, child.node, 1):
                found += self.node(attempt.differs(difference, self._without(pattern, child)), child.node, source)
        return _best(found)

    def _absent(self, attempt: Attempt, pattern: NodePattern, place: _Place, difference: Difference) -> list[Attempt]:
        """Step over the pattern node: one of the operators that it reads stands in its place."""
        found: list[Attempt] = []
        for child in children(pattern):
            if place.producer is None or not same_operator(child.node, place.producer) or child.node in attempt.nodes:
                continue
            absent = dataclasses.replace(difference, kind="absent")
            found += self._output(attempt.differs(absent, self._without(pattern, child)), child, place)
        return found

    # Roots.

    def _siblings(
        self, found: list[Attempt], root: NodePattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None
    ) -> list[Attempt]:
        """Lay the root's inputs other than `child` over what `reader` reads in place of the root."""
        inputs = reader.inputs if reader is not None else ()
        producers = [node for value in inputs if value is not None and (node := value.producer()) not in {None, source}]
        for item in root.inputs:
            outputs = list(outputs_of(item))
            if child in outputs:
                continue
            pairs = [(o.node, p) for o in outputs for p in producers if p is not None and same_operator(o.node, p)]
            if pairs:
                found = _best([option for begun in found for option in self.node(begun, *pairs[0])])
            else:
                found = [option.gives_up(self._nodes(item)) for option in found]
        return found

    def _further_root(self, attempt: Attempt, root: ValuePattern, place: str) -> list[Attempt]:
        """Look for a further root among the users of what is bound already."""
        options = [(output.node, labels) for output, labels in choices(root) if attempt.allows(labels)]
        if any(node in attempt.nodes for node, _ in options):
            return [attempt]
        found: list[Attempt] = []
        stuck: tuple[NodePattern, onnx_ir.Value] | None = None
        for node, labels in options:
            users, ended = readers(attempt, node)
            stuck = stuck or ended
            for user in users:
                if user not in attempt.nodes.values():
                    found += self.node(attempt.takes(labels), node, user)
        if found or not options:
            return found or [attempt]
        lost = self._nodes(options[0][0])
        if stuck is None and attempt.differences:
            return [attempt.gives_up(lost)]  # what the root reads is missing, which another difference explains already
        return [attempt.differs(_no_root(attempt, options[0][0], stuck, place), lost)]

    def _nodes(self, item: NodePattern | ValuePattern) -> tuple[NodePattern, ...]:
        """Return the node patterns of a piece, each once; of alternatives, those of the smallest one."""
        piece = Output(item, 0) if isinstance(item, NodePattern) else item
        if isinstance(piece, Alternatives):
            return min((self._nodes(choice) for choice in piece.choices.values()), key=len)
        if not isinstance(piece, Output):
            return ()
        if piece.node not in self._below:
            inside = (below for operand in piece.node.inputs for below in self._nodes(operand))
            self._below[piece.node] = tuple(dict.fromkeys((piece.node, *inside)))
        return self._below[piece.node]

    def _without(self, pattern: NodePattern, child: Output) -> list[NodePattern]:
        """Return a pattern node and what is below it, except for what is below `child`."""
        kept = set(self._nodes(child))
        return [item for item in self._nodes(pattern) if item not in kept]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Input number `position` of a graph node that the pattern node `owner` was laid over."""

    owner: NodePattern
    node: onnx_ir.Node
    position: int

    @property
    def value(self) -> onnx_ir.Value | None:
        return self.node.inputs[self.position] if self.position < len(self.node.inputs) else None

    @property
    def producer(self) -> onnx_ir.Node | None:
        return self.value.producer() if self.value is not None else None

    def differs(self, kind: str, pattern: ValuePattern, attempt: Attempt) -> Difference:
        expected = expected_words(pattern, attempt.bindings)
        place = input_place(self.position, pattern)
        return Difference(kind, self.owner, self.node, place, expected, found_words(self.value), self.producer)

    def is_where(self, differences: Sequence[Difference]) -> bool:
        """Return True if the first of these differences is that something else stands at this very place."""
        first = differences[0] if differences else None
        stands = first is not None and first.kind in {"operator", "constant", "weight", "value"}
        return (
            stands
            and first is not None
            and first.node is self.node
            and first.place.partition(" (")[0] == f"input {self.position}"
        )


def _no_root(
    attempt: Attempt, root: NodePattern, stuck: tuple[NodePattern, onnx_ir.Value] | None, place: str
) -> Difference:
    """Return the difference for a further root that was not found, at the value where the search got stuck."""
    first = next(iter(attempt.nodes.values()))
    if stuck is None:
        return Difference("root", root, first, place, Words(operator(root)), Words("nothing that it could read"))
    wanted, value = stuck
    found = ", ".join(dict.fromkeys(operator(user) for user in value.consumers()))
    expected = Words(f"{operator(wanted)} that reads", value.name or "")
    return Difference("root", root, value.producer() or first, place, expected, Words(f"readers {found or 'none'}"))


def _settled(attempt: Attempt, pattern: NodePattern) -> Attempt:
    """Count a node whose inputs were visited: it fits if no difference is its own."""
    if any(item.owner is pattern for item in attempt.differences):
        return dataclasses.replace(attempt, missed=attempt.missed | {pattern})
    return dataclasses.replace(attempt, matched=attempt.matched + 1)


def _best(attempts: list[Attempt]) -> list[Attempt]:
    """Return the best attempts, best first, as many as are followed at the same time."""
    return sorted(attempts, key=lambda item: (-item.score, -item.matched))[:_BEAM]
