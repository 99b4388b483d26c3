"""Find the nodes at which the second and later roots of a pattern may match.

A pattern of several roots is matched from its first root. The other roots share values with it, so they are found among
the users of values and nodes that are bound already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import onnx_ir

from passopt.passes.patterns.language import (
    Alternatives,
    Maybe,
    NodePattern,
    Output,
    Scalar,
    ValuePattern,
    Variable,
    Weight,
)

#: The content of a register that no step has written to.
UNSET: Any = object()

Registers: TypeAlias = "list[Any]"
Climb: TypeAlias = Callable[[Registers], "list[onnx_ir.Value] | None"]


class RootSearch:
    """Make functions that list candidate nodes, given the registers of names and of node patterns."""

    def __init__(self, slot_of_name: Callable[[str], int], slot_of_node: Callable[[NodePattern], int]) -> None:
        self._slot_of_name = slot_of_name
        self._slot_of_node = slot_of_node
        self._climbs: dict[ValuePattern, Climb] = {}

    def users(self, pattern: NodePattern) -> Callable[[Registers], Iterator[onnx_ir.Node]]:
        """Return a function that yields the nodes that may match `pattern`.

        It starts from the first input that is bound already, or that is computed from something bound.
        """
        climbs = [self._climb(item) for item in pattern.inputs]
        key = (pattern.op_type, pattern.domain)

        def users(registers: Registers) -> Iterator[onnx_ir.Node]:
            for climb in climbs:
                values = climb(registers)
                if values is None:
                    continue
                for value in values:
                    for use in value.uses():
                        node = use.node
                        if (node.op_type, node.domain) == key:
                            yield node
                return

        return users

    def _climb(self, item: ValuePattern) -> Climb:
        """Return a function that lists the values which `item` may be; it gives None if nothing below `item` is bound.

        The functions are cached, since several parents may ask for the same piece of a pattern.
        """
        if item not in self._climbs:
            self._climbs[item] = self._new_climb(item)
        return self._climbs[item]

    def _new_climb(self, item: ValuePattern) -> Climb:
        if isinstance(item, (Weight, Scalar, Maybe)):
            item = item.variable
        if isinstance(item, Variable):
            name = self._slot_of_name(item.name)
            return lambda registers: [registers[name]] if isinstance(registers[name], onnx_ir.Value) else None
        if isinstance(item, Alternatives):
            choices = [self._climb(choice) for choice in item.choices.values()]
            return lambda registers: _joined([choice(registers) for choice in choices])
        if not isinstance(item, Output):
            return lambda registers: None
        slot, index, users = self._slot_of_node(item.node), item.index, self.users(item.node)

        def climb(registers: Registers) -> list[onnx_ir.Value] | None:
            nodes = [registers[slot]] if registers[slot] is not UNSET else list(users(registers))
            return [node.outputs[index] for node in nodes if index < len(node.outputs)] or None

        return climb


def _joined(found: list[list[onnx_ir.Value] | None]) -> list[onnx_ir.Value] | None:
    known = [values for values in found if values is not None]
    return [value for values in known for value in values] if known else None
