"""Measure the least time in which this machine can read and write a number of bytes, past the page cache.

    python tools/bench/weights/plain_copy.py THREADS WRITE_BYTES OUTPUT FILE...

This reads every FILE from end to end and writes WRITE_BYTES to OUTPUT at the same time, in whole pages, and computes
nothing. It prints the seconds that it took.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from pathlib import Path

PIECE = 8 << 20
PAGE = 4096


def copy_pieces(threads: int, write_bytes: int, output: Path, files: list[Path]) -> None:
    """Read all files and write `output`, with threads that take the next piece in turn.

    For each piece of `PIECE` bytes that a thread reads, it writes the same share of `write_bytes`.
    """
    sources = [(os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size) for path in files]
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    os.posix_fallocate(target, 0, write_bytes)
    pieces = [(source, offset) for source, size in sources for offset in range(0, size, PIECE)]
    share = write_bytes / len(pieces)
    waiting = iter(enumerate(pieces))
    lock = threading.Lock()
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    def work() -> None:
        buffer = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(buffer)
        while True:
            with lock:
                index, piece = next(waiting, (None, None))
            if index is None or piece is None:
                return
            if not os.preadv(piece[0], [view], piece[1]):
                raise OSError(f"nothing was read at byte {piece[1]}")
            start, stop = (int(share * at) // PAGE * PAGE for at in (index, index + 1))
            if stop > start and os.pwritev(target, [view[: stop - start]], start) != stop - start:
                raise OSError(f"not all was written at byte {start}")

    workers = [threading.Thread(target=guarded) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    os.ftruncate(target, write_bytes)
    os.fdatasync(target)


def main() -> None:
    """Copy as the command line says, and print the seconds."""
    threads, write_bytes, output, *files = sys.argv[1:]
    start = time.monotonic()
    copy_pieces(int(threads), int(write_bytes), Path(output), [Path(path) for path in files])
    print(f"{time.monotonic() - start:.3f}")


if __name__ == "__main__":
    main()
