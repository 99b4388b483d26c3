"""Draw patterns, and the code in docstrings, as text diagrams: a value on top, below it what it is computed from.

y ← Mul
├─ x
└─ Sigmoid
   └─ x
"""

from __future__ import annotations

import ast
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from passopt.passes.patterns import language as pt


@dataclasses.dataclass(frozen=True)
class Tree:
    """A label and the trees that stand below it."""

    label: str
    children: tuple[Tree, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the label and, if there are any, the trees below it."""
        body: dict[str, Any] = {"label": self.label}
        return {**body, "inputs": [child.to_json() for child in self.children]} if self.children else body


def draw(tree: Tree, first: str = "", rest: str = "") -> list[str]:
    """Return the lines of a diagram; `first` stands before the first line, `rest` before the others."""
    lines = [f"{first}{tree.label}"]
    for index, child in enumerate(tree.children):
        last = index == len(tree.children) - 1
        lines += draw(child, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
    return lines


@dataclasses.dataclass(frozen=True)
class Diagram:
    """A drawn pattern.

    `roots` holds one tree per root, in the order in which `rewrite` returns them; `parts` what several places share.
    """

    roots: tuple[Tree, ...]
    parts: tuple[Tree, ...]

    def lines(self) -> list[str]:
        """Return the lines of the roots, and below them each shared part under its ‹name›, as in a grammar."""
        text = [line for root in self.roots for line in draw(root)]
        for part in self.parts:
            text += ["", *draw(part)]
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the trees of the roots and of the shared parts."""
        return {"roots": [tree.to_json() for tree in self.roots], "parts": [tree.to_json() for tree in self.parts]}


def diagram(pattern: pt.Pattern) -> Diagram:
    """Draw what a traced pattern looks for."""
    return _Drawing(pattern).diagram()


class _Drawing:
    """Draw one pattern, with a part of its own for whatever several places share.

    Otherwise every optional wrapper would double all that is below it.
    """

    def __init__(self, pattern: pt.Pattern) -> None:
        self._pattern = pattern
        self._uses: collections.Counter[int] = collections.Counter()
        self._names: dict[int, str] = {}
        self._waiting: list[tuple[str, Any]] = []
        for root in pattern.roots:
            self._count(root)

    def diagram(self) -> Diagram:
        several = len(self._pattern.roots) > 1
        roots = [
            self._tree(root, f"root {index + 1}: " if several else "") for index, root in enumerate(self._pattern.roots)
        ]
        parts = []
        while self._waiting:
            name, value = self._waiting.pop(0)
            parts.append(self._whole(value, f"{name} "))
        return Diagram(tuple(roots), tuple(parts))

    def _count(self, value: Any) -> None:
        key = _shared_key(value)
        if key is None:
            return
        self._uses[key] += 1
        if self._uses[key] > 1:
            return
        for child in value.node.inputs if isinstance(value, pt.Output) else value.choices.values():
            self._count(child)

    def _tree(self, value: pt.ValuePattern, prefix: str = "") -> Tree:
        key = _shared_key(value)
        if key is None:
            return Tree(prefix + _leaf(value))
        if self._uses[key] == 1:
            return self._whole(value, prefix)
        if key not in self._names:
            self._names[key] = self._new_name(value)
            self._waiting.append((self._names[key], value))
        return Tree(f"{prefix}{self._names[key]}{_which(value)}")

    def _whole(self, value: pt.ValuePattern, prefix: str) -> Tree:
        if isinstance(value, pt.Output):
            mark = _which(value) if self._uses[id(value.node)] == 1 else ""
            return Tree(f"{prefix}{_title(value)}{mark}", tuple(self._tree(item) for item in value.node.inputs))
        assert isinstance(value, pt.Alternatives)
        choices = tuple(self._tree(choice, f"{label}: ") for label, choice in value.choices.items())
        return Tree(f"{prefix}{_title(value)}", choices)

    def _new_name(self, value: Any) -> str:
        word = value.name if isinstance(value, pt.Alternatives) else value.node.bind or value.node.op_type
        name, count = f"‹{word}›", 1
        while name in self._names.values():
            count += 1
            name = f"‹{word} {count}›"
        return name


def _shared_key(value: Any) -> int | None:
    """Return a key that is equal for two places of one node or one choice; None if nothing is below `value`."""
    if isinstance(value, pt.Output):
        return id(value.node)
    return id(value) if isinstance(value, pt.Alternatives) else None


def _title(value: pt.ValuePattern) -> str:
    if isinstance(value, pt.Alternatives):
        return f"one of, as {value.name!r}"
    assert isinstance(value, pt.Output)
    node = value.node
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(f"{key}={_attribute(item)}" for key, item in node.attributes.items())
    parts = [f"{name}({attributes})" if attributes else name]
    if node.commutes:
        parts.append("either order")
    if node.bind:
        parts.append(f"as {node.bind!r}")
    return "  ".join(parts)


def _which(value: pt.ValuePattern) -> str:
    """Say which of a node's outputs is meant, if it has several."""
    if not isinstance(value, pt.Output) or value.node.outputs == 1:
        return ""
    return f"  output {value.index + 1} of {value.node.outputs}"


def _attribute(item: Any) -> str:
    if isinstance(item, pt.Maybe):
        return f"{item.variable.name}, if it is there"
    return item.name if isinstance(item, pt.Variable) else str(item)


def _leaf(value: Any) -> str:
    if isinstance(value, pt.Variable):
        return "any value" if value.name.startswith("_") else value.name
    if isinstance(value, pt.Weight):
        return f"{value.variable.name}  a weight of the checkpoint"
    if isinstance(value, pt.Scalar):
        return f"{value.variable.name}  a constant number"
    if isinstance(value, pt.Maybe):
        return f"{value.variable.name}  if it is there"
    if isinstance(value, pt.Absent):
        return "absent"
    if isinstance(value, pt.Rest):
        return f"{value.name} …  all further inputs"
    if isinstance(value, pt.Number):
        return f"≈ {value.value:g}" if value.tolerance else f"{value.value:g}"
    assert isinstance(value, pt.Numbers)
    return str(list(value.values))


def code_trees(code: str) -> list[Tree] | None:
    """Parse code such as `y = Swish(x); z = Abs(y)` into trees, one per statement.

    Returns None if the code is not valid Python, or holds other statements than assignments and expressions.
    """
    try:
        statements = ast.parse(code).body
    except SyntaxError:
        return None
    trees = []
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            trees.append(_code_tree(statement.value, f"{_unquoted(statement.targets[0])} ← "))
        elif isinstance(statement, ast.Expr):
            trees.append(_code_tree(statement.value, ""))
        else:
            return None
    return trees


def _code_tree(node: ast.expr, prefix: str) -> Tree:
    if not isinstance(node, ast.Call):
        return Tree(prefix + ast.unparse(node))
    attributes = ", ".join(f"{item.arg}={ast.unparse(item.value)}" for item in node.keywords if item.arg)
    name = ast.unparse(node.func)
    return Tree(
        f"{prefix}{name}({attributes})" if attributes else f"{prefix}{name}",
        tuple(_code_tree(item, "") for item in node.args),
    )


def _unquoted(target: ast.expr) -> str:
    names: Sequence[ast.expr] = target.elts if isinstance(target, ast.Tuple) else [target]
    return ", ".join(ast.unparse(name) for name in names)
