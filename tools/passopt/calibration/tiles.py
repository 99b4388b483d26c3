"""Run tasks on tiles of matrices in threads, so that the number of threads changes no bit of a result.

Each task is one product of tiles whose borders are fixed, computed by one thread of the linear algebra library. How
many run at once decides nothing but the time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

Task: TypeAlias = Callable[[], object]

#: The rows and columns of a tile.
TILE = 512


class TileRunner:
    """Runs tasks in a number of threads, while the linear algebra library has one; use it as a context manager."""

    def __init__(self, threads: int = 1) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TileRunner:
        import threadpoolctl

        self._stack.enter_context(threadpoolctl.threadpool_limits(1, user_api="blas"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._stack.close()

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks, in any order, and return when they are done; raise what a task raises."""
        if self._pool is None:
            for task in tasks:
                task()
            return
        for done in [self._pool.submit(task) for task in tasks]:
            done.result()


def tiles(length: int, size: int = TILE) -> list[slice]:
    """Return the consecutive ranges that tiles cover; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def below(ranges: list[slice]) -> Iterator[tuple[slice, slice]]:
    """Yield pairs of ranges (rows, columns) of the upper triangle, the diagonal included."""
    for index, rows in enumerate(ranges):
        for columns in ranges[index:]:
            yield rows, columns
