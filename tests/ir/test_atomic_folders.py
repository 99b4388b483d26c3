"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from passopt.ir.atomic_folders import JOURNAL_NAME, resumable_directory, staged_directory
from passopt.ir.errors import ModelError, UsageError


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
    with pytest.raises(UsageError, match="output exists. Name another with `output`"), staged_directory(target):
        pytest.fail("the block ran")
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="out: cannot be made"), staged_directory(tmp_path / "file" / "out"):
        pytest.fail("the block ran")
    assert everything(tmp_path) == ["file"]


def begin(target, error=None, lines=2):
    """A long write that comes as far as `lines` of its journal."""
    with resumable_directory(target) as folder:
        (folder / "data").write_text("half")
        (folder / JOURNAL_NAME).write_text("line\n" * lines)
        if error is not None:
            raise error


def test_a_long_write_appears_whole_and_without_its_journal(tmp_path):
    begin(tmp_path / "deep" / "out")
    assert everything(tmp_path) == ["deep", "deep/out", "deep/out/data"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o755


def test_an_interruption_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"kept in .*/\.out\.partial: run the same command again"):
        begin(tmp_path / "out", KeyboardInterrupt())
    assert everything(tmp_path) == [".out.partial", ".out.partial/data", f".out.partial/{JOURNAL_NAME}"]
    with resumable_directory(tmp_path / "out") as folder:
        assert (folder / "data").read_text() == "half"
    assert everything(tmp_path) == ["out", "out/data"]


def test_an_interruption_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "out", KeyboardInterrupt(), lines=1)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("error", [ModelError("x"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_is_worthless_or_in_the_way_is_removed(tmp_path, error):
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)):
        begin(tmp_path / "out", error)
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    "error", [ValueError("x"), UsageError("little memory"), OSError(errno.EIO, "Input/output error")]
)
def test_finished_work_outlives_other_errors(tmp_path, error):
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)) as caught:
        begin(tmp_path / "out", error)
    assert isinstance(error, ValueError) or "run the same command again" in str(caught.value)
    assert (tmp_path / ".out.partial" / "data").exists()
    with pytest.raises(type(error) if not isinstance(error, OSError) else UsageError):
        begin(tmp_path / "out", error, lines=1)
    assert everything(tmp_path) == []


def test_a_full_disk_says_so_before_and_keeps_what_is_finished(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "out", KeyboardInterrupt())
    with (
        pytest.raises(UsageError, match=r"needs .* bytes, the disk has .*\n.*kept in"),
        resumable_directory(tmp_path / "out", 1 << 60),
    ):
        pytest.fail("the block ran")
    assert (tmp_path / ".out.partial" / "data").exists()


def test_a_link_in_place_of_unfinished_output_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".out.partial").symlink_to("mine")
    with pytest.raises(UsageError, match="is a link"):
        begin(tmp_path / "out")
    assert everything(tmp_path) == [".out.partial", "mine"]


def test_two_processes_cannot_write_one_output(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from passopt.ir.atomic_folders import resumable_directory\n"
        "with resumable_directory(Path(sys.argv[1])):\n"
        "    print('go', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdin=pipe, stdout=pipe, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "go\n"
    with pytest.raises(UsageError, match="another passopt is writing it"):
        begin(tmp_path / "out")
    other.communicate("")
    assert other.returncode == 0
    assert everything(tmp_path) == ["out"]


def test_what_an_interrupted_write_holds_already_needs_no_space(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "out", KeyboardInterrupt())
    with (tmp_path / ".out.partial" / "data").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with resumable_directory(tmp_path / "out", 1 << 20):
        pass
    assert everything(tmp_path) == ["out", "out/data"]
