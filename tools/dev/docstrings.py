"""Check that every public name of passopt's four faces is documented well enough to be used from its page alone.

    python tools/dev/docstrings.py [FACE …]

A face is a package whose `__all__` is public: passopt, passopt.passes, passopt.ir and passopt.testing. The docstring of
each name, and of each public method of a class, must begin with a sentence. That of a function or method also documents
every argument (`Args:`), what is returned (`Returns:`, or a first sentence that begins with "Return" or "Yield"), and
every exception that the function itself raises by name (`Raises:`); that of a dataclass every public field
(`Attributes:`). A constant needs a comment `#:` above it. The exit code is 1 if anything is missing.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

FACES = ("passopt", "passopt.passes", "passopt.ir", "passopt.testing")

_SENTENCE = re.compile(r"[A-Z`\"'(⟨0-9].*[.?!](:?)\Z|.*:\Z", re.DOTALL)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^(\*{0,2}\w[\w.]*)(?: \([^)]*\))?:", re.MULTILINE)
#: By these words a class says that users get its instances from elsewhere, so that its arguments are nobody's business.
_NOT_CALLED = "instead of calling this class"
#: First words of a sentence that already says what is returned.
_SAYS_WHAT_IS_RETURNED = ("Return", "Yield")
#: Names of one line that need no docstring: what they hold is plain from the name.
_PLAIN = frozenset({"__version__"})


def problems_of_face(face: str) -> Iterator[str]:
    """Yield what is missing in the docstrings of all public names of a package.

    Args:
        face: The import name of the package.

    Yields:
        One line per problem, which begins with the full name of what it is about.
    """
    package = importlib.import_module(face)
    for name in package.__all__:
        yield from problems(getattr(package, name), f"{face}.{name}", package)


def problems(item: Any, name: str, package: Any = None) -> Iterator[str]:
    """Yield what is missing in the docstring of a class with its methods, a function, or a constant.

    Args:
        item: The class, function or constant.
        name: Its full name, with which every line begins.
        package: The package that hands it on, in whose imports the home of a constant is found.

    Yields:
        One line per problem.
    """
    if inspect.isclass(item):
        yield from _class_problems(item, name)
    elif inspect.isroutine(item):
        yield from _function_problems(item, name)
    elif name.rpartition(".")[2] not in _PLAIN and not _is_commented(package, name.rpartition(".")[2]):
        yield f"{name}: a constant without a comment `#:` above it"


def _class_problems(item: type, name: str) -> Iterator[str]:
    text = inspect.cleandoc(item.__doc__) if item.__doc__ else ""
    yield from _summary_problems(text, name)
    if dataclasses.is_dataclass(item):
        public = [field.name for field in dataclasses.fields(item) if not field.name.startswith("_")]
        known = _entries(text, "Attributes") | _entries(text, "Args")
        yield from (f"{name}: the field {field} is not in Attributes" for field in public if field not in known)
    elif isinstance(init := item.__dict__.get("__init__"), FunctionType) and _NOT_CALLED not in " ".join(text.split()):
        known = _entries(text, "Args") | _entries(inspect.getdoc(init) or "", "Args")
        yield from (f"{name}: the argument {each} is not in Args" for each in _arguments(init) if each not in known)
    for each, member in sorted(_own_members(item).items()):
        if isinstance(member, property):
            yield from _summary_problems(_inherited_text(item, each), f"{name}.{each}")
        elif isinstance(member, (FunctionType, classmethod, staticmethod)):
            function = member if isinstance(member, FunctionType) else member.__func__
            yield from _function_problems(function, f"{name}.{each}", _inherited_text(item, each))


def _own_members(item: type) -> dict[str, Any]:
    """Return the public members of a class and of its bases that are passopt's too."""
    found: dict[str, Any] = {}
    for base in reversed(item.__mro__):
        if base.__module__.split(".")[0] in {"passopt", item.__module__.split(".")[0]}:
            found |= {name: member for name, member in vars(base).items() if not name.startswith("_")}
    return found


def _inherited_text(item: type, name: str) -> str:
    """Return the docstring of a member, or of the one that it overrides."""
    for base in item.__mro__:
        text = getattr(vars(base).get(name), "__doc__", None)
        if text:
            return inspect.cleandoc(text)
    return ""


def _function_problems(function: Any, name: str, text: str | None = None) -> Iterator[str]:
    text = (inspect.getdoc(function) or "") if text is None else text
    yield from _summary_problems(text, name)
    if not text:
        return
    known = _entries(text, "Args")
    yield from (f"{name}: the argument {each} is not in Args" for each in _arguments(function) if each not in known)
    annotation = inspect.signature(function).return_annotation
    if annotation not in {None, "None", inspect.Signature.empty} and not _says_what_is_returned(text):
        yield f"{name}: what it returns is not in Returns"
    said = _section(text, "Raises")
    yield from (f"{name}: it raises {kind}, which is not in Raises" for kind in _raised(function) if kind not in said)


def _summary_problems(text: str, name: str) -> Iterator[str]:
    if not text:
        yield f"{name}: has no docstring"
        return
    first = " ".join(text.partition("\n\n")[0].split())
    if not _SENTENCE.match(first):
        yield f"{name}: the docstring does not begin with a sentence: {first[:60]!r}"


def _arguments(function: Any) -> list[str]:
    """Return the parameters that a caller gives; variadic ones carry their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    names = [stars.get(item.kind, "") + item.name for item in parameters]
    return [name for name in names if name not in {"self", "cls"}]


def _says_what_is_returned(text: str) -> bool:
    return text.startswith(_SAYS_WHAT_IS_RETURNED) or bool(_section(text, "Returns") or _section(text, "Yields"))


def _section(text: str, name: str) -> str:
    """Return the body of a section, without its indentation; empty if there is none."""
    pieces = _SECTION.split(text)
    body = dict(zip(pieces[1::2], pieces[2::2])).get(name, "")
    lines = body.strip("\n").split("\n")
    inside = []
    for line in lines:
        if line and not line[0].isspace():
            break
        inside.append(line)
    return textwrap.dedent("\n".join(inside))


def _entries(text: str, section: str) -> set[str]:
    return set(_ENTRY.findall(_section(text, section)))


def _raised(function: Any) -> list[str]:
    """Return the exceptions that the body raises by name: not those of functions that it calls or defines."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return []
    found: dict[str, None] = {}
    work: list[ast.AST] = list(getattr(tree.body[0], "body", []))
    while work:
        node = work.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id[:1].isupper():
            found[call.func.id] = None
        work += list(ast.iter_child_nodes(node))
    ignored = {"NotImplementedError", "AssertionError", "AttributeError"}
    return [name for name in found if name not in ignored]


def _is_commented(package: Any, name: str) -> bool:
    """Whether a comment `#:` stands above a constant, in the module that the package takes it from."""
    home = _home(package, name)
    lines = Path(str(home.__file__)).read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        if re.match(rf"{re.escape(name)}\b[^=]*=", line):
            return index > 0 and lines[index - 1].lstrip().startswith("#:")
    return False


def _home(package: Any, name: str) -> Any:
    for node in ast.walk(ast.parse(Path(package.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return importlib.import_module(str(node.module))
    return package


def main(faces: Sequence[str] = ()) -> int:
    """Print what is missing, and return the exit code.

    Args:
        faces: The packages to check; all four if there are none.

    Returns:
        0, or 1 if anything is missing.
    """
    found = [problem for face in faces or FACES for problem in problems_of_face(face)]
    for problem in dict.fromkeys(found):
        print(problem)
    if found:
        print(f"docstrings: {len(set(found))} problems in the public names of {', '.join(faces or FACES)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
