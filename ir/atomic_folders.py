"""Output folders appear whole or not at all: written to a temporary sibling and renamed when complete.

Long writes use a sibling of a fixed name, which an interruption leaves: the same command then goes on from there.
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

#: In the temporary folder of a long write: what of it is finished (see ir.streaming.journal).
JOURNAL_NAME = "journal.jsonl"


@contextlib.contextmanager
def staged_directory(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and vanishes if it does not, Ctrl-C included.

    Raises UsageError if `final` exists or the disk has less than `needed_bytes` free.
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
    """Like `staged_directory`, but what the journal in it calls finished outlives an interruption or a crash.

    A model that is wrong makes it worthless, and a full disk wants its space back: then it is removed. Raises
    UsageError also if another process writes the same output.
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


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove all files that an interrupted run of another output left there; names are relative to the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif str(path.relative_to(folder)) not in names:
            path.unlink()


def _given_up(temporary: Path, final: Path, error: BaseException) -> BaseException:
    """Keep what is finished, or remove it; the error that says so."""
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
    """Only one process may write an output; the lock goes with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{final}: another passopt is writing it, in {temporary}. Wait for it, or stop it.") from error
    except OSError:
        return  # a file system without locks: two programs at once are then the user's own affair
    _refuse_existing(final)  # the other may have finished between our look and our lock
    if not temporary.exists() or not os.path.samestat(os.fstat(descriptor), temporary.stat()):
        raise UsageError(f"{final}: another passopt has just given it up. Run the same command again.")


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise UsageError(f"{final}: output exists. Name another with -o, or remove it first; nothing was written.")


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
    """Give the folder its name."""
    temporary.chmod(0o755)
    sync_path(temporary)
    temporary.rename(final)
    sync_path(final.parent)


def _sync_all(folder: Path) -> None:
    """Wait until all files and folders below are on the disk."""
    for path in folder.rglob("*"):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until a folder's names, or a file's bytes, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocated(folder: Path) -> int:
    """Bytes of the disk that the folder's files hold."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _has_entries(journal: Path) -> bool:
    """Whether it names a finished tensor: its first line does not."""
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1
