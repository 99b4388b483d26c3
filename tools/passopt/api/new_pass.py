"""Write a new pass and its tests, which work at once, to be changed into what you need: `passopt.new_pass`.

In a checkout of passopt the pass becomes one more file in a folder of `passes/`; anywhere else, a package with an entry
point.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import keyword
import re
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passopt.ir.errors import UsageError
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.passes.framework.base import REGISTERED
from passopt.passes.framework.catalog import catalog
from passopt.passes.framework.source_entries import Entry
from passopt.passes.framework.suggestions import unknown_name
from passopt.passes.pipeline.named import PIPELINES
from passopt.reporting.result import Result

#: The folder of passes/ for a new pass, called its room, by the verb of its name; for every other verb it is cleanup.
_ROOMS = {
    "fuse": "fusion",
    "decompose": "decomposition",
    "quantize": "precision",
    "cast": "precision",
    "shard": "sharding",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")

_PASS = '''"""$name: say in one line what becomes what."""

import dataclasses
from typing import Any

from passopt.passes import EXACT, Decline, RewritePass


@dataclasses.dataclass(frozen=True)  # fields are options: `limit: int = 3` makes $name{limit=3}
class $class_name(RewritePass):
    """Remove two negations in a row, which change nothing: an example, until you say here why your pass exists.

    Before: ``y = Neg(Neg(x))``
    After:  ``y = Identity(x)``
    """

    name = "$name"
    accuracy = EXACT  # or REASSOCIATED, or lossy(budget): --verify-each=numeric holds it to that

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        if not x.dtype.is_floating_point():
            raise Decline(f"{x.name} is {x.dtype.name}, whose lowest number has no opposite")
        return op.Identity(x)
'''

_TESTS = '''"""$name: one positive, one per guard, a shared value, a graph output."""

from $module import $class_name

from passopt.testing import check

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\\n'
TEXT = """$text"""


def test_double_negation_goes(check_pass):
    check_pass($class_name(), HEADER + TEXT, matches=1)


def test_declines_integers():
    _, result = check($class_name(), HEADER + TEXT.replace("float", "int32"), matches=0)
    assert list(result.declines) == ["x is INT32, whose lowest number has no opposite"]


def test_a_shared_value_stays_for_its_other_readers():
    text = "g (float[2,3] x) => (float[2,3] y, float[2,3] z) { n = Neg(x) p = Neg(n) y = Relu(p) z = Abs(n) }"
    model, _ = check($class_name(), HEADER + text, matches=1)
    assert [node.op_type for node in model.graph] == ["Neg", "Identity", "Relu", "Abs"]


def test_a_graph_output_keeps_its_name():
    text = "g (float[2,3] x) => (float[2,3] y) { n = Neg(x) y = Neg(n) }"
    model, _ = check($class_name(), HEADER + text, matches=1)
    assert [value.name for value in model.graph.outputs] == ["y"]
'''

_TEXT = "g (float[2,3] x) => (float[2,3] y) { n = Neg(x) p = Neg(n) y = Relu(p) }"

_PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "$name"
version = "0.1.0"
dependencies = ["passopt"]

[project.entry-points."passopt.passes"]
$name = "$module:$class_name"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
addopts = "--import-mode=importlib"
"""


@dataclasses.dataclass(frozen=True, repr=False)
class NewPass(Result):
    """The result of `new_pass`.

    Attributes:
        files: All files that were written.
        tests: The file of tests.
        package: The folder to install, if the pass is a package of its own; None in a checkout.
    """

    files: tuple[Path, ...]
    tests: Path
    package: Path | None

    def to_text(self) -> str:
        lines = (
            [] if self.package is not None else ["this folder is a checkout of passopt: the pass becomes part of it"]
        )
        lines += [f"  {_shown(path)}" for path in self.files]
        lines.append(f"run its tests:  pytest {_shown(self.tests)}")
        lines.append("after a change that you want, and have looked at: the same with --update-golden")
        if self.package is not None:
            lines.append(f"let passopt find it:  pip install -e {_shown(self.package)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        package = str(self.package) if self.package is not None else None
        return {"files": [str(path) for path in self.files], "tests": str(self.tests), "package": package}


def new_pass(name: str, directory: Path | str | None = None, *, room: str | None = None) -> NewPass:
    """Write a pass, its tests and its golden text, all of them or nothing.

    Args:
        name: The name, made of a verb and an object, such as `"fuse-silu"`.
        directory: A checkout of passopt, or the folder of a package. None for the current folder if that is a checkout,
            otherwise for a new folder of the pass's name.
        room: The folder of passes/ in a checkout; None for the one that fits the verb.

    Returns:
        The files, and what to run next.

    Raises:
        UsageError: The name is taken or cannot be the name of a pass, the room is unknown, or a file exists.
    """
    name = _checked(name)
    root = Path(directory) if directory else Path.cwd()
    inside = _is_checkout(root)
    if not inside and not directory:
        root = root / name
    files = _files(name, _room(name, room) if inside else None)
    written = _write({root / path: text for path, text in files.items()}, name, root)
    tests = next(path for path in files if Path(path).name.startswith("test_"))
    return NewPass(tuple(written), root / tests, None if inside else root)


def _checked(name: str) -> str:
    """Return the name if a new pass may have it.

    Raises:
        UsageError: It is taken, is not in the form verb-object, or would be a module that Python has already.
    """
    if not _NAME.match(name):
        raise UsageError(f"{name!r} is no name of a pass; write verb-object in lower case, as in fuse-silu")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise UsageError(f"{name!r} would make a module {module!r}, which Python has already")
    known = catalog().get(name)
    if name in PIPELINES or known is not None:
        what = f"a pass, {known.origin}" if known is not None else "a pipeline"
        raise UsageError(f"{name!r} is {what} already; choose another name")
    return name


def _is_checkout(root: Path) -> bool:
    return all((root / path).exists() for path in ("passes/framework/base.py", "tests/passes", "tools/passopt/cli"))


def _room(name: str, wanted: str | None) -> str:
    """Return the folder of passes/ that the pass belongs to: the one asked for, or the one that fits the verb."""
    if wanted is None:
        return _ROOMS.get(name.partition("-")[0], "cleanup")
    rooms = sorted({Path(entry.origin).parent.name for entry in _built_in_passes()})
    if wanted not in rooms:
        raise UsageError(f"{unknown_name('room', wanted, rooms, shown_by='ls passes')}")
    return wanted


def _built_in_passes() -> list[Entry]:
    return [entry for entry in catalog().values() if entry.module.startswith("passopt.passes.")]


def _files(name: str, room: str | None) -> dict[str, str]:
    """Return the contents of the new files by path below the root; without a room they form a package of their own."""
    module = name.replace("-", "_")
    words = {
        "name": name,
        "class_name": "".join(word.capitalize() for word in name.split("-")),
        "module": f"passopt.passes.{room}.{module}" if room else module,
        "text": _TEXT,
    }
    pass_text, tests, project = (string.Template(text).substitute(words) for text in (_PASS, _TESTS, _PROJECT))
    if room:
        # Ruff sorts the names of one package together.
        tests = tests.replace(f"import {words['class_name']}\n\nfrom", f"import {words['class_name']}\nfrom")
        return {f"passes/{room}/{module}.py": pass_text, f"tests/passes/{room}/test_{module}.py": tests}
    return {"pyproject.toml": project, f"{module}.py": pass_text, f"tests/test_{module}.py": tests}


def _write(files: Mapping[Path, str], name: str, root: Path) -> list[Path]:
    """Write all files and the golden text of the first test, or none of them, and return their paths.

    Raises:
        UsageError: One of the files exists.
    """
    module = name.replace("-", "_")
    golden = root / "tests" / "golden" / f"test_{module}" / "test_double_negation_goes.txt"
    for path in (*files, golden):
        if path.exists():
            raise UsageError(f"{path}: exists; nothing was written. Choose another name or `directory`.")
    made: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            made.append(path)
            path.write_text(text, encoding="utf-8")
        source = next(path for path in files if path.name == f"{module}.py")
        golden.parent.mkdir(parents=True, exist_ok=True)
        made.append(golden)
        golden.write_text(_result_of(source, name), encoding="utf-8")
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return made


def _result_of(source: Path, name: str) -> str:
    """Return the text of the graph of the first test after the new pass ran on it."""
    spec = importlib.util.spec_from_file_location(f"passopt_new_{name.replace('-', '_')}", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        model = read_model('<ir_version: 10, opset_import: ["" : 21]>\n' + _TEXT)
        REGISTERED[name]().run(model)
        return print_model(model)
    finally:
        del sys.modules[spec.name]
        REGISTERED.pop(name, None)


def _shown(path: Path) -> str:
    """Return the path relative to the current folder, if it lies below that."""
    try:
        return str(path.resolve().relative_to(Path.cwd())) or "."
    except ValueError:
        return str(path)
