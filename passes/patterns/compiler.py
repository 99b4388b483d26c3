"""Compile a traced pattern into closures, called steps, for the `matcher` to run.

A step looks at one piece of the graph, writes what it finds into a register, and calls the step after it. If that step
fails, the first one undoes its write and tries its next choice; so the search is complete. Since every step holds the
one after it, the steps are made from the last to the first.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_ir

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
)
from passopt.passes.patterns.quick_tests import Constants, Test, attribute_reader, attribute_test, input_test
from passopt.passes.patterns.root_search import UNSET, Registers, RootSearch

Step: TypeAlias = Callable[[Registers], bool]
Enter: TypeAlias = Callable[[onnx_ir.Node, Registers], bool]


def _accept(registers: Registers) -> bool:
    """End a successful match; it is the step after all others."""
    return True


class PatternCompiler:
    """Make the steps of one pattern, which use `size` registers.

    `nodes` gives the register of each node pattern, which holds the matched graph node; `names` that of each name,
    which holds what the name is bound to. Register 0 holds the node at which the match starts, if the first root is a
    choice.
    """

    def __init__(self, opset: int, constants: Constants) -> None:
        self.size = 1
        self.nodes: dict[NodePattern, int] = {}
        self.names: dict[str, int] = {}
        self._opset = opset
        self._constants = constants
        self._uses: collections.Counter[NodePattern | Alternatives] = collections.Counter()
        self._shared: dict[NodePattern, tuple[int, Enter]] = {}
        self._shared_choices: dict[Alternatives, tuple[int, int, Step]] = {}
        self._search = RootSearch(self._slot_of_name, self._slot_of_node)

    def pattern(self, pattern: Pattern) -> Enter:
        """Return the function that starts a match of all roots at a node."""
        for root in pattern.roots:
            self._count_uses(root)
        then: Step = _accept
        for root in reversed(pattern.roots[1:]):
            then = self._further_root(root, then)
        return self._first_root(pattern.roots[0], then)

    def _count_uses(self, item: ValuePattern) -> None:
        """Count how often each node and each choice of alternatives is used, and all that stands below it."""
        if isinstance(item, Alternatives):
            self._uses[item] += 1
            if self._uses[item] == 1:
                for choice in item.choices.values():
                    self._count_uses(choice)
        elif isinstance(item, Output):
            self._uses[item.node] += 1
            if self._uses[item.node] == 1:
                for operand in item.node.inputs:
                    self._count_uses(operand)

    def _register(self) -> int:
        self.size += 1
        return self.size - 1

    def _slot_of_name(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self._register()
        return self.names[name]

    def _slot_of_node(self, pattern: NodePattern) -> int:
        if pattern not in self.nodes:
            self.nodes[pattern] = self._register()
        return self.nodes[pattern]

    # Roots

    def _first_root(self, root: Output | Alternatives, then: Step) -> Enter:
        if isinstance(root, Output):
            return self._node(root.node, then)
        choices = self._root(root, 0, then)

        def enter(node: onnx_ir.Node, registers: Registers) -> bool:
            registers[0] = node
            return choices(registers)

        return enter

    def _root(self, root: ValuePattern, source: int, then: Step) -> Step:
        """Return the step that matches the node in register `source` as the root."""
        if isinstance(root, Output):
            enter, key = self._node(root.node, then), (root.node.op_type, root.node.domain)

            def step(registers: Registers) -> bool:
                node = registers[source]
                return (node.op_type, node.domain) == key and enter(node, registers)

            return step
        assert isinstance(root, Alternatives)
        choices = {label: self._root(choice, source, then) for label, choice in root.choices.items()}
        return self._labelled(root.name, choices)

    def _further_root(self, root: Output | Alternatives, then: Step) -> Step:
        """Return the step that looks for a later root among the users of what is bound already.

        It has nothing to look for if the root's node was matched as a part of an earlier root.
        """
        if isinstance(root, Alternatives):
            choices = {}
            for label, choice in root.choices.items():
                assert isinstance(choice, (Output, Alternatives))
                choices[label] = self._further_root(choice, then)
            return self._labelled(root.name, choices)
        slot, enter = self._slot_of_node(root.node), self._node(root.node, then)
        users, taken = self._search.users(root.node), self.nodes

        def step(registers: Registers) -> bool:
            if registers[slot] is not UNSET:
                return then(registers)
            for node in dict.fromkeys(users(registers)):
                if any(registers[other] is node for other in taken.values()):
                    continue
                if enter(node, registers):
                    return True
            return False

        return step

    # Values. Register `source` holds the inputs of a node; the step matches the one at `index`.

    def _value(self, item: ValuePattern, source: int, index: int, then: Step) -> Step:
        if isinstance(item, (Number, Numbers, Absent)):
            return self._tested(item, source, index, then)
        if isinstance(item, Variable):
            return self._variable(item, source, index, then)
        if isinstance(item, (Weight, Scalar)):
            return self._guarded(item, source, index, then)
        if isinstance(item, Maybe):
            return self._maybe(item, source, index, then)
        if isinstance(item, Rest):
            return self._rest(item, source, index, then)
        if isinstance(item, Output):
            return self._output(item, source, index, then)
        if self._uses[item] > 1:
            return self._several_times(item, source, index, then)
        choices = {label: self._value(choice, source, index, then) for label, choice in item.choices.items()}
        return self._labelled(item.name, choices)

    def _several_times(self, item: Alternatives, source: int, index: int, then: Step) -> Step:
        """Return the step of alternatives that are used in several places, which are compiled only once.

        Otherwise the number of steps would double with every level of alternatives inside of alternatives.
        """
        if item not in self._shared_choices:
            inputs, resume = self._register(), self._register()
            go_on: Step = lambda registers: bool(registers[resume](registers))  # noqa: E731
            choices = {label: self._value(choice, inputs, 0, go_on) for label, choice in item.choices.items()}
            self._shared_choices[item] = inputs, resume, self._labelled(item.name, choices)
        inputs, resume, body = self._shared_choices[item]

        def step(registers: Registers) -> bool:
            around = registers[inputs], registers[resume]  # They may hold a use at another place, which still runs.
            registers[inputs], registers[resume] = (registers[source][index],), then
            if body(registers):
                return True
            registers[inputs], registers[resume] = around
            return False

        return step

    def _tested(self, item: ValuePattern, source: int, index: int, then: Step) -> Step:
        test = input_test(item, self._constants)
        assert test is not None
        return lambda registers: test(registers[source][index]) and then(registers)

    def _variable(self, item: Variable, source: int, index: int, then: Step) -> Step:
        slot = self._slot_of_name(item.name)

        def step(registers: Registers) -> bool:
            value, bound = registers[source][index], registers[slot]
            if bound is not UNSET:
                return bound is value and then(registers)
            if value is None:
                return False
            registers[slot] = value
            if then(registers):
                return True
            registers[slot] = UNSET
            return False

        return step

    def _guarded(self, item: Weight | Scalar, source: int, index: int, then: Step) -> Step:
        bind, test = self._variable(item.variable, source, index, then), input_test(item, self._constants)
        assert test is not None
        return lambda registers: test(registers[source][index]) and bind(registers)

    def _maybe(self, item: Maybe, source: int, index: int, then: Step) -> Step:
        bind, absent = self._variable(item.variable, source, index, then), self._bound(item.variable.name, then)

        def step(registers: Registers) -> bool:
            return bind(registers) if registers[source][index] is not None else absent(None, registers)

        return step

    def _rest(self, item: Rest, source: int, index: int, then: Step) -> Step:
        bind = self._bound(item.name, then)
        return lambda registers: bind(list(registers[source][index:]), registers)

    def _bound(self, name: str, then: Step) -> Callable[[Any, Registers], bool]:
        """Return a function that binds a name to something that later uses are compared with by equality."""
        slot = self._slot_of_name(name)

        def step(found: Any, registers: Registers) -> bool:
            bound = registers[slot]
            if bound is not UNSET:
                return bool(bound == found) and then(registers)
            registers[slot] = found
            if then(registers):
                return True
            registers[slot] = UNSET
            return False

        return step

    def _labelled(self, name: str, choices: dict[str, Step]) -> Step:
        slot, ordered = self._slot_of_name(name), tuple(choices.items())

        def step(registers: Registers) -> bool:
            bound = registers[slot]
            if bound is not UNSET:
                return bound in choices and choices[bound](registers)
            for label, choice in ordered:
                registers[slot] = label
                if choice(registers):
                    return True
            registers[slot] = UNSET
            return False

        return step

    def _output(self, item: Output, source: int, index: int, then: Step) -> Step:
        enter, position = self._node(item.node, then), item.index
        op_type, domain = item.node.op_type, item.node.domain

        def step(registers: Registers) -> bool:
            value = registers[source][index]
            if value is None:
                return False
            node = value.producer()
            if node is None or node.op_type != op_type or node.domain != domain or value.index() != position:
                return False
            return enter(node, registers)

        return step

    # Nodes

    def _node(self, pattern: NodePattern, then: Step) -> Enter:
        """Return the function that matches a given node.

        A pattern used in several places is compiled once; each use puts the step to continue with into a register.
        """
        if self._uses[pattern] == 1:
            return self._body(pattern, then)
        slot = self._slot_of_node(pattern)
        if pattern not in self._shared:
            resume = self._register()
            self._shared[pattern] = resume, self._body(pattern, lambda registers: bool(registers[resume](registers)))
        resume, body = self._shared[pattern]

        def enter(node: onnx_ir.Node, registers: Registers) -> bool:
            known = registers[slot]
            if known is not UNSET:
                return known is node and then(registers)
            registers[resume] = then
            return body(node, registers)

        return enter

    def _body(self, pattern: NodePattern, then: Step) -> Enter:
        """Return the function that matches a node of the right operator: cheap tests first, then the inputs in order.

        The inputs of a commuting operator are tried as they are and then swapped.
        """
        slot, source = self._slot_of_node(pattern), self._register()
        after_node = self._inputs(pattern, source, then)
        for name, expected in reversed(list(pattern.attributes.items())):
            if isinstance(expected, (Variable, Maybe)):
                after_node = self._attribute(slot, name, expected, after_node)
        if pattern.bind is not None:
            after_node = self._bind(pattern.bind, slot, after_node)
        tests = tuple((i, test) for i, item in enumerate(pattern.inputs) if (test := input_test(item, self._constants)))
        swapped = tuple((1 - i, test) for i, test in tests) if pattern.commutes else None
        node_tests, count = self._node_tests(pattern), len(pattern.inputs)

        def body(node: onnx_ir.Node, registers: Registers) -> bool:
            inputs: Sequence[onnx_ir.Value | None] = node.inputs
            if len(inputs) != count:
                adjusted = _adjusted(pattern, inputs)
                if adjusted is None:
                    return False
                inputs = adjusted
            fits, fits_swapped = True, swapped is not None
            for i, test in tests:
                if not test(inputs[i]):
                    fits = False
                    break
            if swapped is not None:
                for i, test in swapped:
                    if not test(inputs[i]):
                        fits_swapped = False
                        break
            if not fits and not fits_swapped:
                return False
            for test in node_tests:
                if not test(node):
                    return False
            registers[slot] = node
            if fits:
                registers[source] = inputs
                if after_node(registers):
                    return True
            if fits_swapped:
                registers[source] = inputs[::-1]
                if after_node(registers):
                    return True
            registers[slot] = UNSET
            return False

        return body

    def _inputs(self, pattern: NodePattern, source: int, then: Step) -> Step:
        """Return the steps of all inputs in order, without those that the tests of the node have settled already."""
        for index in reversed(range(len(pattern.inputs))):
            item = pattern.inputs[index]
            if not isinstance(item, (Number, Numbers, Absent)):
                then = self._value(item, source, index, then)
        return then

    def _bind(self, name: str, node: int, then: Step) -> Step:
        bind = self._bound(name, then)
        return lambda registers: bind(registers[node].outputs[0], registers)

    def _attribute(self, node: int, name: str, expected: Variable | Maybe, then: Step) -> Step:
        variable = expected if isinstance(expected, Variable) else expected.variable
        bind, may_lack = self._bound(variable.name, then), isinstance(expected, Maybe)
        read = attribute_reader(name, self._opset)

        def step(registers: Registers) -> bool:
            found = read(registers[node])
            return (found is not None or may_lack) and bind(found, registers)

        return step

    def _node_tests(self, pattern: NodePattern) -> tuple[Test, ...]:
        """Return the tests of the node itself: its attributes that are not variables, and its number of outputs."""
        tests = [
            attribute_test(name, expected, self._opset)
            for name, expected in pattern.attributes.items()
            if not isinstance(expected, (Variable, Maybe))
        ]
        if pattern.outputs > 1:
            tests.append(lambda node: len(node.outputs) == pattern.outputs)
        return tuple(tests)


def _adjusted(pattern: NodePattern, inputs: Sequence[onnx_ir.Value | None]) -> Sequence[onnx_ir.Value | None] | None:
    """Fill up a node's inputs with None to the number that the pattern has; return None if the numbers cannot match."""
    least, most = pattern.input_counts
    if len(inputs) < least or any(value is not None for value in inputs[most:]):
        return None
    is_open = most > len(pattern.inputs)
    return (*inputs, *(None,) * (len(pattern.inputs) - is_open - len(inputs)))
