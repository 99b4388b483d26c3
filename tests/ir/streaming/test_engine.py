"""Outputs written in one pass: the same bytes whatever workers, memory, disk route and interruptions."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir import expressions as ex
from passopt.ir.errors import ModelError, UsageError
from passopt.ir.evaluate import Evaluator
from passopt.ir.expressions import DataType
from passopt.ir.layout import plan_layout
from passopt.ir.sources import external_source, identify, safetensors_sources, torch_sources
from passopt.ir.streaming import budget, direct_io, engine
from passopt.ir.streaming.budget import StreamOptions
from passopt.ir.streaming.direct_io import SourceReader
from passopt.ir.streaming.engine import write_safetensors, write_weight_files
from passopt.ir.streaming.schedule import WeightFile

HIDDEN, WIDE, VOCAB = 40, 72, 101
COPIES = 12
SHAPES = {
    "embed": (VOCAB, HIDDEN),
    "pack": (3 * HIDDEN, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "down": (HIDDEN, WIDE),
    "norm": (HIDDEN,),
    "head": (VOCAB, HIDDEN),
}


def checkpoint(path, seed=0, copies=1):
    """A small bf16 checkpoint, with so many copies of every tensor."""
    rng = np.random.default_rng(seed)
    shapes = {f"{name}{copy or ''}": shape for copy in range(copies) for name, shape in SHAPES.items()}
    save_file(
        {name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()},
        path,
    )
    return {name: source.cast(DataType.FLOAT16) for name, source in safetensors_sources(path).items()}


def sharded(weights, degree):
    """What tp and int8 make of a Baichuan2 layer: every kind of weight that they write."""
    found = {"embed": weights["embed"], "norm": weights["norm"]}
    rows = weights["head"].shape[0]
    found["head"] = weights["head"].normalize_rows(1e-4).pad(0, -(-rows // degree) * degree).shard(0, degree)
    for name, part in zip("qkv", weights["pack"].split([weights["pack"].shape[0] // 3] * 3, 0), strict=True):
        found[f"{name}.codes"], found[f"{name}.scales"] = part.shard(0, degree).quantize()
    for name in ("o_proj", "down"):
        found[f"{name}.codes"], found[f"{name}.scales"] = weights[name].shard(1, degree).quantize()
    return found


def many_sharded(weights):
    """Every copy in two ranks."""
    found = {}
    for copy in range(COPIES):
        own = {name: weights[f"{name}{copy or ''}"] for name in SHAPES}
        found |= {f"{copy}.{name}": weight for name, weight in sharded(own, 2).items()}
    return found


def files_in(folder, weights, degree):
    folder.mkdir(parents=True, exist_ok=True)
    return [WeightFile(folder / f"{rank}", weights, rank) for rank in range(degree)]


def contents(files):
    return [file.path.read_bytes() for file in files]


@pytest.fixture
def weights(tmp_path):
    return checkpoint(tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_rank_gets_what_the_evaluator_gives(tmp_path, weights, degree):
    files = files_in(tmp_path / "out", sharded(weights, degree), degree)
    report = write_weight_files(files)
    for file, data in zip(files, contents(files), strict=True):
        assert len(data) == file.layout.nbytes
        assert data.startswith(file.layout.header)
        with Evaluator(file.rank) as evaluator:
            for name, offset in file.layout.offsets.items():
                expected = evaluator.array(file.weights[name])
                assert data[offset : offset + expected.nbytes] == expected.tobytes(), name
    assert report.read == sum(weight.operand.nbytes for weight in weights.values())  # each byte once, for all ranks
    assert report.written == degree * sum(weight.nbytes for weight in files[0].weights.values())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("arena_bytes", [0, 1 << 16, 1 << 22])
def test_bytes_do_not_depend_on_how(tmp_path, weights, monkeypatch, direct, workers, arena_bytes):
    expected = files_in(tmp_path / "expected", sharded(weights, 3 - 1), 2)
    digests = write_weight_files(expected).digests
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0 if direct else 1 << 60)
    monkeypatch.setattr(engine, "_THREADS_FROM", 0)
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files, StreamOptions(workers=workers, arena_bytes=arena_bytes))
    assert contents(files) == contents(expected)
    assert report.digests == digests
    assert report.workers == workers


def test_shards_of_all_degrees_are_parts_of_the_same_codes(tmp_path, weights):
    def joined(degree, name, axis):
        files = files_in(tmp_path / f"tp{degree}", sharded(weights, degree), degree)
        write_weight_files(files)
        parts = [safetensors_sources(file.path)[name] for file in files]
        return np.concatenate([Evaluator().array(part) for part in parts], axis)

    for name, axis in (("q.codes", 0), ("q.scales", 0), ("down.codes", 1)):
        whole = joined(1, name, axis)
        assert all(np.array_equal(joined(degree, name, axis), whole) for degree in (2, 4)), name


def test_both_orders_of_sharding_and_quantising_are_the_same_bytes(tmp_path, weights):
    codes, scales = weights["down"].quantize()
    other = {"down.codes": codes.shard(1, 2), "down.scales": scales}
    mine = {name: weight for name, weight in sharded(weights, 2).items() if name in other}
    first, second = files_in(tmp_path / "a", mine, 2), files_in(tmp_path / "b", other, 2)
    write_weight_files(first)
    write_weight_files(second)
    assert contents(first) == contents(second)


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
    monkeypatch.setattr(engine, "_THREADS_FROM", 0)
    options = StreamOptions(workers=workers, arena_bytes=0)
    undisturbed = files_in(tmp_path / "undisturbed", sharded(weights, 2), 2)
    expected = write_weight_files(undisturbed, options)
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
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
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files, progress=progress, journal=tmp_path / "journal")
    assert progress.done == report.written
    again = Interrupting(1 << 30)
    assert write_weight_files(files, progress=again, journal=tmp_path / "journal").written == 0
    assert again.done == progress.done


def test_a_journal_of_something_else_counts_for_nothing(tmp_path, weights):
    journal = tmp_path / "journal"
    for seed, degree in ((0, 2), (1, 2), (1, 1)):
        fresh = checkpoint(tmp_path / "checkpoint.safetensors", seed)
        files = files_in(tmp_path / "out", sharded(fresh, degree), degree)
        assert write_weight_files(files, journal=journal).resumed == 0
        expected = files_in(tmp_path / f"expected{seed}{degree}", sharded(fresh, degree), degree)
        write_weight_files(expected)
        assert contents(files) == contents(expected)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"key": 1}\n', b'[]\n"x"\n', b"\xff\xfe\n"])
def test_a_damaged_journal_counts_for_nothing(tmp_path, weights, damage):
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files, journal=tmp_path / "journal")
    expected = contents(files)
    (tmp_path / "journal").write_bytes(damage)
    assert write_weight_files(files, journal=tmp_path / "journal").resumed == 0
    assert contents(files) == expected


def test_a_torn_last_line_is_forgotten(tmp_path, weights):
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
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


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    """SIGKILL, 20 times: whatever the journal names is whole, and the end is that of an undisturbed run."""
    weights = many_sharded(checkpoint(tmp_path / "checkpoint.safetensors", copies=COPIES))
    undisturbed = files_in(tmp_path / "undisturbed", weights, 2)
    write_weight_files(undisturbed)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(os.path.dirname(__file__))!r})
        import test_engine as t
        from passopt.ir.streaming import budget, direct_io, engine
        direct_io.DIRECT_FROM, engine._COMMIT_EVERY, engine._THREADS_FROM = 1 << 20, 0.02, 0
        folder = Path({str(tmp_path)!r})
        sources = t.safetensors_sources(folder / "checkpoint.safetensors")
        weights = {{name: source.cast(t.DataType.FLOAT16) for name, source in sources.items()}}
        files = t.files_in(folder / "out", t.many_sharded(weights), 2)
        print("go", flush=True)
        options = t.StreamOptions(workers=3, arena_bytes=1 << 16)
        report = t.write_weight_files(files, options, progress=lambda _: time.sleep(0.002), journal=folder / "journal")
        print(report.resumed, flush=True)
        """)
    )
    chance = random.Random(0)
    finished = []
    for _ in range(20):
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished.append((tmp_path / "journal").read_bytes().count(b"\n") if (tmp_path / "journal").exists() else 0)
    assert finished == sorted(finished)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 0  # something was kept from one of the killed runs
    assert contents(files_in(tmp_path / "out", weights, 2)) == contents(undisturbed)


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path, weights):
    path = tmp_path / "checkpoint.safetensors"

    def touch(_):
        os.utime(path, ns=(1, 1))

    with pytest.raises(ModelError, match="modification time changed"):
        write_weight_files(files_in(tmp_path / "out", sharded(weights, 2), 2), progress=touch)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_read_error_names_file_byte_and_tensor(tmp_path, weights, monkeypatch, workers):
    monkeypatch.setattr(engine, "_THREADS_FROM", 0)
    real = os.preadv

    def failing(descriptor, buffers, offset):
        if offset >= 4096:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    with pytest.raises(
        ModelError, match=r"checkpoint.*cannot be read at byte \d+, in tensor '\w+': Input/output error"
    ):
        write_weight_files(files, StreamOptions(workers=workers))


def test_a_truncated_source_names_byte_and_tensor(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("passopt.ir.streaming.direct_io.check_unchanged", lambda _: None)
    os.truncate(tmp_path / "checkpoint.safetensors", 9000)
    with pytest.raises(ModelError, match=r"ends at byte 9000, inside tensor"):
        write_weight_files(files_in(tmp_path / "out", sharded(weights, 2), 2))


def test_a_full_disk_is_the_error_of_the_disk(tmp_path, weights, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        write_weight_files(files)


def test_nan_is_named_with_its_row_in_the_file(tmp_path):
    array = np.ones((12, 4), np.float32)
    array[7, 2] = np.nan
    save_file({"w": array}, tmp_path / "s")
    codes, _ = safetensors_sources(tmp_path / "s")["w"].slice(0, 3, 12).quantize()
    with pytest.raises(ModelError, match="w: NaN or Inf in row 7"):
        write_safetensors(tmp_path / "out", {"codes": codes})


def test_too_little_memory_says_how_much_it_takes(tmp_path, weights):
    with pytest.raises(UsageError, match=r"--memory 0.00GiB is too little: .* Give --memory \d+MiB"):
        write_weight_files(files_in(tmp_path / "out", sharded(weights, 2), 2), StreamOptions(memory=1000))


def test_a_process_that_is_large_already_writes_in_the_least_memory(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(budget, "resident_bytes", lambda: 1 << 40)
    monkeypatch.setattr(engine, "_THREADS_FROM", 0)
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    report = write_weight_files(files)
    assert report.workers == 1
    with pytest.raises(UsageError, match="is too little"):
        write_weight_files(files, StreamOptions(memory=1 << 30))


def test_o_direct_that_is_refused_becomes_buffered(tmp_path, weights, monkeypatch):
    """As on tmpfs and some network file systems: opening works, transfers do not."""
    expected = files_in(tmp_path / "expected", sharded(weights, 2), 2)
    write_weight_files(expected)
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0)
    refused = []

    def refusing(real):
        def call(descriptor, buffers, offset):
            if direct_flag(descriptor):
                refused.append(descriptor)
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, buffers, offset)

        return call

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    files = files_in(tmp_path / "out", sharded(weights, 2), 2)
    write_weight_files(files)
    assert refused
    assert contents(files) == contents(expected)


def direct_flag(descriptor):
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 5000])
@pytest.mark.parametrize("nbytes", [1, 4096, 9000])
@pytest.mark.parametrize("direct", [True, False])
def test_ranges_of_a_file_are_read_exactly(tmp_path, monkeypatch, offset, nbytes, direct):
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0 if direct else 1 << 60)
    data = np.random.default_rng(0).integers(0, 256, 15_001, dtype=np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    file = identify(tmp_path / "f")
    memory = direct_io.Arena(direct_io.page_up(nbytes) + 2 * direct_io.PAGE).take(nbytes + 2 * direct_io.PAGE)
    reader = SourceReader()
    start = reader.read(file, "w", offset, memory, nbytes)
    assert bytes(memory[start : start + nbytes]) == data[offset : offset + nbytes]
    reader.close()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_zip_entries_of_torch_are_streamed_in_place(tmp_path, kind, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(direct_io, "DIRECT_FROM", 0)
    state = {name: torch.randn(shape).to(getattr(torch, kind)) for name, shape in SHAPES.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    sources = torch_sources(tmp_path / "pytorch_model.bin")
    files = files_in(tmp_path / "out", sharded({n: s.cast(DataType.FLOAT16) for n, s in sources.items()}, 2), 2)
    write_weight_files(files)
    with Evaluator(1) as evaluator:
        for name, offset in files[1].layout.offsets.items():
            expected = evaluator.array(files[1].weights[name]).tobytes()
            assert files[1].path.read_bytes()[offset : offset + len(expected)] == expected, name


def test_external_data_at_odd_places_is_streamed(tmp_path):
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    (tmp_path / "data").write_bytes(b"x" + array.tobytes())
    source = external_source(tmp_path / "data", "w", DataType.FLOAT, (5, 7), 1)
    codes, scales = source.quantize()
    write_safetensors(tmp_path / "out", {"w": source, "codes": codes, "scales": scales})
    found = safetensors_sources(tmp_path / "out")
    assert np.array_equal(Evaluator().array(found["w"]), array)
    assert np.array_equal(Evaluator().array(found["codes"]), Evaluator().array(codes))


def test_fills_alone_are_written(tmp_path):
    weights = {"w": ex.Fill(DataType.FLOAT16, (5, 3), 2.0), "empty": ex.Fill(DataType.FLOAT, (0, 4), 1.0)}
    write_safetensors(tmp_path / "out", weights)
    layout = plan_layout(weights)
    data = (tmp_path / "out").read_bytes()
    assert np.frombuffer(data, np.float16, 15, layout.offsets["w"]).tolist() == [2.0] * 15
