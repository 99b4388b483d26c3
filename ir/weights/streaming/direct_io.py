"""Read and write files past the page cache (O_DIRECT) where that helps, and through the page cache elsewhere.

O_DIRECT moves whole pages between page-aligned memory and page-aligned places in a file, as fast as the disk allows and
without pushing anything else out of memory. Tensors are aligned only to 64 bytes. A page that two of them share is
always written through the cache, so that neither of the two can undo what the other wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import threading
from pathlib import Path

from passopt.ir.errors import ModelError
from passopt.ir.weights.source_file import SourceFile
from passopt.ir.weights.sources import check_unchanged

#: The size in bytes of a page, the unit of O_DIRECT transfers and of the page cache.
PAGE = max(4096, mmap.PAGESIZE)
#: Files smaller than this many bytes go through the page cache, since they often are there already.
DIRECT_FROM = 256 << 20
#: The errors of opening or transferring on a file system without O_DIRECT (tmpfs and some network file systems).
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}


def page_up(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class Arena:
    """Page-aligned memory of a fixed size that is handed out from its start; `clear` makes all of it free again."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(page_up(nbytes), PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # Huge pages leave fewer pages to pin per transfer; some kernels have none.
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0

    def take(self, nbytes: int) -> memoryview:
        """Return the next `nbytes` bytes of the arena, starting at a page."""
        start = self._used
        self._used += page_up(nbytes)
        assert self._used <= len(self._memory), f"arena of {len(self._memory)} bytes, {self._used} taken"
        return memoryview(self._memory)[start : start + nbytes]

    def clear(self) -> None:
        """Make all memory free again; views that were handed out must not be used any more."""
        self._used = 0


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Several pieces of a file: `count` pieces of `nbytes`, the first at byte `offset`, one every `stride` bytes."""

    offset: int
    count: int
    stride: int
    nbytes: int


class SourceReader:
    """Reads ranges of source files for all threads; when a file is opened, its identity is checked."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self._files: dict[tuple[SourceFile, bool], tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, file: SourceFile, name: str, offset: int, into: memoryview, nbytes: int) -> int:
        """Read `nbytes` from `offset` on, and return where in `into` they begin, since whole pages are read.

        Args:
            file: The file, with the identity that it must have.
            name: The tensor's name, for error messages.
            offset: The first byte in the file.
            into: Page-aligned memory, at least two pages longer than `nbytes`.
            nbytes: The number of bytes.

        Raises:
            ModelError: If the file has changed, cannot be read or ends too early.
        """
        descriptor, direct = self._opened(file, cached=False)
        start = offset // PAGE * PAGE
        stop = min(page_up(offset + nbytes), page_up(file.size))
        done = start
        while done < offset + nbytes:
            try:
                count = os.preadv(descriptor, [into[done - start : stop - start]], done)
            except OSError as error:
                if direct and error.errno in _REFUSED:
                    descriptor, direct = self._opened(file, cached=True)
                    continue
                raise _unreadable(file, name, done, error) from error
            if not count:
                raise _too_short(file, name, done)
            done += count
            if direct and done % PAGE and done < offset + nbytes:
                descriptor, direct = self._opened(file, cached=True)  # A direct transfer must begin at a page.
        self._count(nbytes)
        return offset - start

    def read_pieces(self, file: SourceFile, name: str, pieces: Pieces, into: memoryview) -> None:
        """Read all pieces, one behind the other, to the start of `into`, through the page cache because they are small.

        Raises:
            ModelError: If the file has changed, cannot be read or ends too early.
        """
        descriptor, _ = self._opened(file, cached=True)
        for index in range(pieces.count):
            start, at = pieces.offset + index * pieces.stride, index * pieces.nbytes
            done = 0
            while done < pieces.nbytes:
                try:
                    count = os.preadv(descriptor, [into[at + done : at + pieces.nbytes]], start + done)
                except OSError as error:
                    raise _unreadable(file, name, start + done, error) from error
                if not count:
                    raise _too_short(file, name, start + done)
                done += count
        self._count(pieces.count * pieces.nbytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.read_bytes += nbytes

    def _opened(self, file: SourceFile, *, cached: bool) -> tuple[int, bool]:
        """Return a descriptor and whether it bypasses the page cache; with `cached` it never does."""
        with self._lock:
            if (file, cached) not in self._files:
                check_unchanged(file)
                try:
                    if cached:
                        self._files[file, cached] = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC), False
                    else:
                        self._files[file, cached] = _open(file.path, os.O_RDONLY | os.O_CLOEXEC, file.size)
                except OSError as error:
                    raise ModelError(f"{file.path}: cannot be opened: {error.strerror}") from error
            return self._files[file, cached]


def _unreadable(file: SourceFile, name: str, at: int, error: OSError) -> ModelError:
    return ModelError(f"{file.path}: cannot be read at byte {at}, in tensor {name!r}: {error.strerror}")


def _too_short(file: SourceFile, name: str, at: int) -> ModelError:
    return ModelError(f"{file.path}: ends at byte {at}, inside tensor {name!r}")


def _open(path: str | Path, flags: int, nbytes: int) -> tuple[int, bool]:
    """Open a file, and return the descriptor and whether it bypasses the page cache."""
    if nbytes >= DIRECT_FROM:
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_DIRECT), True
    return os.open(path, flags), False


class OutputFile:
    """A file of known size that any thread may write at any place."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._buffered = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._direct: int | None = None
        try:
            self._reserve()
            descriptor, direct = _open(path, os.O_RDWR | os.O_CLOEXEC, nbytes)
        except OSError:
            os.close(self._buffered)
            raise
        if direct:
            self._direct = descriptor
        else:
            os.close(descriptor)

    def _reserve(self) -> None:
        """Reserve the disk space now: a disk that fills up later would cost all the work done until then."""
        os.ftruncate(self._buffered, self.nbytes)
        if self.nbytes >= DIRECT_FROM:
            try:
                os.posix_fallocate(self._buffered, 0, self.nbytes)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise

    def close(self) -> None:
        """Close the file."""
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def sync(self) -> None:
        """Wait until everything that was written is on the disk."""
        os.fdatasync(self._buffered)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at byte `offset`, past the page cache if `offset` and length are multiples of a page."""
        direct = self._direct is not None and offset % PAGE == 0 and len(data) % PAGE == 0
        done = 0
        while done < len(data):
            descriptor = self._direct if direct and self._direct is not None else self._buffered
            try:
                done += os.pwritev(descriptor, [data[done:]], offset + done)
            except OSError as error:
                if not direct or error.errno not in _REFUSED:
                    raise
                direct = False
            direct = direct and done % PAGE == 0
