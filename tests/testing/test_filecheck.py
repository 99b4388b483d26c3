"""`.onnxtxt` files as tests: what they catch, what a failure prints, and that no shell is involved."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

GRAPH = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) {
    y = Relu(x)
    lost = Abs(x)
}
"""
RUN = "# RUN: passopt run %s --passes dead-code --emit text | filecheck %s\n"

FILES = {
    "good": RUN + GRAPH + "# CHECK: y = Relu (x)\n# CHECK-NOT: Abs\n",
    "two_runs": RUN + RUN.replace("filecheck %s", "filecheck %s --check-prefix=ALSO") + GRAPH
    + "# CHECK: Relu\n# ALSO: Abs\n",
    "wrong": RUN + GRAPH + "# CHECK: y = Gelu (x)\n",
    "no_check": RUN + GRAPH,
    "no_run": GRAPH + "# CHECK: Relu\n",
    "data": GRAPH,
    "bad_pass": RUN.replace("dead-code", "dead-kode") + GRAPH + "# CHECK: Relu\n",
    "bad_text": RUN + GRAPH.replace("Relu(x)", "Relu(x") + "# CHECK: Relu\n",
    "bad_option": RUN.replace("--emit text", "--emitt text") + GRAPH + "# CHECK: Relu\n",
    "shell": RUN.rstrip() + " ; touch stolen\n" + GRAPH + "# CHECK: Relu\n",
    "other_command": "# RUN: touch stolen | filecheck %s\n" + GRAPH + "# CHECK: Relu\n",
    "unbalanced": RUN.replace("dead-code", "'dead-code") + GRAPH + "# CHECK: Relu\n",
    "a space": RUN + GRAPH + "# CHECK: Abs\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """pytest over all files at once; returns its folder, and per file what it said (empty: passed)."""
    folder = tmp_path_factory.mktemp("filecheck")
    for name, text in FILES.items():
        (folder / f"{name}.onnxtxt").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--continue-on-collection-errors"]
    done = subprocess.run([*command, "."], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return folder, done.stdout


def section(output: str, name: str) -> str:
    """What pytest printed below the heading of one failure."""
    start = output.index(f"{name}.onnxtxt: passopt" if f"{name}.onnxtxt: passopt" in output else f"{name}.onnxtxt")
    return output[start:].split("\n_", 1)[0].split("\n===", 1)[0]


def test_a_file_whose_checks_hold_passes(reported):
    assert "PASSED good.onnxtxt::RUN" in reported[1]


def test_every_run_line_is_a_test_of_its_own(reported):
    assert "PASSED two_runs.onnxtxt::RUN-1" in reported[1]
    assert "FAILED two_runs.onnxtxt::RUN-2" in reported[1]


def test_a_wrong_check_fails_and_shows_place_output_and_command(reported):
    output = reported[1]
    text = section(output, "wrong")
    assert "FAILED wrong.onnxtxt::RUN" in output
    assert 'Couldn\'t match "y = Gelu (x)"' in text
    assert "wrong.onnxtxt:7" in text
    assert "   y = Relu (x)\n}" in text
    assert "passopt run wrong.onnxtxt --passes dead-code --emit text | filecheck wrong.onnxtxt" in text


def test_the_printed_command_shows_the_same_in_a_shell(reported):
    folder, output = reported
    command = section(output, "a space").split("--- the same by hand ---\n")[1].splitlines()[0].strip()
    assert shlex.split(command)[2] == "a space.onnxtxt"
    by_hand = command.replace("passopt", f"{sys.executable} -m passopt", 1)
    by_hand = by_hand.replace("| filecheck", f"| {sys.executable} -m filecheck")
    done = subprocess.run(by_hand, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Couldn't match" in done.stderr


@pytest.mark.parametrize("name", ["no_check", "bad_pass", "bad_text", "bad_option", "shell", "other_command"])
def test_what_cannot_be_checked_fails(reported, name):
    assert f"FAILED {name}.onnxtxt::RUN" in reported[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_check", "No check strings found"),
        ("bad_pass", "unknown pass 'dead-kode'; did you mean 'dead-code'?"),
        ("bad_text", "bad_text.onnxtxt: not ONNX text"),
        ("bad_option", "unrecognized arguments: --emitt text"),
        ("other_command", "expected: passopt … %s … | filecheck %s"),
        ("unbalanced", "is not a command line: No closing quotation"),
        ("no_run", "has CHECK lines and no RUN line, so nothing would be checked"),
    ],
)
def test_the_reason_is_said(reported, name, message):
    assert message in section(reported[1], name)


def test_a_file_of_a_graph_alone_is_no_test(reported):
    assert "data.onnxtxt" not in reported[1]


def test_no_shell_is_involved(reported):
    assert not (reported[0] / "stolen").exists()
