"""The examples of CONTRIBUTING.md are true: its passes run, its tests pass, its filecheck file holds."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
GRAPH = '<ir_version: 10, opset_import: ["" : 24]> g (float[2,3] x) => (float[2,3] y) { s = Sigmoid(x) y = Mul(x, s) }'


def block(language: str, word: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and word in text]
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The examples as files of a package of its own."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "silu.py").write_text(block("python", "class FuseSilu"))
    (folder / "guests.py").write_text(block("python", "graphsurgeon_pass"))
    # What only a registered name makes a pass of the command line, importing does.
    (folder / "conftest.py").write_text("import silu\nimport guests\n")
    test = block("python", "def test_mul_sigmoid")
    assert "from passopt.passes.fuse_silu import" in test  # where it lies in a checkout
    (folder / "test_silu.py").write_text(test.replace("passopt.passes.fuse_silu", "silu"))
    (folder / "silu.onnxtxt").write_text(block("", "# RUN:"))
    (folder / "test_guests.py").write_text(
        textwrap.dedent(
            f"""
            from guests import deduplicate, gs_fuse_silu
            from passopt.testing.checking import check

            GRAPH = '''{GRAPH}'''

            def test_graphsurgeon():
                model, _ = check(gs_fuse_silu(limit=1), GRAPH, tolerance=1e-5)
                assert [node.op_type for node in model.graph] == ["Swish"]
                assert not check(gs_fuse_silu(limit=0), GRAPH)[1].modified

            def test_onnx_ir():
                text = GRAPH.replace("{{", "<float one = {{1}}, float also = {{1}}> {{", 1)
                text = text.replace("s = Sigmoid(x)", "a = Mul(x, one) b = Add(a, also) s = Sigmoid(b)")
                model, _ = check(deduplicate(size_limit=8), text)
                assert len(model.graph.initializers) == 1
            """
        )
    )
    return folder


def test_everything_on_the_page_runs(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--update-golden", "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    (golden,) = project.rglob("golden/**/*.txt")
    assert "y = Swish (x)" in golden.read_text()
