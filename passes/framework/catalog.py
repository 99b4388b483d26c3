"""Find all passes without importing them, so that `passopt list` answers at once and `run` imports only what it uses.

Names, options and docstrings are read from the source text. Built-in passes are the modules below passes/; passes of
other packages come from the entry-point group `passopt.passes`. One that cannot be used stops only what needs it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from passopt.ir.errors import PassoptError, PluginWarning, UsageError
from passopt.passes.framework.source_entries import Entry, entries_of
from passopt.passes.framework.suggestions import unknown_name

if TYPE_CHECKING:
    from passopt.passes.framework.base import Pass

ENTRY_POINTS = "passopt.passes"
_BUILT_IN = "passopt.passes."
#: What the extra `guests` of passopt installs; the command line says so where one of them is missing.
_GUESTS = frozenset({"onnx_graphsurgeon", "onnxsim"})


def catalog() -> dict[str, Entry]:
    """Return the entries of all passes by name, built-in ones first.

    A plug-in that leads to no pass, or to one whose name is taken, is left out with a PluginWarning.
    """
    entries, broken = _found()
    for reason in broken.values():
        warnings.warn(PluginWarning(reason), stacklevel=2)
    return entries


def pass_class(name: str) -> type[Pass]:
    """Import and return the class of a pass.

    Args:
        name: The name of the pass.

    Returns:
        The class.

    Raises:
        UsageError: There is no such pass, with the nearest names; or it is a plug-in that cannot be used, with why.
    """
    from passopt.passes.framework.base import REGISTERED

    if name in REGISTERED:
        return REGISTERED[name]
    entry = catalog().get(name)
    if entry is None:
        raise unknown_pass(name)
    _import(entry)
    if name not in REGISTERED:
        raise UsageError(f"{name}: {entry.class_name} ({entry.origin}) is no pass; derive it from passopt.passes.Pass")
    return REGISTERED[name]


def unknown_pass(name: str, others: Iterable[str] = ()) -> UsageError:
    """Return the error for a name that is no pass: the nearest names, or why the plug-in of that name is left out.

    Args:
        name: The name.
        others: Further names that would be right there, such as those of pipelines.

    Returns:
        The error to raise.
    """
    from passopt.passes.framework.base import REGISTERED

    entries, broken = _found()
    if name in broken:
        return UsageError(f"the pass {name!r} cannot be used: {broken[name]}")
    left_out = f" (plug-ins that are left out: {', '.join(broken)})" if broken else ""
    return UsageError(unknown_name("pass", name, [*entries, *others, *REGISTERED], "passopt list") + left_out)


def _import(entry: Entry) -> None:
    """Import the module of a pass; raise UsageError if it is a plug-in and that fails."""
    try:
        importlib.import_module(entry.module)
    except PassoptError:
        raise
    except Exception as error:
        if entry.module.startswith(_BUILT_IN) or getattr(error, "name", None) in _GUESTS:
            raise
        from passopt.passes.framework.defects import failure

        text = f"importing {entry.module} {failure(error)}"
        raise UsageError(f"the pass {entry.name!r} cannot be used: {text}. Mend or reinstall that package.") from error


@functools.cache
def _built_in() -> tuple[Entry, ...]:
    root = Path(__file__).parent.parent
    files = sorted(root.rglob("*.py"), key=lambda file: file.name)
    return tuple(entry for file in files for entry in entries_of(file, _module_name(file.relative_to(root))))


def _module_name(path: Path) -> str:
    """Return the import name of a file below passes/: `fusion/fuse_rotary.py` → `passopt.passes.fusion.fuse_rotary`."""
    return ".".join(("passopt", "passes", *path.with_suffix("").parts))


def _found() -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries of all passes by name, and why plug-ins are left out by the name of what is missing."""
    entries = {entry.name: entry for entry in _built_in()}
    plugins: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry = _plugin(point)
        except (Exception, SystemExit) as error:  # finding a module runs the packages that it lies in
            text = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            broken[point.name] = f"plug-in {point.name} ({point.value}) is left out: {text}"
            continue
        if entry.name in entries:
            own = entries[entry.name].origin
            broken[point.name] = f"two passes are called {entry.name!r}: {own} and {entry.origin}, which is left out"
        elif entry.name in plugins:
            both = f"{plugins[entry.name].origin} and {entry.origin}"
            broken[entry.name] = f"two passes are called {entry.name!r}: {both}; uninstall one, or rename it"
        else:
            plugins[entry.name] = entry
    return {**entries, **{name: entry for name, entry in plugins.items() if name not in broken}}, broken


def _plugin(point: importlib.metadata.EntryPoint) -> Entry:
    """Read the pass that an entry point names; raise UsageError if it does not lead to one."""
    module, class_name = point.module, point.attr
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UsageError(f"{module} cannot be found")
    try:
        entries = entries_of(Path(spec.origin), module)
        if not entries:  # a file without a name of a pass was not parsed
            ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UsageError(f"SyntaxError: {error.msg}, {spec.origin}:{error.lineno}") from error
    for entry in entries:
        if entry.class_name == class_name:
            return entry
    raise UsageError(f"{spec.origin} defines no pass {class_name!r} with a name")
