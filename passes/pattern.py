"""Patterns as data, traced from a rule's `pattern` method: `return op.MatMul(op.Relu(x), w)`.

Method parameters are variables; numbers match constants; keywords match attributes (a variable binds the attribute).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from passopt.ir.errors import PassError

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal"})


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """Matches any value and binds it; a second use must be the same value."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """Matches what the variable matches, if it is a weight of the checkpoint."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
    """Matches a constant of one element with this value, compared in the constant's own dtype."""

    value: float


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """Matches a constant with exactly these integers."""

    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class NodePattern:
    """Matches a node. `bind` names the node's first output for `rewrite`."""

    op_type: str
    domain: str
    inputs: tuple[ValuePattern, ...]
    attributes: Mapping[str, Any]
    outputs: int
    bind: str | None

    @property
    def commutes(self) -> bool:
        return not self.domain and self.op_type in COMMUTATIVE and len(self.inputs) == 2


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """Output `index` of a matched node."""

    node: NodePattern
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Alternatives:
    """Matches any of several labelled patterns, tried in order; binds the label to `name`."""

    name: str
    choices: Mapping[str, ValuePattern]


ValuePattern: TypeAlias = "Variable | Weight | Number | Numbers | Output | Alternatives"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A traced rule: its roots (the outputs that `rewrite` replaces) and the variables it binds."""

    roots: tuple[Output, ...]
    variables: tuple[str, ...]

    @property
    def root_nodes(self) -> tuple[NodePattern, ...]:
        """The distinct nodes of the roots, in order."""
        return tuple(dict.fromkeys(root.node for root in self.roots))

    @property
    def depth(self) -> int:
        """The most nodes on a path from a root to a leaf: how far downstream a change can complete a match."""
        return max(_depth(root) for root in self.roots)


class Tracer:
    """The `op` of a `pattern` method: every call makes a piece of the pattern."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **keywords: self.node(op_type, *inputs, **keywords)

    def node(
        self, op_type: str, *inputs: Any, outputs: int = 1, domain: str = "", bind: str | None = None, **attributes: Any
    ) -> Any:
        """A node pattern; returns its output, or a tuple if `outputs` is not 1."""
        node = NodePattern(op_type, domain, tuple(self._value(item) for item in inputs), attributes, outputs, bind)
        return Output(node, 0) if outputs == 1 else tuple(Output(node, index) for index in range(outputs))

    def weight(self, variable: Variable) -> Weight:
        """A variable that only a weight of the checkpoint may take; anything else is no match, not a decline."""
        return Weight(variable)

    def any_of(self, name: str, **choices: Any) -> Alternatives:
        """One of several spellings; `rewrite` gets the label of the one that matched as `name`."""
        return Alternatives(name, {label: self._value(choice) for label, choice in choices.items()})

    def optional(self, name: str, value: Any, wrap: Callable[[Any], Any]) -> Alternatives:
        """`wrap(value)` or `value` alone; `rewrite` gets "present" or "absent" as `name`."""
        return self.any_of(name, present=wrap(value), absent=value)

    def _value(self, item: Any) -> ValuePattern:
        if isinstance(item, (Variable, Weight, Number, Numbers, Output, Alternatives)):
            return item
        if isinstance(item, (int, float)):
            return Number(float(item))
        if isinstance(item, (list, tuple)) and all(isinstance(part, int) for part in item):
            return Numbers(tuple(item))
        raise PassError(f"{self._where}: {item!r} cannot be an input of a pattern")


def trace(method: Callable[..., Any], where: str) -> Pattern:
    """Run a rule's bound `pattern` method once. Raises PassError, with the rule's place, if it cannot work."""
    names = tuple(inspect.signature(method).parameters)[1:]
    returned = method(Tracer(where), *(Variable(name) for name in names))
    roots = tuple(returned) if isinstance(returned, Sequence) else (returned,)
    if not roots or not all(isinstance(root, Output) for root in roots):
        raise PassError(f"{where}: pattern must return the output of an operator, got {returned!r}")
    used: set[str] = set()
    _collect(roots, used)
    unused = [name for name in names if name not in used]
    if unused:
        raise PassError(f"{where}: the pattern never uses its parameters {', '.join(unused)}")
    return Pattern(roots, tuple(sorted(used)))


def _depth(value: ValuePattern) -> int:
    if isinstance(value, Output):
        return 1 + max((_depth(item) for item in value.node.inputs), default=0)
    if isinstance(value, Alternatives):
        return max(_depth(choice) for choice in value.choices.values())
    return 0


def _collect(values: Sequence[Any], used: set[str]) -> None:
    for value in values:
        if isinstance(value, Variable):
            used.add(value.name)
        elif isinstance(value, Weight):
            used.add(value.variable.name)
        elif isinstance(value, Alternatives):
            used.add(value.name)
            _collect(tuple(value.choices.values()), used)
        elif isinstance(value, Output):
            if value.node.bind:
                used.add(value.node.bind)
            _collect((*value.node.inputs, *value.node.attributes.values()), used)
