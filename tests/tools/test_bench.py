"""Check that `python tools/bench NAME` finds every benchmark, and that its scripts shadow no other module."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ("rewriting", "weights", "peers", "compiled", "real", "calibrate", "quality", "startup", "full-size")


def run(*arguments: str, program: str = "bench") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_all_are_listed(arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert lines == list(NAMES)


def test_an_unknown_name_is_refused():
    done = run("compield", "--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown benchmark 'compield'; did you mean 'compiled'?" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_each_is_found_and_names_itself(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: python tools/bench {name} [-h]" in done.stdout
    assert f"    python tools/bench {name} [" in done.stdout


def test_programs_that_benches_start_are_files():
    """Check every path below tools/bench that a bench names as "….py"; a wrong one shows only when it is started."""
    started = {
        "compiled": ("candidates.py", "with_llama_cpp.py"),
        "real": ("candidates.py",),
        "rewriting": ("candidates.py",),
        "weights": ("peer_candidates.py", "plain_copy.py"),
    }
    for room, files in started.items():
        source = "".join(path.read_text() for path in (TOOLS / "bench" / room).glob("*.py"))
        for file in files:
            assert f'"{file}"' in source
            assert (TOOLS / "bench" / room / file).is_file()


def test_what_is_measured_is_started_as_a_file(tmp_path):
    """Copy a page by the plain program, and write a model by a candidate that imports others of its room."""
    (tmp_path / "source").write_bytes(bytes(4096))
    done = run("2", "4096", str(tmp_path / "copy"), str(tmp_path / "source"), program="bench/weights/plain_copy.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").stat().st_size == 4096
    shape = '{"family": "alibi", "hidden": 128, "intermediate": 160, "heads": 1, "layers": 1}'
    (tmp_path / "job.json").write_text(
        f'{{"candidate": "onnxruntime", "variant": "fp32", "model": "{tmp_path / "model"}", "shape": {shape}}}'
    )
    done = run("write", str(tmp_path / "job.json"), program="bench/compiled/candidates.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "fp32.onnx").is_file()


def test_no_script_has_the_name_of_another_module():
    """Any of these folders may come first on the path, where a script called torch.py would be taken for torch."""
    rooms = [TOOLS / "bench", TOOLS / "dev", TOOLS / "docs"]
    scripts = {path.stem for room in rooms for path in room.rglob("*.py")}
    folders = {path.name for path in (TOOLS / "bench").iterdir() if path.is_dir()}
    taken = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert not ((scripts | folders) - {"__init__", "__main__"}) & taken
