"""Find out how much memory this process may still take, and refuse in time what does not fit.

A process that takes more is not told by an error: the system swaps, or kills it without a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from passopt.ir.errors import UsageError
from passopt.targets.tvm.compiled_folder import CacheLayout

MEMINFO = Path("/proc/meminfo")
#: The files of a control group (version 2) as a container with its own namespace sees them. Used here are `memory.max`
#: (bytes, or `max` for no limit), `memory.current` (bytes) and `memory.stat`.
GROUP = Path("/sys/fs/cgroup")


def check_copy(folder: Path, nbytes: int) -> None:
    """Raise UsageError if a copy of the weights of `folder`, of `nbytes` bytes, does not fit the available memory."""
    available = available_memory()
    if available is not None and nbytes > available:
        raise UsageError(
            f"{folder}: no memory for a copy of {nbytes:,} bytes, {available:,} are available; leave out `copy_weights`"
        )


def check_caches(caches: Sequence[CacheLayout], batch: int, columns: int, *, copied: int = 0, held: int = 0) -> None:
    """Raise UsageError if KV caches do not fit the available memory.

    Without this check the system would grant the memory, and kill the process later when it is written to.

    Args:
        caches: The cache layout of each rank.
        batch: The number of sequences.
        columns: The number of columns (tokens) per sequence.
        copied: The bytes of a copy of the weights that has to fit too.
        held: The bytes of older caches that are freed before, so that they count as available.
    """
    available = available_memory()
    nbytes = sum(cache.nbytes(batch, columns) for cache in caches)
    if available is None or nbytes + copied <= available + held:
        return
    beside = f" beside a copy of the weights of {copied:,} bytes" if copied else ""
    raise no_room(nbytes, batch, columns, f"{max(0, available + held - copied):,} are available{beside}")


def no_room(nbytes: int, batch: int, columns: int, why: str) -> UsageError:
    """Return the error that says that caches of `nbytes` bytes do not fit; `why` says how much is available."""
    return UsageError(
        f"no memory for caches of {nbytes:,} bytes ({batch} sequences of {columns} columns): {why}. "
        f"Ask for a smaller capacity, fewer new tokens or fewer prompts at once."
    )


def available_memory() -> int | None:
    """Return the bytes that this process can take without swapping, or None if that is not known.

    It is the smaller of what the machine has available and what the limit of a container leaves.
    """
    return min((each for each in (_of_machine(), _of_group()) if each is not None), default=None)


def _of_machine() -> int | None:
    return _field(MEMINFO, "MemAvailable:", 1024)


def _of_group() -> int | None:
    """Return the container's limit minus the memory in use, in bytes; None if there is no limit.

    Cached files and the kernel's reclaimable memory count as free, since they make room when memory is needed.
    """
    try:
        limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return None
    cache = sum(
        _field(GROUP / "memory.stat", name, 1) or 0 for name in ("active_file", "inactive_file", "slab_reclaimable")
    )
    return max(0, limit - used + cache)


def _field(path: Path, name: str, unit: int) -> int | None:
    """Return the number after `name`, times `unit`, from a file of lines `name number …`; None if it is not there."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return next((unit * int(row[1]) for row in rows if row[:1] == [name]), None)
    except (OSError, ValueError, IndexError):
        return None
