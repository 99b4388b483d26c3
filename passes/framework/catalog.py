"""Find all passes without importing them, so that `passopt list` answers at once and `run` imports only what it uses.

Names, options and docstrings are read from the source text. Built-in passes are the modules below passes/; passes of
other packages come from the entry-point group `passopt.passes`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from passopt.ir.errors import PassError, UsageError
from passopt.passes.framework.suggestions import unknown_name

if TYPE_CHECKING:
    from passopt.passes.framework.base import Pass

ENTRY_POINTS = "passopt.passes"
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


def catalog() -> dict[str, Entry]:
    """Return the entries of all passes by name, built-in ones first; raise PassError if two have the same name."""
    entries: dict[str, Entry] = {}
    for entry in (*_built_in(), *_plugins()):
        earlier = entries.get(entry.name)
        if earlier is not None:
            raise PassError(f"two passes are called {entry.name!r}: {earlier.origin} and {entry.origin}")
        entries[entry.name] = entry
    return entries


def pass_class(name: str) -> type[Pass]:
    """Import and return the class of the pass `name`; raise UsageError with the nearest names if there is none."""
    from passopt.passes.framework.base import REGISTERED

    if name not in REGISTERED:
        entry = catalog().get(name)
        if entry is None:
            raise UsageError(unknown_name("pass", name, [*catalog(), *REGISTERED], "passopt list"))
        importlib.import_module(entry.module)
    return REGISTERED[name]


@functools.cache
def _built_in() -> tuple[Entry, ...]:
    root = Path(__file__).parent.parent
    files = sorted(root.rglob("*.py"), key=lambda file: file.name)
    return tuple(entry for file in files for entry in _entries(file, _module_name(file.relative_to(root))))


def _module_name(path: Path) -> str:
    """Return the import name of a file below passes/: `fusion/fuse_rotary.py` → `passopt.passes.fusion.fuse_rotary`."""
    return ".".join(("passopt", "passes", *path.with_suffix("").parts))


def _plugins() -> list[Entry]:
    """Read the passes of other packages; raise PassError if an entry point does not lead to a pass."""
    found = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        module, _, class_name = point.value.partition(":")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise PassError(f"entry point {point.name!r} of {ENTRY_POINTS} names {module}, which cannot be found")
        entries = [entry for entry in _entries(Path(spec.origin), module) if entry.class_name == class_name]
        if not entries:
            raise PassError(f"entry point {point.name!r}: {spec.origin} defines no pass {class_name!r} with a name")
        found += entries
    return found


def _entries(file: Path, module: str) -> list[Entry]:
    """Read the passes that a source file defines at its top level."""
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
            options.append((target.id, kind, default))
    if name is None:
        return None
    summary = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return Entry(name, module, node.name, summary, tuple(options), f"{origin}:{node.lineno}", accuracy)


def _accuracy(declared: ast.expr) -> str:
    """Return a declared accuracy as it is printed: `REASSOCIATED` → reassociated, `lossy(2e-2)` → lossy(0.02)."""
    if isinstance(declared, ast.Call) and declared.args:
        budget = ast.literal_eval(declared.args[0])
        return f"{ast.unparse(declared.func)}({float(budget):g})"
    return ast.unparse(declared).rpartition(".")[2].lower()
