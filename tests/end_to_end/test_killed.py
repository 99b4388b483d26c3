"""`passopt run`, killed at random moments and started again, with two pipelines that want the same output folder."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from passopt.cli import main

SCRIPT = """
import sys, time
from passopt.cli import main
from passopt.ir.streaming import direct_io, engine
direct_io.DIRECT_FROM, engine._COMMIT_EVERY, engine._THREADS_FROM = 1 << 16, 0.01, 0
real = engine._Run._finish
engine._Run._finish = lambda *arguments: (time.sleep(0.01), real(*arguments))
print("go", flush=True)
sys.exit(main(sys.argv[1:]))
"""
PIPELINES = ("tp{degree=2}", "tp{degree=4,pad=true},int8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_and_run_again_it_ends_with_the_same_bytes(alibi: Path, tmp_path: Path) -> None:
    expected = []
    for index, passes in enumerate(PIPELINES):
        assert main(["run", str(alibi), "--passes", passes, "-o", str(tmp_path / f"whole{index}")]) == 0
        expected.append(files_of(tmp_path / f"whole{index}"))
    output = tmp_path / "out"
    chance = random.Random(1)
    for attempt in range(7):
        index = chance.randrange(2)
        command = [sys.executable, "-c", SCRIPT, "run", str(alibi), "--passes", PIPELINES[index], "-o", str(output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        if attempt % 3 != 2:
            time.sleep(chance.uniform(0.5, 2.0))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            assert files_of(output) == expected[index]
            shutil.rmtree(output)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] in ([], [".out.partial"])
