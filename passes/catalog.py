"""Which passes exist, found without importing them: `passopt list` answers at once, `run` imports only what it uses.

Built-in passes are the modules of this folder; others come from the entry-point group `passopt.passes`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from passopt.ir.errors import PassError, UsageError

if TYPE_CHECKING:
    from passopt.passes.base import Pass

ENTRY_POINTS = "passopt.passes"
_NAME = re.compile(r"^\s+name\b.* = ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a pass from its source: `options` are (name, type, default) as written there.

    `accuracy` is its declaration in words, such as `lossy(0.02)`.
    """

    name: str
    module: str
    class_name: str
    summary: str
    options: tuple[tuple[str, str, str], ...]
    origin: str
    accuracy: str = "exact"


def catalog() -> dict[str, Entry]:
    """All passes by name, built-in ones first. Raises PassError if two have one name."""
    entries: dict[str, Entry] = {}
    for entry in (*_built_in(), *_plugins()):
        earlier = entries.get(entry.name)
        if earlier is not None:
            raise PassError(f"two passes are called {entry.name!r}: {earlier.origin} and {entry.origin}")
        entries[entry.name] = entry
    return entries


def pass_class(name: str) -> type[Pass]:
    """The class of a pass. Raises UsageError with the nearest names if there is none."""
    from passopt.passes.base import REGISTERED

    if name not in REGISTERED:
        entry = catalog().get(name)
        if entry is None:
            raise UsageError(unknown_name("pass", name, [*catalog(), *REGISTERED]))
        importlib.import_module(entry.module)
    return REGISTERED[name]


def unknown_name(what: str, name: str, known: list[str], shown_by: str = "passopt list") -> str:
    """A message that offers what the user may have meant."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(other) for other in close)}?" if close else f"{shown_by} shows all."
    return f"unknown {what} {name!r}; {hint}"


@functools.cache
def _built_in() -> tuple[Entry, ...]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(entry for file in files for entry in _entries(file, f"passopt.passes.{file.stem}"))


def _plugins() -> list[Entry]:
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
    text = file.read_text(encoding="utf-8")
    if not _NAME.search(text):
        return []
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return [entry for node in classes if (entry := _entry(node, module, str(file))) is not None]


def _entry(node: ast.ClassDef, module: str, origin: str) -> Entry | None:
    name, options, accuracy = None, [], "exact"
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
    """`REASSOCIATED` → reassociated, `lossy(2e-2)` → lossy(0.02)."""
    if isinstance(declared, ast.Call) and declared.args:
        budget = ast.literal_eval(declared.args[0])
        return f"{ast.unparse(declared.func)}({float(budget):g})"
    return ast.unparse(declared).rpartition(".")[2].lower()
