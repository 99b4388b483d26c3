"""`passopt run`, killed at random moments and started again, with two pipelines that want one output; and `compile`."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from passopt.cli import main
from passopt.ir.atomic_folders import JOURNAL_NAME
from passopt.terminal import console

SCRIPT = """
import sys, time
from passopt.cli import main
from passopt.ir.weights.streaming import direct_io, write_weights
direct_io.DIRECT_FROM, write_weights._COMMIT_EVERY, write_weights._THREADS_FROM = 1 << 16, 0.01, 0
real = write_weights._Run._finish
write_weights._Run._finish = lambda *arguments: (time.sleep(0.01), real(*arguments))
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


def test_a_killed_compile_goes_on_with_the_weights_that_are_finished(
    alibi: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(console, "_REPORTED_FROM", 0)
    options = ["compile", str(alibi), "--passes", "baichuan2,int8{head=true}", "-o"]
    assert main([*options, str(tmp_path / "whole")]) == 0
    output, journal = tmp_path / "out", tmp_path / ".out.partial" / JOURNAL_NAME
    command = [sys.executable, "-c", SCRIPT, *options, str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.is_file()
    capsys.readouterr()
    assert main([*options, str(output)]) == 0
    assert "kept" in capsys.readouterr().err
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    whole = (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert (output / "weights.safetensors").read_bytes() == whole
