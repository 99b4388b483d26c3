"""Define the pattern language: run a rule's `pattern` method once, and record what it builds as data.

A method such as ``def pattern(self, op, x, w): return op.MatMul(op.Relu(x), w)`` matches a MatMul whose first input is
made by a Relu. The parameters after `op` are variables, each of which stands for one value. As an input, a number
matches a constant, a list of integers matches a constant vector, and None matches an absent input. A keyword argument
matches an attribute; if it is a variable, it binds the attribute's value.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from passopt.ir.errors import PassError
from passopt.ir.graph.operators import COMMUTATIVE
from passopt.passes.framework.defects import failure


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """Match any value and bind it to a name.

    If the name is used again, it must match the same value there. An absent optional input is not matched.
    """

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """Match what the variable matches, but only if it is a weight of the checkpoint."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """Match what the variable matches, but only if it is a small constant of one element, such as a scale."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Maybe:
    """Match what the variable matches, or an absent input or attribute; the name is then bound to None."""

    variable: Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Absent:
    """Match an optional input that is absent."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rest:
    """Match all further inputs of a node, however many there are, and bind the list of them to a name."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
    """Match a small constant of one element that has this value.

    `tolerance` is relative. With a tolerance of 0, `value` is rounded to the constant's dtype and must then be equal.
    """

    value: float
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """Match a small constant that holds exactly these integers, in this order and whatever its shape."""

    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class NodePattern:
    """Match a node by its operator, its inputs, its attributes and, if it is more than 1, its number of outputs.

    `bind` is the name under which `rewrite` gets the node's first output, or None.
    """

    op_type: str
    domain: str
    inputs: tuple[ValuePattern, ...]
    attributes: Mapping[str, Any]
    outputs: int
    bind: str | None

    @property
    def commutes(self) -> bool:
        """Return True if the two inputs may stand in either order, as those of ONNX's Add and Mul may."""
        is_binary = len(self.inputs) == 2 and not any(isinstance(item, Rest) for item in self.inputs)
        return not self.domain and self.op_type in COMMUTATIVE and is_binary

    @property
    def input_counts(self) -> tuple[int, int]:
        """Return the smallest and the largest number of inputs that a matching node may have."""
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
    """Match the value that is output number `index` of a node that matches `node`."""

    node: NodePattern
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Alternatives:
    """Match the first of several labelled patterns that fits, and bind its label to `name`."""

    name: str
    choices: Mapping[str, ValuePattern]


ValuePattern: TypeAlias = (
    "Variable | Weight | Scalar | Maybe | Absent | Rest | Number | Numbers | Output | Alternatives"
)
_PIECES = (Variable, Weight, Scalar, Maybe, Absent, Rest, Number, Numbers, Output, Alternatives)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A traced pattern: the values that `rewrite` replaces, and the names that a match binds.

    Attributes:
        roots: What the `pattern` method returned: the values to replace. Each is the output of a node, or alternatives
            of such outputs.
        variables: All names that the pattern can bind, sorted.
        certain: The names that every match binds. The other names stand in some alternatives only.
    """

    roots: tuple[Output | Alternatives, ...]
    variables: tuple[str, ...]
    certain: frozenset[str]

    @property
    def root_nodes(self) -> tuple[NodePattern, ...]:
        """Return the node patterns of all roots and all their alternatives, in order and each once."""
        return tuple(dict.fromkeys(output.node for root in self.roots for output in outputs_of(root)))

    @property
    def root_keys(self) -> tuple[tuple[str, str], ...]:
        """Return (domain, op type) of the nodes at which a match may start, which are those of the first root."""
        return tuple(dict.fromkeys((root.node.domain, root.node.op_type) for root in outputs_of(self.roots[0])))


def outputs_of(root: ValuePattern) -> Iterator[Output]:
    """Yield the node outputs that a root stands for: itself, or those of its alternatives in order."""
    if isinstance(root, Output):
        yield root
    elif isinstance(root, Alternatives):
        for choice in root.choices.values():
            yield from outputs_of(choice)


class Tracer:
    """The `op` that a `pattern` method gets: every call of it makes a piece of the pattern.

    ``op.OPERATOR(*inputs, attribute=…)`` matches a node of that operator, such as ``op.Softmax(x, axis=-1)``; see
    `node` for its keyword arguments. The other methods match special inputs.

    Example:
        A rule for ``x · Sigmoid(x)`` or ``x · Sigmoid(k · x)``, where `rewrite` gets `form`, `x` and `k`::

            def pattern(self, op, x, k):
                gates = {"plain": op.Sigmoid(x), "scaled": op.Sigmoid(op.Mul(x, k))}
                return op.Mul(x, op.any_of("form", **gates))

            def rewrite(self, op, form, x, k=None): ...
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._unnamed = 0

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(f"op has no {op_type!r}; operators begin with a capital letter")
        return lambda *inputs, **keywords: self.node(op_type, *inputs, **keywords)

    def node(
        self, op_type: str, *inputs: Any, outputs: int = 1, domain: str = "", bind: str | None = None, **attributes: Any
    ) -> Any:
        """Match a node; this is what ``op.OPERATOR(…)`` calls.

        Args:
            op_type: The operator, such as "MatMul".
            *inputs: Variables, other pieces of the pattern, numbers, lists of integers, or None for an absent input.
            outputs: The number of outputs that the node has.
            domain: The operator's domain; "" stands for ONNX's own operators.
            bind: A name under which `rewrite` gets the node's first output.
            **attributes: The attributes and their values. An attribute that a node lacks counts as its default.

        Returns:
            The node's output, as an input for other pieces; a tuple of all outputs if `outputs` is not 1.
        """
        node = NodePattern(op_type, domain, tuple(self._value(item) for item in inputs), attributes, outputs, bind)
        return Output(node, 0) if outputs == 1 else tuple(Output(node, index) for index in range(outputs))

    def weight(self, variable: Variable) -> Weight:
        """Return a piece that matches a weight of the checkpoint and binds it; anything else is no match."""
        return Weight(variable)

    def scalar(self, name: str) -> Scalar:
        """Return a piece that matches a small constant of one element and binds it to `name`."""
        return Scalar(Variable(name))

    def variable(self, name: str) -> Variable:
        """Return the variable `name`, which need not be a parameter; equal names are one variable."""
        return Variable(name)

    def anything(self) -> Variable:
        """Match any value, which `rewrite` does not get."""
        self._unnamed += 1
        return Variable(f"_{self._unnamed}")

    def maybe(self, variable: Variable) -> Maybe:
        """Return a piece for an optional input or attribute, which binds None where it is absent."""
        return Maybe(variable)

    def rest(self, name: str) -> Rest:
        """Match all further inputs of the node and bind the list of them; it must be the last input."""
        return Rest(name)

    def near(self, value: float, tolerance: float = 1e-3) -> Number:
        """Match a number up to a relative tolerance, since exporters write constants with more or fewer digits."""
        return Number(float(value), tolerance)

    def any_of(self, name: str, **choices: Any) -> Any:
        """Match the first of several spellings that fits; `rewrite` gets its label as `name`.

        Args:
            name: The name that is bound to the label. Equal names in one pattern are one label everywhere.
            **choices: A piece of the pattern for each label. If the choices are lists of one length, the spellings
                consist of several values each.

        Returns:
            The alternatives, as an input or a root; a tuple of them, one per value, if the choices are lists.

        Raises:
            PassError: If the choices are lists of different lengths.
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
        """Match a node of one of several operators with the same inputs; `rewrite` gets the op type as `name`."""
        return self.any_of(name, **{op_type: self.node(op_type, *inputs, **keywords) for op_type in op_types})

    def optional(self, name: str, value: Any, wrap: Callable[[Any], Any]) -> Alternatives:
        """Match `wrap(value)` or else `value` alone; `rewrite` gets "present" or "absent" as `name`."""
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
    """Run a `pattern` method once and return the pattern that it describes.

    Args:
        method: The bound method, or a function whose first parameter is `op`; the other parameters become variables.
        where: The rule's name and source line, which error messages begin with.

    Returns:
        The traced pattern.

    Raises:
        PassError: If the method fails with an exception, returns no output of an operator, does not use one of its
            parameters, takes `*args` or `**kwargs`, or gives an operator something that cannot be an input.
    """
    parameters = tuple(inspect.signature(method).parameters.values())[1:]
    loose = [item.name for item in parameters if item.kind in {item.VAR_POSITIONAL, item.VAR_KEYWORD}]
    names = [item.name for item in parameters if item.name not in loose]
    try:
        returned = method(Tracer(where), *(Variable(name) for name in names))
    except PassError:
        raise
    except Exception as error:
        name = getattr(method, "__name__", "pattern")
        raise PassError(f"{where}: {name} {failure(error, method)}. Mend the pattern") from error
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
    """Collect the names that a pattern binds: `found` are all of them, `certain(piece)` those of every match."""

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
