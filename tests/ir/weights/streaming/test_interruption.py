"""Interrupted, killed and damaged writes end with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.sources import safetensors_sources
from passopt.ir.weights.streaming import write_weights
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.journal import Journal
from passopt.ir.weights.streaming.output_groups import WeightFile
from passopt.ir.weights.streaming.write_weights import write_weight_files
from passopt.testing.layers import all_sharded, contents, rank_files, sharded, write_layers


@pytest.fixture
def weights(tmp_path):
    return write_layers(tmp_path / "checkpoint.safetensors")


class Interrupting:
    """A progress that interrupts after so many calls."""

    def __init__(self, calls, error=KeyboardInterrupt):
        self.calls, self.error, self.done = calls, error, 0

    def __call__(self, nbytes):
        self.done += nbytes
        self.calls -= 1
        if self.calls < 0:
            raise self.error


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, weights, monkeypatch, workers):
    monkeypatch.setattr(write_weights, "_THREADS_FROM", 0)
    options = StreamOptions(workers=workers, arena_bytes=0)
    undisturbed = rank_files(tmp_path / "undisturbed", sharded(weights, 2), 2)
    expected = write_weight_files(undisturbed, options)
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    journal = tmp_path / "out" / "journal"
    resumed = []
    for calls in (14, 22, 10_000):
        try:
            report = write_weight_files(files, options, progress=Interrupting(calls), journal=journal)
        except KeyboardInterrupt:
            resumed.append(journal.read_bytes().count(b"\n") - 1)
    assert len(resumed) == 2
    assert 0 < resumed[0] <= resumed[1]
    assert contents(files) == contents(undisturbed)
    assert report.digests == expected.digests
    assert 0 < report.resumed < expected.written
    assert report.resumed + report.written == expected.written
    assert report.read < expected.read


def test_progress_ends_at_the_bytes_of_the_output(tmp_path, weights):
    progress = Interrupting(1 << 30)
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files, progress=progress, journal=tmp_path / "journal")
    assert progress.done == report.written
    again = Interrupting(1 << 30)
    assert write_weight_files(files, progress=again, journal=tmp_path / "journal").written == 0
    assert again.done == progress.done


def test_a_journal_of_something_else_counts_for_nothing(tmp_path, weights):
    journal = tmp_path / "journal"
    for seed, degree in ((0, 2), (1, 2), (1, 1)):
        fresh = write_layers(tmp_path / "checkpoint.safetensors", seed)
        files = rank_files(tmp_path / "out", sharded(fresh, degree), degree)
        assert write_weight_files(files, journal=journal).resumed == 0
        expected = rank_files(tmp_path / f"expected{seed}{degree}", sharded(fresh, degree), degree)
        write_weight_files(expected)
        assert contents(files) == contents(expected)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"key": 1}\n', b'[]\n"x"\n', b"\xff\xfe\n"])
def test_a_damaged_journal_counts_for_nothing(tmp_path, weights, damage):
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files, journal=tmp_path / "journal")
    expected = contents(files)
    (tmp_path / "journal").write_bytes(damage)
    assert write_weight_files(files, journal=tmp_path / "journal").resumed == 0
    assert contents(files) == expected


def test_a_torn_last_line_is_forgotten(tmp_path, weights):
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files, journal=tmp_path / "journal")
    expected = contents(files)
    data = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(data[:-5])
    report = write_weight_files(files, journal=tmp_path / "journal")
    assert 0 < report.resumed < report.resumed + report.written
    assert contents(files) == expected
    assert set((tmp_path / "journal").read_bytes().splitlines()) == set(data.splitlines())


def test_overflows_survive_an_interruption(tmp_path):
    array = np.zeros((64, 32), np.float32)
    array[3, 4] = 1e6
    save_file({"w": array, "v": array[:2]}, tmp_path / "s")
    sources = {name: source.cast(DataType.FLOAT16) for name, source in safetensors_sources(tmp_path / "s").items()}
    file = WeightFile(tmp_path / "out", sources)
    assert write_weight_files([file], journal=tmp_path / "journal").overflows == {"w": 1}
    assert write_weight_files([file], journal=tmp_path / "journal").overflows == {"w": 1}


SCRIPT = """
import sys, time
from pathlib import Path
from passopt.ir.weights.streaming import direct_io, write_weights
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.testing.layers import all_sharded, rank_files, read_layers
direct_io.DIRECT_FROM, write_weights._COMMIT_EVERY, write_weights._THREADS_FROM = 1 << 20, 0.02, 0
folder = Path(sys.argv[1])
files = rank_files(folder / "out", all_sharded(read_layers(folder / "checkpoint.safetensors"), 2), 2)
print("go", flush=True)
options = StreamOptions(workers=3, arena_bytes=1 << 16)
slowly = lambda _: time.sleep(0.002)
report = write_weights.write_weight_files(files, options, progress=slowly, journal=folder / "journal")
print(report.resumed, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL, 20 times: whatever the journal names is whole, and the end is that of an undisturbed run."""
    weights = all_sharded(write_layers(tmp_path / "checkpoint.safetensors", copies=12), 2)
    undisturbed = rank_files(tmp_path / "undisturbed", weights, 2)
    write_weight_files(undisturbed)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    journal = tmp_path / "journal"
    chance = random.Random(0)
    finished = []
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    assert finished == sorted(finished)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 0  # something was kept from one of the killed runs
    assert contents(rank_files(tmp_path / "out", weights, 2)) == contents(undisturbed)


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_journal_without_its_files_counts_for_nothing(tmp_path, weights, damage):
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files, journal=tmp_path / "journal")
    expected = contents(files)
    if damage == "removed":
        files[1].path.unlink()
    else:
        os.truncate(files[1].path, 1000)
    assert write_weight_files(files, journal=tmp_path / "journal").resumed == 0
    assert contents(files) == expected


def test_a_kill_while_a_journal_begins_leaves_no_claim(tmp_path, weights, monkeypatch):
    """Padding between tensors is never written: it must not show what another output had there."""
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files)
    expected = contents(files)
    for file in files:
        file.path.write_bytes(b"\xff" * file.layout.nbytes)

    class KilledError(BaseException):
        pass

    def killed(self):
        raise KilledError

    for step in ("unlink", "_append"):
        with monkeypatch.context() as patch:
            patch.setattr(Path if step == "unlink" else Journal, step, lambda *_, **__: killed(None))
            with pytest.raises(KilledError):
                write_weight_files(files, journal=tmp_path / "journal")
    assert write_weight_files(files, journal=tmp_path / "journal").resumed == 0
    assert contents(files) == expected
