"""Files past the page cache and through it, and what goes wrong with disks and files."""

from __future__ import annotations

import errno
import fcntl
import os

import numpy as np
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.weights.sources import identify
from passopt.ir.weights.streaming import direct_io, write_weights
from passopt.ir.weights.streaming.budget import StreamOptions
from passopt.ir.weights.streaming.direct_io import SourceReader
from passopt.ir.weights.streaming.write_weights import write_weight_files
from passopt.testing.layers import contents, rank_files, sharded, write_layers


@pytest.fixture
def weights(tmp_path):
    return write_layers(tmp_path / "checkpoint.safetensors")


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path, weights):
    path = tmp_path / "checkpoint.safetensors"

    def touch(_):
        os.utime(path, ns=(1, 1))

    with pytest.raises(ModelError, match="modification time changed"):
        write_weight_files(rank_files(tmp_path / "out", sharded(weights, 2), 2), progress=touch)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_read_error_names_file_byte_and_tensor(tmp_path, weights, monkeypatch, workers):
    monkeypatch.setattr(write_weights, "_THREADS_FROM", 0)
    real = os.preadv

    def failing(descriptor, buffers, offset):
        if offset >= 4096:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    with pytest.raises(
        ModelError, match=r"checkpoint.*cannot be read at byte \d+, in tensor '\w+': Input/output error"
    ):
        write_weight_files(files, StreamOptions(workers=workers))


def test_a_truncated_source_names_byte_and_tensor(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("passopt.ir.weights.streaming.direct_io.check_unchanged", lambda _: None)
    os.truncate(tmp_path / "checkpoint.safetensors", 9000)
    with pytest.raises(ModelError, match=r"ends at byte 9000, inside tensor"):
        write_weight_files(rank_files(tmp_path / "out", sharded(weights, 2), 2))


def test_a_full_disk_is_the_error_of_the_disk(tmp_path, weights, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        write_weight_files(files)


def test_o_direct_that_is_refused_becomes_buffered(tmp_path, weights, monkeypatch):
    """As on tmpfs and some network file systems: opening works, transfers do not."""
    expected = rank_files(tmp_path / "expected", sharded(weights, 2), 2)
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
    files = rank_files(tmp_path / "out", sharded(weights, 2), 2)
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
