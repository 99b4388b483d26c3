"""Output folders appear whole or not at all: written to a temporary sibling and renamed when complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from passopt.ir.errors import UsageError


@contextlib.contextmanager
def staged_directory(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `final` if the block succeeds and vanishes if it does not, Ctrl-C included.

    Raises UsageError if `final` exists or the disk has less than `needed_bytes` free.
    """
    final = final.absolute()
    if final.exists():
        raise UsageError(f"{final}: output exists. Name another with -o, or remove it first; nothing was written.")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    except OSError as error:
        raise UsageError(f"{final}: cannot be made: {error.strerror or error}; nothing was written.") from error
    try:
        if needed_bytes > free:
            raise UsageError(f"{final}: needs {needed_bytes:,} bytes, the disk has {free:,} free; nothing was written.")
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(final)
    except OSError as error:
        raise UsageError(f"{final}: writing failed: {error.strerror or error}; nothing was kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
