"""Read from a source file, without running it, which passes it defines: their names, options and docstrings."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from pathlib import Path

_NAME = re.compile(r"^\s+name\b[^=\n]* = [\"']|\b(?:graphsurgeon_pass|ir_pass)\(", re.MULTILINE)
#: The decorators that turn a function into a pass, and how many of its parameters stand before the options.
_DECORATORS = {"graphsurgeon_pass": 1, "ir_pass": 0}


@dataclasses.dataclass(frozen=True)
class Entry:
    """The description of one pass, as read from its source text.

    Attributes:
        name: The name on the command line.
        module: The import name of the module that defines it.
        class_name: The name of the class, or of the variable or function of a guest pass.
        summary: The first paragraph of its docstring, in one line.
        options: A triple (name, type, default) for every option, as written in the source; "" for what is not given.
        origin: The file and line of the definition, as `file:line`.
        accuracy: The declared accuracy, such as `lossy(0.02)`; "" if the class inherits that of its base class.
    """

    name: str
    module: str
    class_name: str
    summary: str
    options: tuple[tuple[str, str, str], ...]
    origin: str
    accuracy: str = ""


def entries_of(file: Path, module: str) -> list[Entry]:
    """Read the passes that a source file defines at its top level.

    Args:
        file: The file.
        module: Its import name.

    Returns:
        One entry per pass, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
        SyntaxError: It is not Python.
    """
    text = file.read_text(encoding="utf-8")
    if not _NAME.search(text):
        return []
    return [entry for node in ast.parse(text).body if (entry := _entry(node, module, str(file))) is not None]


def _entry(node: ast.stmt, module: str, origin: str) -> Entry | None:
    if isinstance(node, ast.ClassDef):
        return _class_entry(node, module, origin)
    if isinstance(node, ast.FunctionDef):
        calls = [call for call in node.decorator_list if _decorator(call)]
        return _guest_entry(node.name, calls[0], node, module, f"{origin}:{node.lineno}") if calls else None
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _decorator(node.value):
        return _guest_entry(node.targets[0].id, node.value, None, module, f"{origin}:{node.lineno}")
    return None


def _decorator(call: ast.expr) -> str:
    """Return the name of the pass decorator that `call` calls; "" if it calls something else."""
    name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else ""
    return name if name in _DECORATORS else ""


def _guest_entry(
    variable: str, call: ast.expr, function: ast.FunctionDef | None, module: str, origin: str
) -> Entry | None:
    """Return the entry of a pass that a decorator makes from a function, whose parameters are the options.

    It is None if the name of the pass is not a string literal.
    """
    assert isinstance(call, ast.Call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = given.get("name", call.args[0] if call.args else None)
    if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
        return None
    accuracy = _accuracy(given["accuracy"]) if "accuracy" in given else "exact"
    summary, options = "", []
    if function is not None:
        summary = (ast.get_docstring(function) or "").partition("\n\n")[0].replace("\n", " ")
        options = _parameters(function.args)[_DECORATORS[_decorator(call)] :]
    return Entry(name.value, module, variable, summary, tuple(options), origin, accuracy)


def option_name(field: str) -> str:
    """Return the option of a field: `from_` is `from`, which no field can be called, as it is a word of Python."""
    return field.removesuffix("_")


def _parameters(arguments: ast.arguments) -> list[tuple[str, str, str]]:
    """Return (name, type, default) of each parameter, as written in the source; "" for what is not given."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    return [
        (item.arg, ast.unparse(item.annotation) if item.annotation else "", ast.unparse(default) if default else "")
        for item, default in zip((*positional, *arguments.kwonlyargs), defaults)
    ]


def _class_entry(node: ast.ClassDef, module: str, origin: str) -> Entry | None:
    """Return the entry of a pass that is a class; None if the class sets no `name` and so is not a pass."""
    name, options, accuracy = None, [], ""
    for statement in node.body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if not isinstance(target, ast.Name):
            continue
        if target.id == "name" and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
            name = statement.value.value
        elif target.id == "accuracy" and statement.value is not None:
            accuracy = _accuracy(statement.value)
        elif isinstance(statement, ast.AnnAssign) and "ClassVar" not in (kind := ast.unparse(statement.annotation)):
            default = ast.unparse(statement.value) if statement.value is not None else ""
            options.append((option_name(target.id), kind, default))
    if name is None:
        return None
    summary = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return Entry(name, module, node.name, summary, tuple(options), f"{origin}:{node.lineno}", accuracy)


def _accuracy(declared: ast.expr) -> str:
    """Return a declared accuracy as it is printed: `REASSOCIATED` → reassociated, `lossy(2e-2)` → lossy(0.02)."""
    if isinstance(declared, ast.Call) and declared.args:
        with contextlib.suppress(ValueError, TypeError, SyntaxError):  # a budget may be a name
            budget = ast.literal_eval(declared.args[0])
            return f"{ast.unparse(declared.func)}({float(budget):g})"
        return ast.unparse(declared)
    return ast.unparse(declared).rpartition(".")[2].lower()
