"""How near a pattern comes at a node: a tolerant match that goes on where the matcher gives up.

It explores commuted inputs and alternatives, steps over an extra or an absent operator, and keeps the attempt in which
most nodes fit. Every difference is recorded. For explanations only: `matching` decides what matches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir

from passopt.ir.weights import is_checkpoint_weight
from passopt.passes.attempts import Attempt
from passopt.passes.comparing import attribute_value, is_constant, same_attribute
from passopt.passes.differences import (
    Difference,
    Words,
    attribute_text,
    children,
    expected_words,
    found_words,
    input_place,
    operator,
    outputs_of,
)
from passopt.passes.pattern import (
    Absent,
    Alternatives,
    Maybe,
    NodePattern,
    Number,
    Numbers,
    Output,
    Pattern,
    Rest,
    ValuePattern,
    Variable,
    Weight,
)

#: Attempts that are followed at the same time; a rule has few commuted inputs that matter at once.
_BEAM = 6
#: Pattern nodes visited per place; after that no operator is stepped over any more.
_BUDGET = 1500
#: Operators that may stand between two nodes of a pattern, in a row.
_EXTRA_IN_A_ROW = 2
#: Operators that an exporter does not slip in between others: what lies behind them is another part of the model.
_NOT_EXTRA = frozenset({"MatMul", "Gemm", "Conv", "Gather", "Attention", "Softmax"})
_MISSING = object()


def nearest(pattern: Pattern, node: onnx_ir.Node, opset: int, labels: Mapping[str, str] | None = None) -> Attempt:
    """The attempt that comes nearest with the pattern's first root at `node`; `labels` fixes alternatives by name."""
    return _Search(opset).at_root(pattern, node, _begun(labels or {}))


def nearest_below(
    pattern: Pattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None, opset: int
) -> Attempt:
    """The nearest attempt where the root is another operator: `reader` reads what `child` of the root matches."""
    return _Search(opset).below_root(pattern, child, source, reader)


def _begun(labels: Mapping[str, str]) -> Attempt:
    return Attempt(bindings=dict(labels), labels=dict(labels))


class _Search:
    def __init__(self, opset: int) -> None:
        self._opset = opset
        self._visits = 0

    def at_root(self, pattern: Pattern, node: onnx_ir.Node, begun: Attempt) -> Attempt:
        options = [(root, labels) for root, labels in _choices(pattern.roots[0]) if _fits(labels, begun)]
        fitting = [option for option in options if _same_operator(option[0].node, node)] or options
        found = [made for root, labels in fitting for made in self.node(begun.takes(labels), root.node, node)]
        return self._others(pattern, _best(found))

    def below_root(self, pattern: Pattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None) -> Attempt:
        root, labels = next(item for item in _choices(pattern.roots[0]) if child in children(item[0].node))
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
        """The ways in which a node fits a node pattern, best first; there is always one."""
        if not _same_operator(pattern, node):
            difference = Difference(
                "operator", pattern, node, "", Words(operator(pattern)), Words(operator(node)), node
            )
            return self._astray(attempt, pattern, node, difference, None)
        self._visits += 1
        begun = self._own(dataclasses.replace(attempt, nodes={**attempt.nodes, pattern: node}), pattern, node)
        if pattern.bind:
            begun = begun.binds(pattern.bind, node.outputs[0])
        found = self._inputs(begun, pattern, node)
        return [_settled(option, pattern) for option in found]

    def _own(self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node) -> Attempt:
        """What a node differs in by itself: attributes, the numbers of inputs and outputs."""
        used = len(node.inputs)
        least, most = pattern.input_counts
        while used > most and node.inputs[used - 1] is None:
            used -= 1
        if not least <= used <= most:
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
        count = min(len(pattern.inputs), len(node.inputs))
        orders = [(0, 1), (1, 0)] if pattern.commutes and count == 2 else [tuple(range(count))]
        found: list[Attempt] = []
        for order in orders:
            options = [attempt]
            for item, position in zip(pattern.inputs, order, strict=False):
                place = _Place(pattern, node, position)
                options = _best([option for begun in options for option in self._value(begun, item, place)])
            found += options
        absent = [below for item in pattern.inputs[count:] for below in _nodes_of(item)]
        return _best([option.gives_up(absent) for option in found])

    # Values.

    def _value(self, attempt: Attempt, pattern: ValuePattern, place: _Place) -> list[Attempt]:
        """The ways in which what stands at a place fits a value pattern, best first; there is always one."""
        if isinstance(pattern, Alternatives):
            return self._alternatives(attempt, pattern, place)
        if isinstance(pattern, Output):
            return self._output(attempt, pattern, place)
        if isinstance(pattern, (Number, Numbers)):
            fits = is_constant(pattern, place.value)
            return [attempt if fits else attempt.differs(place.differs("constant", pattern, attempt))]
        if isinstance(pattern, Weight) and not (place.value is not None and is_checkpoint_weight(place.value)):
            return [attempt.differs(place.differs("weight", pattern, attempt))]
        if isinstance(pattern, Absent):
            return [attempt if place.value is None else attempt.differs(place.differs("value", pattern, attempt))]
        if isinstance(pattern, Rest) or (isinstance(pattern, Maybe) and place.value is None):
            return [attempt]
        variable = pattern.variable if isinstance(pattern, (Weight, Maybe)) else pattern
        if attempt.bindings.get(variable.name, place.value) is not place.value:
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
        if pattern.node in attempt.missed:
            return [attempt]
        difference = dataclasses.replace(place.differs("operator", pattern, attempt), owner=pattern.node)
        if producer is None or value is None:
            return [attempt.differs(difference, _nodes_of(pattern))]
        if not _same_operator(pattern.node, producer):
            return self._astray(attempt, pattern.node, producer, difference, place)
        if value.index() != pattern.index:
            attempt = attempt.differs(dataclasses.replace(difference, kind="value"))
        return self.node(attempt, pattern.node, producer)

    # Where the operator is another one.

    def _astray(
        self, attempt: Attempt, pattern: NodePattern, node: onnx_ir.Node, difference: Difference, place: _Place | None
    ) -> list[Attempt]:
        """Give the pattern node up; or step over `node`, or over the pattern node; or take `node` for another one."""
        found = [attempt.differs(difference, _nodes_of(Output(pattern, 0)))]
        if self._visits > _BUDGET:
            return found
        for source in _behind(node, pattern):
            extra = dataclasses.replace(difference, kind="extra", owner=None)
            found += self.node(attempt.differs(extra), pattern, source)
        if place is not None:
            found += self._absent(attempt, pattern, place, difference)
        if _may_stand_for(node, pattern):
            taken = dataclasses.replace(attempt, nodes={**attempt.nodes, pattern: node})
            found += [_settled(option, pattern) for option in self._inputs(taken.differs(difference), pattern, node)]
            return _best(found)
        for child in children(pattern):
            for source in _behind(node, child.node, 1):
                found += self.node(attempt.differs(difference, _without(pattern, child)), child.node, source)
        return _best(found)

    def _absent(self, attempt: Attempt, pattern: NodePattern, place: _Place, difference: Difference) -> list[Attempt]:
        """Step over the pattern node: one of the operators that it reads stands in its place."""
        found: list[Attempt] = []
        for child in children(pattern):
            if place.producer is None or not _same_operator(child.node, place.producer) or child.node in attempt.nodes:
                continue
            absent = dataclasses.replace(difference, kind="absent")
            found += self._output(attempt.differs(absent, _without(pattern, child)), child, place)
        return found

    # Roots.

    def _siblings(
        self, found: list[Attempt], root: NodePattern, child: Output, source: onnx_ir.Node, reader: onnx_ir.Node | None
    ) -> list[Attempt]:
        """The other inputs of a root that is another operator: looked for among the other inputs of `reader`."""
        inputs = reader.inputs if reader is not None else ()
        producers = [node for value in inputs if value is not None and (node := value.producer()) not in {None, source}]
        for item in root.inputs:
            outputs = outputs_of(item)
            if child in outputs:
                continue
            pairs = [(o.node, p) for o in outputs for p in producers if p is not None and _same_operator(o.node, p)]
            if pairs:
                found = _best([option for begun in found for option in self.node(begun, *pairs[0])])
            else:
                found = [option.gives_up(_nodes_of(item)) for option in found]
        return found

    def _further_root(self, attempt: Attempt, root: ValuePattern, place: str) -> list[Attempt]:
        """A further root is looked for among the users of what is bound already."""
        options = [(output.node, labels) for output, labels in _choices(root) if _fits(labels, attempt)]
        if any(node in attempt.nodes or node in attempt.missed for node, _ in options):
            return [attempt]
        found: list[Attempt] = []
        for node, labels in options:
            source = _source(attempt, node)
            for user in dict.fromkeys(source.consumers()) if source is not None else ():
                if _same_operator(node, user) and user not in attempt.nodes.values():
                    found += self.node(attempt.takes(labels), node, user)
        if found or not options:
            return found or [attempt]
        node, source = options[0][0], _source(attempt, options[0][0])
        if source is None and attempt.differences:
            return [attempt.gives_up(_nodes_of(Output(node, 0)))]  # what it reads is missing already
        return [attempt.differs(_no_root(attempt, node, source, place), _nodes_of(Output(node, 0)))]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Input `position` of a graph node that `owner` was laid over."""

    owner: NodePattern
    node: onnx_ir.Node
    position: int

    @property
    def value(self) -> onnx_ir.Value | None:
        return self.node.inputs[self.position]

    @property
    def producer(self) -> onnx_ir.Node | None:
        return self.value.producer() if self.value is not None else None

    def differs(self, kind: str, pattern: ValuePattern, attempt: Attempt) -> Difference:
        expected = expected_words(pattern, attempt.bindings)
        place = input_place(self.position, pattern)
        return Difference(kind, self.owner, self.node, place, expected, found_words(self.value), self.producer)

    def is_where(self, differences: Sequence[Difference]) -> bool:
        """True if the first of these differences is that something else stands at this very place."""
        first = differences[0] if differences else None
        stands = first is not None and first.kind in {"operator", "constant", "weight", "value"}
        return (
            stands
            and first is not None
            and first.node is self.node
            and first.place.partition(" (")[0] == f"input {self.position}"
        )


def _no_root(attempt: Attempt, root: NodePattern, source: onnx_ir.Value | None, place: str) -> Difference:
    first = next(iter(attempt.nodes.values()))
    if source is None:
        return Difference("root", root, first, place, Words(operator(root)), Words("nothing bound that it reads"))
    readers = ", ".join(dict.fromkeys(operator(user) for user in source.consumers()))
    expected = Words(f"{operator(root)} that reads", source.name or "")
    return Difference("root", root, source.producer() or first, place, expected, Words(f"readers {readers}"))


def _settled(attempt: Attempt, pattern: NodePattern) -> Attempt:
    """Count a node whose inputs were visited: it fits if no difference is its own."""
    if any(item.owner is pattern for item in attempt.differences):
        return dataclasses.replace(attempt, missed=attempt.missed | {pattern})
    return dataclasses.replace(attempt, matched=attempt.matched + 1)


def _best(attempts: list[Attempt]) -> list[Attempt]:
    return sorted(attempts, key=lambda item: (-item.score, -item.matched))[:_BEAM]


def _choices(root: ValuePattern) -> list[tuple[Output, dict[str, str]]]:
    """The outputs that a root may be, with the labels that choose them."""
    if isinstance(root, Output):
        return [(root, {})]
    if not isinstance(root, Alternatives):
        return []
    below = [(label, found) for label, choice in root.choices.items() for found in _choices(choice)]
    return [(output, {root.name: label, **labels}) for label, (output, labels) in below]


def _fits(labels: Mapping[str, str], attempt: Attempt) -> bool:
    return all(attempt.bindings.get(name, label) == label for name, label in labels.items())


def _same_operator(pattern: NodePattern, node: onnx_ir.Node) -> bool:
    return (pattern.op_type, pattern.domain) == (node.op_type, node.domain)


def _nodes_of(pattern: ValuePattern) -> Iterator[NodePattern]:
    """The node patterns of a piece, of the smallest alternatives, each once."""
    seen: dict[NodePattern, None] = {}
    work = [pattern]
    while work:
        item = work.pop()
        if isinstance(item, Alternatives):
            work.append(min(item.choices.values(), key=lambda choice: sum(1 for _ in _nodes_of(choice))))
        elif isinstance(item, Output) and item.node not in seen:
            seen[item.node] = None
            work.extend(item.node.inputs)
    yield from seen


def _without(pattern: NodePattern, child: Output) -> list[NodePattern]:
    """A pattern node and what is below it, but for what is below `child`."""
    kept = set(_nodes_of(child))
    return [item for item in _nodes_of(Output(pattern, 0)) if item not in kept]


def _behind(node: onnx_ir.Node, pattern: NodePattern, levels: int = _EXTRA_IN_A_ROW) -> list[onnx_ir.Node]:
    """The nodes of the pattern's operator that `node` computes from, through a few others."""
    edge, found = [node], dict[onnx_ir.Node, None]()
    for _ in range(levels):
        edge = [item for item in edge if item.op_type not in _NOT_EXTRA]
        sources = dict.fromkeys(
            producer for item in edge for value in item.inputs if value is not None and (producer := value.producer())
        )
        found.update(dict.fromkeys(source for source in sources if _same_operator(pattern, source)))
        edge = [source for source in sources if source not in found]
    return list(found)


def _may_stand_for(node: onnx_ir.Node, pattern: NodePattern) -> bool:
    """True if the node could be another spelling of the pattern node, of the same inputs: Mul for Div."""
    if (node.op_type in _NOT_EXTRA) != (pattern.op_type in _NOT_EXTRA) or len(node.inputs) != len(pattern.inputs):
        return False
    producers = {producer for value in node.inputs if value is not None and (producer := value.producer())}
    return any(_same_operator(child.node, producer) for child in children(pattern) for producer in producers)


def _source(attempt: Attempt, root: NodePattern) -> onnx_ir.Value | None:
    """The first input of a root that is bound already."""
    return next((value for item in root.inputs if (value := _bound(attempt, item)) is not None), None)


def _bound(attempt: Attempt, item: ValuePattern) -> onnx_ir.Value | None:
    if isinstance(item, (Variable, Weight)):
        value = attempt.bindings.get(item.name if isinstance(item, Variable) else item.variable.name)
        return value if isinstance(value, onnx_ir.Value) else None
    if isinstance(item, Output) and item.node in attempt.nodes:
        return attempt.nodes[item.node].outputs[item.index]
    return None
