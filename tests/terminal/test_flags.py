"""Messages name arguments of Python, and the command line shows them as its own options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import passopt
from passopt.cli import main
from passopt.cli.main import parser
from passopt.terminal.flags import flags_of, with_flags

ROOT = Path(passopt.__file__).parents[2]
ROOMS = ("ir", "passes", "frontends", "targets", "tools/passopt")
#: These speak on the command line only.
OWN_WORDS = ("tools/passopt/commands", "tools/passopt/terminal", "tools/passopt/cli", "tools/passopt/testing")
ERRORS = {"UsageError", "ModelError", "PassError", "CalibrationError", "CheckError", "VerifyError", "ExpectationError"}
ERRORS |= {"Decline"}


@pytest.mark.parametrize(
    ("text", "command", "expected"),
    [
        ("name another with `output`", "run", "name another with -o"),
        ("give `memory=7MiB`.", "run", "give --memory 7MiB."),
        ("pass `trust_remote_code=True`", "export", "pass --trust-remote-code"),
        ("with `within=fuse`: a", "why", "with --in fuse: a"),
        ("compile without `target=cuda`", "generate", "compile without --target cuda"),
        ("at line 3: `x = shape[5]` of `nothing` and `a=b`", "run", "at line 3: `x = shape[5]` of `nothing` and `a=b`"),
    ],
)
def test_arguments_become_options_and_nothing_else_does(text, command, expected):
    assert with_flags(text, flags_of(parser(), command)) == expected


def test_the_same_error_reads_right_from_both_sides(tmp_path, capsys):
    (tmp_path / "graph.onnxtxt").write_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    (tmp_path / "out").mkdir()
    arguments = (tmp_path / "graph.onnxtxt", "dead-code", tmp_path / "out")
    with pytest.raises(passopt.UsageError, match="Name another with `output`, or remove it first"):
        passopt.run(*arguments)
    assert main(["run", str(arguments[0]), "--passes", "dead-code", "-o", str(arguments[2])]) == 2
    assert "Name another with -o, or remove it first" in capsys.readouterr().err


def literal_texts(node: ast.AST) -> str:
    return " ".join(
        part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def test_no_error_that_python_raises_names_an_option_of_the_command_line():
    """A whole command line, such as `passopt why PASS MODEL --in PIPELINE`, may be named: it can be typed anywhere."""
    found = []
    for file in (file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        place = str(file.relative_to(ROOT))
        source = file.read_text(encoding="utf-8")
        if place.startswith(OWN_WORDS) or not re.search(r"[ \"'(]--?[a-z]", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ERRORS:
                continue
            text = literal_texts(node)
            if re.search(r"(?<![\w-])--?[a-z][a-z-]*\b", text) and not re.search(r"passopt [a-z]+ |llama|git ", text):
                found.append(f"{place}:{node.lineno}: {text[:100]}")
    assert not found, "\n".join(found)
