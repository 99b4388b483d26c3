"""Write output folders that appear whole or not at all.

A folder is written under a temporary name beside its final place, and renamed when it is complete. Long writes use a
temporary name that is always the same: an interruption leaves that folder behind, and the same command resumes from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from passopt.ir.errors import ModelError, UsageError

#: The file in the temporary folder of a long write that lists its finished tensors (see ir.weights.streaming.journal).
JOURNAL_NAME = "journal.jsonl"


@contextlib.contextmanager
def staged_directory(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` if the block succeeds, and is removed if it fails (or at Ctrl-C).

    Args:
        final: The output folder, which must not exist yet. Missing parents are created.
        needed_bytes: The disk space in bytes that has to be free before the block starts.

    Raises:
        UsageError: If `final` exists, if the disk has too little space, or if writing fails.
    """
    final = final.absolute()
    _refuse_existing(final)
    with _errors_of(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    try:
        _check_space(final, needed_bytes)
        yield temporary
        _sync_all(temporary)
        _publish(temporary, final)
    except OSError as error:
        raise _failed(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_directory(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder like `staged_directory`, but keep it for the next run if the block does not finish.

    The folder is kept only if its journal lists at least one finished tensor. It is removed after a ModelError, because
    what was written for a wrong model is worthless, and when the disk is full, to give the space back.

    Args:
        final: The output folder, which must not exist yet. Missing parents are created.
        needed_bytes: The size of the whole output in bytes; what an earlier run left in the folder counts towards it.

    Raises:
        UsageError: In the cases of `staged_directory`, and if another process writes the same output or the temporary
            folder is a symbolic link.
    """
    final = final.absolute()
    _refuse_existing(final)
    temporary = final.with_name(f".{final.name}.partial")
    if temporary.is_symlink():
        raise UsageError(f"{temporary}: is a link, where unfinished output would go; remove it. Nothing was written.")
    with _errors_of(final):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(lock, temporary, final)
        try:
            _check_space(final, needed_bytes - _allocated(temporary))
            yield temporary
            _sync_all(temporary)
            (temporary / JOURNAL_NAME).unlink(missing_ok=True)
            _publish(temporary, final)
        except BaseException as error:
            shown = _given_up(temporary, final, error)
            if shown is error:
                raise
            raise shown from error
    finally:
        os.close(lock)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file, which appears whole or not at all; one that is there is replaced.

    Args:
        path: The file.
        text: What it will hold.

    Raises:
        UsageError: If writing fails.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove all files below `folder` that are not in `names`, all links, and the folders that are then empty.

    A run of another output may have left such files there before it was interrupted. Names are relative to `folder`.
    passopt writes no links, and one with the name of a file would lead what is written out of the folder.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.rmdir()
        elif str(path.relative_to(folder)) not in names:
            path.unlink()


def _given_up(temporary: Path, final: Path, error: BaseException) -> BaseException:
    """Keep the temporary folder if it can be resumed, or remove it, and return the error that tells the user which."""
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    keep = not full and not isinstance(error, ModelError) and _has_entries(temporary / JOURNAL_NAME)
    if not keep:
        shutil.rmtree(temporary, ignore_errors=True)
        return _failed(final, error) if isinstance(error, OSError) else error
    kept = f"what is finished is kept in {temporary}: run the same command again to go on, or remove that folder"
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted; {kept}")
    if isinstance(error, OSError):
        return UsageError(f"{final}: writing failed: {error.strerror or error}; {kept}")
    if isinstance(error, UsageError):
        return UsageError(f"{error}\n{kept}")
    return error


def _lock(descriptor: int, temporary: Path, final: Path) -> None:
    """Lock the temporary folder, so that only one process writes an output; the lock ends with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{final}: another passopt is writing it, in {temporary}. Wait for it, or stop it.") from error
    except OSError:
        return  # The file system has no locks: we cannot keep two processes apart there.
    _refuse_existing(final)  # Another process may have finished between our check and our lock.
    if not temporary.exists() or not os.path.samestat(os.fstat(descriptor), temporary.stat()):
        raise UsageError(f"{final}: another passopt has just given it up. Run the same command again.")


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise UsageError(
            f"{final}: output exists. Name another with `output`, or remove it first; nothing was written."
        )


@contextlib.contextmanager
def _errors_of(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{final}: cannot be made: {error.strerror or error}; nothing was written.") from error


def _check_space(final: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if needed_bytes > free:
        raise UsageError(f"{final}: needs {needed_bytes:,} bytes, the disk has {free:,} free; nothing was written.")


def _failed(final: Path, error: OSError) -> UsageError:
    return UsageError(f"{final}: writing failed: {error.strerror or error}; nothing was kept.")


def _publish(temporary: Path, final: Path) -> None:
    """Rename the finished temporary folder to its final name."""
    temporary.chmod(0o755)
    sync_path(temporary)
    temporary.rename(final)
    sync_path(final.parent)


def _sync_all(folder: Path) -> None:
    """Wait until all files and folders below `folder` are on the disk."""
    for path in folder.rglob("*"):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocated(folder: Path) -> int:
    """Return the disk space in bytes that the folder's files occupy."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _has_entries(journal: Path) -> bool:
    """Return whether the journal names a finished tensor; its first line is only the key."""
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1
