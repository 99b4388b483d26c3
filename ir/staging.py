"""Output folders appear whole or not at all: written to a temporary sibling and renamed when complete.

Long writes use a sibling of a fixed name, which an interruption leaves: the same command then goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from passopt.ir.errors import UsageError

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
        _publish(temporary, final)
    except OSError as error:
        raise _failed(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def resumable_directory(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Like `staged_directory`, but what the journal in it calls finished outlives an interruption or a crash.

    Errors remove it: a changed source makes it worthless, and a full disk wants its space back. Raises UsageError also
    if another process writes the same output.
    """
    final = final.absolute()
    _refuse_existing(final)
    temporary = final.with_name(f".{final.name}.partial")
    with _errors_of(final):
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(lock, temporary, final)
        try:
            _check_space(final, needed_bytes - _allocated(temporary))
            yield temporary
            (temporary / JOURNAL_NAME).unlink(missing_ok=True)
            _publish(temporary, final)
        except KeyboardInterrupt as error:
            if _has_entries(temporary / JOURNAL_NAME):
                raise KeyboardInterrupt(
                    f"interrupted; what is finished is kept in {temporary}: run the same command again to go on, or "
                    f"remove that folder"
                ) from error
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _failed(final, error) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, temporary: Path, final: Path) -> None:
    """Only one process may write an output; the lock goes with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{final}: another passopt is writing it, in {temporary}. Wait for it, or stop it.") from error
    _refuse_existing(final)  # the other may have finished between our look and our lock
    if not temporary.exists():
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
    """Give the folder its name, once all that is in it is on the disk."""
    temporary.chmod(0o755)
    for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        _sync(folder)
    temporary.rename(final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
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
