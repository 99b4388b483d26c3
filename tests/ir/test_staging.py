"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import shutil

import pytest

from passopt.ir.errors import UsageError
from passopt.ir.staging import staged_directory


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_folder_appears_when_it_is_whole(tmp_path):
    with staged_directory(tmp_path / "a" / "out") as folder:
        (folder / "model.onnx").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert everything(tmp_path) == ["a", "a/out", "a/out/model.onnx"]
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after(tmp_path, kind):
    def interrupted():
        with staged_directory(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "half").write_text("x")
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        interrupted()
    assert everything(tmp_path) == []


def test_a_full_disk_while_writing_is_a_usage_error(tmp_path):
    def full():
        with staged_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UsageError, match="out: writing failed: No space left on device; nothing was kept"):
        full()
    assert everything(tmp_path) == []


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(UsageError, match="needs 1,001 bytes, the disk has 1,000 free"),
        staged_directory(tmp_path / "out", 1001),
    ):
        pytest.fail("the block ran")
    assert everything(tmp_path) == []
    with staged_directory(tmp_path / "out", 1000):
        pass
    assert everything(tmp_path) == ["out"]


@pytest.mark.parametrize("directory", [True, False])
def test_what_exists_is_never_overwritten(tmp_path, directory):
    target = tmp_path / "out"
    if directory:
        target.mkdir()
        (target / "kept").write_text("mine")
    else:
        target.write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="output exists. Name another with -o"), staged_directory(target):
        pytest.fail("the block ran")
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="out: cannot be made"), staged_directory(tmp_path / "file" / "out"):
        pytest.fail("the block ran")
    assert everything(tmp_path) == ["file"]
