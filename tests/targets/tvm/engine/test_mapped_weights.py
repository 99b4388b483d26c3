"""Weights of a compiled folder: mapped or copied, hashed once, and refused if they are not those that were written."""

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.targets.tvm.compiled_folder import read_library
from passopt.targets.tvm.engine import available_memory, mapped_weights
from passopt.targets.tvm.engine.engine import Engine
from passopt.targets.tvm.engine.mapped_weights import WeightsMap


@pytest.mark.slow
def test_a_damaged_weight_is_refused_by_name_and_never_stamped(folder: Path):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1 - 32] ^= 1  # the last tensor takes 264 bytes of 320
    data[-70] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    for _ in range(2):
        with pytest.raises(ModelError, match="tensor 'head' is damaged"):
            Engine.load(folder)
    assert not (folder / "weights.safetensors.verified").exists()


def test_a_damaged_header_is_refused(folder: Path):
    data = (folder / "weights.safetensors").read_bytes().replace(b"[11,6]", b"[6,11]")
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="header"):
        Engine.load(folder)


def test_weights_are_hashed_once_per_file(folder: Path, monkeypatch):
    hashed = []
    read = WeightsMap.read
    monkeypatch.setattr(
        WeightsMap,
        "read",
        lambda self, *args, **how: (hashed.append(1) if how["verify"] else None, read(self, *args, **how)),
    )
    Engine.load(folder)
    Engine.load(folder)
    assert len(hashed) == 1
    Engine.load(folder, verify_weights=True)
    assert len(hashed) == 2
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-70] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        Engine.load(folder)


def test_a_folder_that_cannot_be_written_to_loads(folder: Path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    Engine.load(folder)
    assert not (folder / "weights.safetensors.verified").exists()


def test_weights_are_mapped_and_stay_mapped(tiny):
    engine = Engine.load(tiny.folder)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny.folder) in line]
    assert any(line.split()[1] == "r--s" and line.endswith("weights.safetensors") for line in mapped)
    import gc

    gc.collect()
    np.testing.assert_array_equal(engine.forward([[3]], [[1]]), tiny.logits([[3]], [[1]], [[0]]))


def test_weights_can_be_copied(tiny, tmp_path: Path, monkeypatch):
    """In pieces, and reads that end early; the file is not mapped any more, and may go. Logits are the same bits."""
    preadv = os.preadv
    monkeypatch.setattr(mapped_weights, "_PIECE", 100)
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:37]], at))
    for unknown in (True, False):  # hashed while it is copied, then known
        folder = tmp_path / f"copy {unknown}"
        shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("*.verified"))
        if not unknown:
            Engine.load(folder)
        read: list[int] = []
        engine = Engine.load(folder, copy_weights=True, progress=read.append)
        assert sum(read) == 4 * 2 * 11 * 6  # embedding and head, fp32
        weights = folder / "weights.safetensors"
        assert not any(line.endswith(str(weights)) for line in Path("/proc/self/maps").read_text().splitlines())
        weights.write_bytes(b"")
        np.testing.assert_array_equal(engine.forward([[3]], [[1]]), tiny.logits([[3]], [[1]], [[0]]))


def test_a_file_that_ends_while_it_is_copied_is_refused(folder: Path, monkeypatch):
    Engine.load(folder)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ModelError, match=r"ends at byte \d+, inside tensor"):
        Engine.load(folder, copy_weights=True)


def test_a_damaged_tensor_is_refused_while_it_is_copied(folder: Path):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-70] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="tensor 'head' is damaged"):
        Engine.load(folder, copy_weights=True)


def test_a_copy_that_does_not_fit_is_refused_before_anything_is_read(folder: Path, monkeypatch):
    monkeypatch.setattr(WeightsMap, "read", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(available_memory, "available_memory", lambda: 100)
    with pytest.raises(UsageError, match=r"a copy of [\d,]+ bytes, 100 are available; leave out `copy_weights`"):
        Engine.load(folder, copy_weights=True)


def test_a_wrong_capacity_is_refused_before_anything_is_read(folder: Path, monkeypatch):
    monkeypatch.setattr(WeightsMap, "read", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UsageError, match="both must be at least 1"):
        Engine.load(folder, capacity=0)


def test_a_file_that_takes_the_name_while_another_is_read_is_not_stamped(folder: Path, monkeypatch):
    weights, read = folder / "weights.safetensors", WeightsMap.read

    def replaced(self: WeightsMap, *args: int, **how: bool) -> None:
        other = weights.with_name("other")
        other.write_bytes(weights.read_bytes())
        other.replace(weights)
        read(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(WeightsMap, "read", replaced)
        Engine.load(folder)
    assert (folder / "weights.safetensors.verified").exists()
    with WeightsMap(weights, read_library(folder).weights) as found:
        assert not found.is_stamped()


def test_no_file_stays_open(folder: Path):
    def opened() -> list[str]:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.lexists(link)]

    engines = [Engine.load(folder, copy_weights=copy) for copy in (False, True, True)]
    # The map of the first one keeps a descriptor of its own.
    assert opened().count(str(folder / "weights.safetensors")) == 1
    del engines
    with (folder / "weights.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="bytes, expected"):
        Engine.load(folder)
    assert str(folder / "weights.safetensors") not in opened()


def test_no_memory_for_a_copy_is_said(folder: Path, monkeypatch):
    mapped = mapped_weights.mmap.mmap

    def full(file: int, *args: int, **how: int) -> mmap.mmap:
        if file == -1:
            raise OSError(12, "Cannot allocate memory")
        return mapped(file, *args, **how)

    monkeypatch.setattr(mapped_weights.mmap, "mmap", full)
    with pytest.raises(UsageError, match=r"no memory for a copy of [\d,]+ bytes; leave out `copy_weights`"):
        Engine.load(folder, copy_weights=True)
