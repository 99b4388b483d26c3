"""Damaged files end every command with a message: no traceback, no crash, no half-written folder, in bounded time.

`python tools/dev/fuzz --count N --seed S` looks further; with --compiler and --exporter it damages compiled folders and
checkpoints, too.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "tools" / "dev" / "fuzz"


@pytest.mark.slow
def test_two_hundred_damaged_files_end_in_messages():
    command = [sys.executable, FUZZ, "--count", "200", "--calls", "1", "--seed", "17"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "200 damaged files, 200 calls" in done.stdout


@pytest.mark.slow
def test_a_defect_and_a_leftover_are_found(tmp_path):
    """The fuzzer itself can fail: of a command that has a defect and leaves a folder, and is the only one called."""
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FUZZ)!r})\n"
        "import passopt.api.plan, passopt.commands.plan, pathlib, subjects\n"
        "subjects.OF_MODELS = (('plan', subjects.MODEL, '--json'),)\n"
        "def main(options):\n"
        "    (pathlib.Path(options.model).parent / 'left').mkdir()\n"
        "    return {}['missing']\n"
        "passopt.commands.plan.main = main\n"
        "import runpy\n"
        "sys.argv = ['fuzz', '--count', '3', '--seed', '5', '--subject', 'mlp']\n"
        f"runpy.run_path({str(FUZZ)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "says 'a defect of passopt'; left left" in done.stdout
    assert "passopt plan …/model --json" in done.stdout


def test_equal_seeds_damage_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FUZZ))
    from damage import damage

    found = []
    for name in ("one", "other"):
        path = tmp_path / name / "config.json"
        path.parent.mkdir()
        path.write_text('{"a": [1, 2, {"b": "c"}]}')
        ways = []
        for seed in (3, 4, 5):
            path.write_text('{"a": [1, 2, {"b": "c"}]}')
            ways.append(damage(path, random.Random(seed)))
        found.append((ways, path.read_bytes() if path.is_file() else None))
    assert found[0] == found[1]
