"""`passopt new-pass`: what it writes runs at once, in a checkout and outside of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from passopt.cli import main
from passopt.passes.framework.base import REGISTERED

ROOT = Path(__file__).resolve().parents[2]


def python(folder, *arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A package of its own, made in an empty folder."""
    folder = tmp_path_factory.mktemp("outside")
    done = python(folder, "-m", "passopt", "new-pass", "drop-double-negation")
    assert done.returncode == 0, done.stderr
    return folder / "drop-double-negation", done.stdout


def test_outside_of_a_checkout_it_is_a_package(outside):
    folder, output = outside
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "drop_double_negation.py",
        "pyproject.toml",
        "tests/golden/test_drop_double_negation/test_double_negation_goes.txt",
        "tests/test_drop_double_negation.py",
    ]
    for file in files:
        assert f"  drop-double-negation/{file}\n" in output
    assert "run its tests:  pytest drop-double-negation/tests/test_drop_double_negation.py\n" in output
    assert "pip install -e drop-double-negation\n" in output


@pytest.mark.slow
def test_its_tests_pass_at_once(outside):
    done = python(outside[0], "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.slow
def test_its_golden_is_what_an_update_writes(outside):
    folder = outside[0]
    (golden,) = folder.rglob("*.txt")
    text = golden.read_text()
    done = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--update-golden")
    assert done.returncode == 0, done.stdout
    assert golden.read_text() == text
    assert "Identity" in text


@pytest.mark.slow
def test_its_tests_can_fail(outside, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(outside[0], folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "drop_double_negation.py"
    source.write_text(source.read_text().replace("op.Identity(x)", "op.Abs(x)"))
    done = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1
    assert "relative error" in done.stdout


@pytest.mark.slow
def test_its_entry_point_is_found(outside, tmp_path):
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    shutil.copytree(outside[0], source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "target"
    done = python(tmp_path, "-m", "pip", "install", *flags, "--target", str(target), str(source))
    assert done.returncode == 0, done.stderr
    done = python(tmp_path, "-m", "passopt", "list", "--json", path=[target])
    names = [entry["name"] for entry in json.loads(done.stdout)["passes"]]
    assert "drop-double-negation" in names
    graph = tmp_path / "graph.onnxtxt"
    graph.write_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { n = Neg(x) y = Neg(n) }'
    )
    options = ["--passes", "drop-double-negation", "--emit", "text"]
    done = python(tmp_path, "-m", "passopt", "run", str(graph), *options, path=[target])
    assert "y = Identity (x)" in done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the tests of a pass need, with the links that make it importable."""
    folder = tmp_path_factory.mktemp("checkout")
    hidden = shutil.ignore_patterns("__pycache__", "data", "remote_code")
    for name in ("ir", "passes", "frontends", "targets", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    shutil.copy(ROOT / "setup.cfg", folder)
    (folder / "tests" / "passes").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "passes" / "conftest.py", folder / "tests" / "passes")
    assert python(folder, "tools/dev/typepath.py").returncode == 0
    return folder


@pytest.mark.slow
def test_in_a_checkout_it_is_a_file_and_a_test_of_it(checkout):
    path = [checkout / "build" / "typepath"]
    done = python(checkout, "-m", "passopt", "new-pass", "drop-negation", path=path)
    assert done.returncode == 0, done.stderr
    assert (checkout / "passes" / "cleanup" / "drop_negation.py").exists()
    assert "pip install" not in done.stdout
    assert python(checkout, "tools/dev/typepath.py").returncode == 0  # links to the new file
    test = "tests/passes/cleanup/test_drop_negation.py"
    done = python(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    done = python(checkout, "-m", "passopt", "explain", "drop-negation", path=path)
    assert "└─ Neg" in done.stdout
    for gate in (["format", "--check"], ["check"]):
        files = ["passes/cleanup/drop_negation.py", test]
        settings = ["--config", str(ROOT / "pyproject.toml")]
        done = python(checkout, "-m", "ruff", *gate, *settings, *files)
        assert done.returncode == 0, done.stdout
    again = python(checkout, "-m", "passopt", "new-pass", "drop-negation", path=path)
    assert again.returncode == 2
    assert "'drop-negation' is a pass" in again.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Drop", "'Drop' is no name of a pass"),
        ("drop_negation", "is no name of a pass; write verb-object in lower case"),
        ("-x", "is no name of a pass"),
        ("drop--x", "is no name of a pass"),
        ("../drop", "is no name of a pass"),
        ("2nd", "is no name of a pass"),
        ("class", "would make a module 'class', which Python has already"),
        ("json", "would make a module 'json'"),
        ("dead-code", "'dead-code' is a pass, "),
        ("int8", "'int8' is a pipeline already"),
    ],
)
def test_a_bad_name_is_refused_and_writes_nothing(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["new-pass", "--directory", "out", "--", name]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", ["pyproject.toml", "drop_it.py", "tests/test_drop_it.py"])
def test_an_existing_file_is_never_written_over(tmp_path, capsys, existing):
    path = tmp_path / existing
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert main(["new-pass", "drop-it", "--directory", str(tmp_path)]) == 2
    assert f"{path}: exists; nothing was written" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == [path]


def test_the_new_pass_is_not_left_registered(tmp_path):
    assert main(["new-pass", "drop-it", "--directory", str(tmp_path)]) == 0
    assert "drop-it" not in REGISTERED


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("passopt.api.new_pass.print_model", lambda model: 1 / 0)
    assert main(["new-pass", "drop-it", "--directory", str(tmp_path)]) == 3
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == []
