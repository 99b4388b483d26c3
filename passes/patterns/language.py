"""Patterns as data, traced from a rule's `pattern` method: `return op.MatMul(op.Relu(x), w)`.

Method parameters are variables; numbers match constants; None matches an absent input; keywords match attributes (a
variable binds the attribute).
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from passopt.ir.errors import PassError
from passopt.ir.graph.operators import COMMUTATIVE


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """Matches any value and binds it; a second use must be the same value. An absent input is no value."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """Matches what the variable matches, if it is a weight of the checkpoint."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """Matches what the variable matches, if it is a small constant of one element, such as a scale."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Maybe:
    """Matches what the variable matches, or an absent input or attribute, which binds None."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Absent:
    """Matches an optional input that is not there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rest:
    """Matches all further inputs of a node, however many; binds the list of them."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
    """Matches a constant of one element with this value, compared in the constant's own dtype.

    `tolerance` is relative: 0 asks for the number itself, rounded to the constant's dtype.
    """

    value: float
    tolerance: float = 0.0


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
        is_binary = len(self.inputs) == 2 and not any(isinstance(item, Rest) for item in self.inputs)
        return not self.domain and self.op_type in COMMUTATIVE and is_binary

    @property
    def input_counts(self) -> tuple[int, int]:
        """The least and the most inputs that a node may have."""
        if self.inputs and isinstance(self.inputs[-1], Rest):
            return len(self.inputs) - 1, sys.maxsize
        least = len(self.inputs)
        while least and _may_be_absent(self.inputs[least - 1]):
            least -= 1
        return least, len(self.inputs)


def _may_be_absent(item: ValuePattern) -> bool:
    if isinstance(item, Alternatives):
        return any(_may_be_absent(choice) for choice in item.choices.values())
    return isinstance(item, (Absent, Maybe))


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


ValuePattern: TypeAlias = (
    "Variable | Weight | Scalar | Maybe | Absent | Rest | Number | Numbers | Output | Alternatives"
)
_PIECES = (Variable, Weight, Scalar, Maybe, Absent, Rest, Number, Numbers, Output, Alternatives)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A traced rule: its roots (the values that `rewrite` replaces) and the names it binds.

    A root is the output of a node, or alternatives of such. `certain` are the names that every match binds; the others
    stand in some alternatives only.
    """

    roots: tuple[Output | Alternatives, ...]
    variables: tuple[str, ...]
    certain: frozenset[str]

    @property
    def root_nodes(self) -> tuple[NodePattern, ...]:
        """The distinct nodes of the roots, of all alternatives, in order."""
        return tuple(dict.fromkeys(output.node for root in self.roots for output in outputs_of(root)))

    @property
    def root_keys(self) -> tuple[tuple[str, str], ...]:
        """(domain, op type) of the nodes at which a match may start: those of the first root."""
        return tuple(dict.fromkeys((root.node.domain, root.node.op_type) for root in outputs_of(self.roots[0])))


def outputs_of(root: ValuePattern) -> Iterator[Output]:
    """The outputs that a root may be, alternatives in order."""
    if isinstance(root, Output):
        yield root
    elif isinstance(root, Alternatives):
        for choice in root.choices.values():
            yield from outputs_of(choice)


class Tracer:
    """The `op` of a `pattern` method: every call makes a piece of the pattern."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._unnamed = 0

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

    def scalar(self, name: str) -> Scalar:
        """A variable that only a small constant of one element may take; anything else is no match."""
        return Scalar(Variable(name))

    def variable(self, name: str) -> Variable:
        """A variable that is no parameter of the method; one name is one variable everywhere."""
        return Variable(name)

    def anything(self) -> Variable:
        """Any value, which `rewrite` does not get."""
        self._unnamed += 1
        return Variable(f"_{self._unnamed}")

    def maybe(self, variable: Variable) -> Maybe:
        """A variable for an optional input or attribute: None where it is absent."""
        return Maybe(variable)

    def rest(self, name: str) -> Rest:
        """As the last input: all further inputs of the node, bound as a list."""
        return Rest(name)

    def near(self, value: float, tolerance: float = 1e-3) -> Number:
        """A number up to a relative tolerance: what exporters write with more or fewer digits."""
        return Number(float(value), tolerance)

    def any_of(self, name: str, **choices: Any) -> Any:
        """One of several spellings; `rewrite` gets the label of the one that matched as `name`.

        Choices that are lists of one length give a tuple: alternatives of several values under one label.
        """
        several = [choice for choice in choices.values() if _is_several(choice)]
        if not several:
            return Alternatives(name, {label: self._value(choice) for label, choice in choices.items()})
        lengths = {len(choice) if _is_several(choice) else 1 for choice in choices.values()}
        if len(lengths) > 1:
            raise PassError(f"{self._where}: the choices of any_of {name!r} give {sorted(lengths)} values")
        columns = [{label: self._value(choice[i]) for label, choice in choices.items()} for i in range(*lengths)]
        return tuple(Alternatives(name, column) for column in columns)

    def any_op(self, name: str, op_types: Sequence[str], *inputs: Any, **keywords: Any) -> Any:
        """A node of one of several operators with the same inputs; `rewrite` gets the op type as `name`."""
        return self.any_of(name, **{op_type: self.node(op_type, *inputs, **keywords) for op_type in op_types})

    def optional(self, name: str, value: Any, wrap: Callable[[Any], Any]) -> Alternatives:
        """`wrap(value)` or `value` alone; `rewrite` gets "present" or "absent" as `name`."""
        found: Alternatives = self.any_of(name, present=wrap(value), absent=value)
        return found

    def _value(self, item: Any) -> ValuePattern:
        if isinstance(item, _PIECES):
            return item
        if item is None:
            return Absent()
        if isinstance(item, (int, float)):
            return Number(float(item))
        if isinstance(item, (list, tuple)) and all(isinstance(part, int) for part in item):
            return Numbers(tuple(item))
        raise PassError(f"{self._where}: {item!r} cannot be an input of a pattern")


def _is_several(choice: Any) -> bool:
    return isinstance(choice, (list, tuple)) and any(isinstance(part, _PIECES) for part in choice)


def trace(method: Callable[..., Any], where: str) -> Pattern:
    """Run a rule's bound `pattern` method once. Raises PassError, with the rule's place, if it cannot work."""
    parameters = tuple(inspect.signature(method).parameters.values())[1:]
    loose = [item.name for item in parameters if item.kind in {item.VAR_POSITIONAL, item.VAR_KEYWORD}]
    names = [item.name for item in parameters if item.name not in loose]
    returned = method(Tracer(where), *(Variable(name) for name in names))
    if loose:
        raise PassError(f"{where}: pattern takes *{loose[0]}; name every variable")
    roots = tuple(returned) if isinstance(returned, Sequence) else (returned,)
    if not roots or not all(_is_root(root) for root in roots):
        raise PassError(f"{where}: pattern must return the output of an operator, got {returned!r}")
    used = _Names()
    certain = frozenset().union(*(used.certain(root) for root in roots))
    unused = [name for name in names if name not in used.found]
    if unused:
        raise PassError(f"{where}: the pattern never uses its parameters {', '.join(unused)}")
    return Pattern(roots, tuple(sorted(used.found)), certain)


def _is_root(value: Any) -> bool:
    if isinstance(value, Alternatives):
        return bool(value.choices) and all(_is_root(choice) for choice in value.choices.values())
    return isinstance(value, Output)


class _Names:
    """The names that pieces of a pattern bind: `found` in any way, `certain` in every way to match."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._known: dict[NodePattern | Alternatives, frozenset[str]] = {}

    def certain(self, value: Any) -> frozenset[str]:
        if isinstance(value, (Variable, Rest)):
            self.found.add(value.name)
            return frozenset((value.name,))
        if isinstance(value, (Weight, Scalar, Maybe)):
            return self.certain(value.variable)
        if isinstance(value, Alternatives):
            if value not in self._known:
                self._known[value] = self._of_alternatives(value)
            return self._known[value]
        if isinstance(value, Output):
            if value.node not in self._known:
                self._known[value.node] = self._of_node(value.node)
            return self._known[value.node]
        return frozenset()

    def _of_alternatives(self, value: Alternatives) -> frozenset[str]:
        self.found.add(value.name)
        choices = [self.certain(choice) for choice in value.choices.values()]
        return choices[0].intersection(*choices) | {value.name} if choices else frozenset((value.name,))

    def _of_node(self, node: NodePattern) -> frozenset[str]:
        own = frozenset((node.bind,)) if node.bind else frozenset()
        self.found |= own
        return own.union(*(self.certain(item) for item in (*node.inputs, *node.attributes.values())))
