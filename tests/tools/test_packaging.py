"""The package as others get it: nothing is missing from the wheel, and a pass of another package is found."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def package_roots() -> dict[str, Path]:
    """Import name → folder of the roots, as setup.cfg's `package_dir` names them."""
    lines = setup_cfg()["options"]["package_dir"].split("\n")
    pairs = (line.split("=") for line in lines if line.strip())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def packages_found() -> dict[str, Path]:
    """Import name → folder of every package that lies below a root."""
    return {
        ".".join((name, *init.parent.relative_to(folder).parts)): init.parent
        for name, folder in package_roots().items()
        for init in folder.rglob("__init__.py")
    }


def test_packages_are_the_folders_that_hold_python():
    """A subpackage that is not listed works in place and is missing from the wheel, without a word."""
    assert sorted(setup_cfg()["options"]["packages"].split()) == sorted(packages_found())


def test_there_is_one_version():
    import passopt

    assert setup_cfg()["metadata"]["version"] == passopt.__version__


def built(target: Path, *flags: str) -> Path:
    """A wheel of a copy of the tree, so that no build folder is left in it."""
    source = target / "source"
    hidden = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=hidden)
    command = [sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", str(target / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = (target / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_its_data(tmp_path):
    with zipfile.ZipFile(built(tmp_path, "--wheel")) as archive:
        names = set(archive.namelist())
    expected = set()
    for package, folder in packages_found().items():
        prefix = package.replace(".", "/")
        expected |= {f"{prefix}/{file.name}" for file in folder.glob("*.py")}
        assert f"{prefix}/py.typed" in names or not (folder / "py.typed").exists()
    assert expected <= names
    assert "passopt/py.typed" in names
    data = {
        f"passopt/testing/{file.relative_to(ROOT / 'tools/passopt/testing').as_posix()}"
        for kind in ("remote_code", "data")
        for file in (ROOT / "tools/passopt/testing" / kind).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert any("remote_code/alibi" in name for name in data)
    assert data <= names
    assert not [name for name in names if name.startswith(("tests/", "ir/", "passes/"))]


PLUGIN = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "doubled-negation"
        version = "1"

        [project.entry-points."passopt.passes"]
        drop-double-negation = "doubled_negation:DropDoubleNegation"

        [tool.setuptools]
        py-modules = ["doubled_negation"]
        """,
    "doubled_negation.py": """
        import dataclasses

        from passopt.passes import RewritePass


        @dataclasses.dataclass(frozen=True)
        class DropDoubleNegation(RewritePass):
            '''Negating twice changes nothing.

            Before: ``y = Neg(Neg(x))``
            After:  ``y = Identity(x)``
            '''

            name = "drop-double-negation"

            often: int = 2

            def pattern(self, op, x):
                return op.Neg(op.Neg(x))

            def rewrite(self, op, x):
                return op.Identity(x)
        """,
    "tests/test_doubled_negation.py": """
        from doubled_negation import DropDoubleNegation


        def test_both_go(check_pass):
            check_pass(
                DropDoubleNegation(),
                '''
                <ir_version: 10, opset_import: ["" : 21]>
                g (float[2,3] x) => (float[2,3] y) { n = Neg(x) p = Neg(n) y = Relu(p) }''',
                matches=1,
            )
        """,
    "tests/golden/test_doubled_negation/test_both_go.txt": """
        <ir_version: 10, opset_import: ["" : 21]>
        g (
           float[2,3] x
        ) => (
           float[2,3] y
        )
        {
           p = Identity (x)
           y = Relu (p)
        }
        """,
}


class Installed:
    """A plug-in's source folder, and the throw-away folder that it is installed in."""

    def __init__(self, folder: Path) -> None:
        self.source, self.target = folder / "source", folder / "target"

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).lstrip("\n"))

    def install(self) -> None:
        flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(self.target), str(self.source)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.target)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.source, check=False)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    made = Installed(tmp_path_factory.mktemp("plugin"))
    made.write(PLUGIN)
    made.install()
    return made


@pytest.mark.slow
def test_a_pass_of_another_package_is_listed(plugin):
    done = plugin.python("-m", "passopt", "list", "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = [entry for entry in json.loads(done.stdout)["passes"] if entry["name"] == "drop-double-negation"]
    assert entry["summary"] == "Negating twice changes nothing."
    assert entry["options"] == [["often", "int", "2"]]


@pytest.mark.slow
def test_its_golden_test_passes_with_the_fixture(plugin):
    done = plugin.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.slow
def test_a_wrong_or_missing_golden_fails_and_says_how_to_make_it(plugin):
    golden = plugin.source / "tests/golden/test_doubled_negation/test_both_go.txt"
    text = golden.read_text()
    try:
        golden.write_text(text.replace("Relu", "Abs"))
        done = plugin.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
        assert done.returncode == 1
        assert "--update-golden" in done.stdout
        golden.unlink()
        done = plugin.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
        assert done.returncode == 1
        assert "no golden text" in done.stdout
        done = plugin.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--update-golden")
        assert done.returncode == 0, done.stdout
        assert golden.read_text() == text
    finally:
        golden.write_text(text)


@pytest.mark.slow
def test_a_plug_in_whose_name_is_taken_is_left_out(tmp_path):
    clash = Installed(tmp_path)
    clash.write(
        {name: text.replace('name = "drop-double-negation"', 'name = "dead-code"') for name, text in PLUGIN.items()}
    )
    clash.install()
    done = clash.python("-m", "passopt", "list", "--json")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("passopt list: warning: two passes are called 'dead-code'")


@pytest.mark.slow
def test_nothing_is_left_in_this_environment(plugin):
    assert plugin.target.exists()
    assert importlib.util.find_spec("doubled_negation") is None
    assert not [point for point in importlib.metadata.entry_points(group="passopt.passes") if "negation" in point.value]
