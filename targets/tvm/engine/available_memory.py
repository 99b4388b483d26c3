"""How much memory a process may still take: asking for more swaps, or ends it without a word instead of an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from passopt.ir.errors import UsageError
from passopt.targets.tvm.compiled_folder import CacheLayout

MEMINFO = Path("/proc/meminfo")
#: Of a control group (version 2), as a container with a namespace of its own sees it: `memory.max` in bytes or `max`,
#: `memory.current`, `memory.stat`.
GROUP = Path("/sys/fs/cgroup")


def check_copy(folder: Path, nbytes: int) -> None:
    """Raises UsageError if a copy of the weights of `folder`, `nbytes` in all, does not fit the available memory."""
    available = available_memory()
    if available is not None and nbytes > available:
        raise UsageError(
            f"{folder}: no memory for a copy of {nbytes:,} bytes, {available:,} are available; leave out --copy-weights"
        )


def check_caches(caches: Sequence[CacheLayout], batch: int, columns: int, *, copied: int = 0, held: int = 0) -> None:
    """Raises UsageError if caches (of all ranks) for `batch` sequences of `columns` do not fit the available memory.

    A copy of the weights of `copied` bytes has to fit beside them; memory of `held` bytes is given back for them. The
    system would grant it all and end the process later.
    """
    available = available_memory()
    nbytes = sum(cache.nbytes(batch, columns) for cache in caches)
    if available is None or nbytes + copied <= available + held:
        return
    beside = f" beside a copy of the weights of {copied:,} bytes" if copied else ""
    raise no_room(nbytes, batch, columns, f"{max(0, available + held - copied):,} are available{beside}")


def no_room(nbytes: int, batch: int, columns: int, why: str) -> UsageError:
    return UsageError(
        f"no memory for caches of {nbytes:,} bytes ({batch} sequences of {columns} columns): {why}. "
        f"Ask for a smaller capacity, fewer new tokens or fewer prompts at once."
    )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, of the machine or of a container's limit; None if neither is known."""
    return min((each for each in (_of_machine(), _of_group()) if each is not None), default=None)


def _of_machine() -> int | None:
    return _field(MEMINFO, "MemAvailable:", 1024)


def _of_group() -> int | None:
    """The limit less what is in use; the caches of files and of the kernel count as free, since they give way."""
    try:
        limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return None
    cache = sum(
        _field(GROUP / "memory.stat", name, 1) or 0 for name in ("active_file", "inactive_file", "slab_reclaimable")
    )
    return max(0, limit - used + cache)


def _field(path: Path, name: str, unit: int) -> int | None:
    """The number behind `name` in a file of lines `name number …`."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return next((unit * int(row[1]) for row in rows if row[:1] == [name]), None)
    except (OSError, ValueError, IndexError):
        return None
