"""Run all ranks of a compiled model on this machine, one process per rank, behind a single engine.

The processes of the ranks end when this process ends, however it ends. The files through which they share memory are
deleted as soon as all ranks have loaded; the memory itself stays mapped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import platform
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError, PassoptError, UsageError
from passopt.targets.tvm.compiled_folder import Library, RankFolders, read_library
from passopt.targets.tvm.engine.available_memory import check_caches, check_copy
from passopt.targets.tvm.engine.cores import count_cores
from passopt.targets.tvm.engine.engine import Ids, Logits, checked_capacity
from passopt.targets.tvm.engine.rank_process import Job, serve
from passopt.targets.tvm.engine.shared_memory_collectives import Counters, create_room
from passopt.targets.tvm.machines import X86

#: The seconds that a rank may lag behind the others, or that all ranks may go without progress.
TIMEOUT = 60.0
#: The timeout for loading, in seconds. It is long, because ranks load at the speed of the disk and hash all weights
#: that were never hashed before.
_LOADING = 3600.0
_MEMORY = Path("/dev/shm")
#: The seconds between two looks at the ranks. They notice by themselves if one of them lags behind, so all of them are
#: given two such looks more than that before they are said to hang.
_POLL = 0.2
#: Larger messages than this may fill a pipe, and then wait for the rank to read, which a stopped one never does.
_PIPE_BYTES = 1 << 15
_Connection = multiprocessing.connection.Connection


class RankEngine:
    """A model whose ranks run together, used like the `Engine` of a model without ranks.

    It is a context manager; `close` ends the processes. After a rank was lost, every call raises ModelError.
    """

    def __init__(self, ranks: Sequence[Library], group: _Processes) -> None:
        """Do not call this: use `RankEngine.load`."""
        self.library = ranks[0]
        self._ranks = tuple(ranks)
        self._group = group
        self.past = 0
        self.batch = 0
        self.capacity = 0
        self._written = 0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        batch: int = 1,
        capacity: int | None = None,
        threads: int | None = None,
        verify_weights: bool = False,
        copy_weights: bool = False,
        progress: Callable[[int], None] | None = None,
        timeout: float = TIMEOUT,
    ) -> RankEngine:
        """Start a process for each rank of `folder`, load all ranks and make room for `batch` sequences.

        Args:
            folder: The outer folder, which `passopt compile` wrote from a folder of ranks.
            batch: The number of sequences that advance together.
            capacity: The number of columns (tokens) that the caches hold; by default the model's positions.
            threads: The number of threads of all ranks together; by default the number of cores.
            verify_weights: If true, hash all weights, even if the files were verified before.
            copy_weights: If true, copy the weights into memory of the processes instead of mapping the files.
            progress: Called with the bytes of weights that all ranks have read since its last call.
            timeout: The number of seconds that a rank may keep the others waiting.

        Raises:
            ModelError: If the folders do not belong together, or if a rank fails.
            UsageError: If this machine is not x86-64, has too little memory, or an argument is out of range.
        """
        if platform.machine() not in X86:
            raise UsageError(f"ranks exchange data through memory in the order of x86; this is {platform.machine()}")
        found = read_library(folder)
        if not isinstance(found, RankFolders):
            raise ModelError(f"{folder}: holds one library, no ranks")
        paths = [folder / name for name in found.ranks]
        libraries = _libraries(found, paths)
        threads = count_cores() if threads is None else threads
        if threads < 1:
            raise UsageError(f"{threads} threads: at least one is needed")
        capacity = checked_capacity(libraries[0], batch, capacity)
        copied = sum(library.weights.nbytes for library in libraries) if copy_weights else 0
        check_copy(folder, copied)
        check_caches([library.cache for library in libraries], batch, capacity, copied=copied)
        share = max(1, threads // found.degree)
        jobs = [
            Job(path, rank, found.degree, share, verify_weights, copy_weights, timeout)
            for rank, path in enumerate(paths)
        ]
        engine = cls(libraries, _Processes(folder, jobs, timeout, progress))
        try:
            engine.allocate(batch, capacity)
        except BaseException:
            engine.close()
            raise
        return engine

    def __enter__(self) -> RankEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of all ranks."""
        self._group.close()

    @property
    def vocab(self) -> int:
        """Return the size of the vocabulary."""
        return self.library.logits.vocab

    @property
    def max_positions(self) -> int | None:
        """Return the number of positions that the model has; None if it sets no bound."""
        return self.library.max_positions

    @property
    def takes_positions(self) -> bool:
        """Return whether the model reads `positions`; otherwise a column's number is its position."""
        return "position_ids" in self.library.inputs

    @property
    def cache_bytes(self) -> int:
        """Return the bytes that the caches of all ranks take when they hold `capacity` columns."""
        return sum(each.cache.nbytes(self.batch, self.capacity) for each in self._ranks)

    def allocate(self, batch: int, capacity: int | None = None) -> None:
        """Forget all columns and make room for `batch` sequences of `capacity` columns.

        `capacity` defaults to the model's positions. Raises UsageError if it does not fit the available memory or the
        model sets no bound, and ModelError if a rank is lost.
        """
        wanted = checked_capacity(self.library, batch, capacity)
        caches = [each.cache for each in self._ranks]
        held = sum(cache.nbytes(self.batch, self._written) for cache in caches)
        check_caches(caches, batch, wanted, held=held)
        self.batch, self.capacity = self._group.call("allocate", batch, capacity)
        self.past = self._written = 0

    def reset(self) -> None:
        """Forget all columns but keep the memory of the caches."""
        self.truncate(0)

    def truncate(self, columns: int) -> None:
        """Forget all but the first `columns` columns; raise UsageError if there are fewer."""
        self._group.call("truncate", columns)
        self.past = columns

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike, positions: npt.ArrayLike | None = None) -> Logits:
        """Append columns and return their logits, as `Engine.forward` does; raise ModelError if a rank is lost."""
        columns: Ids = np.asarray(ids)
        logits: Logits = self._group.call("forward", columns, np.asarray(mask), positions)
        self.past += columns.shape[1]
        self._written = max(self._written, self.past)
        return logits


def _libraries(outer: RankFolders, paths: Sequence[Path]) -> list[Library]:
    """Read the libraries of all ranks; raise ModelError unless they are from one run and in the order of ranks."""
    found: list[Library] = []
    for rank, path in enumerate(paths):
        library = read_library(path)
        if isinstance(library, RankFolders):
            raise ModelError(f"{path}: holds ranks itself, expected the library of rank {rank}")
        if (library.rank, library.degree) != (rank, len(paths)):
            raise ModelError(f"{path}: is rank {library.rank} of {library.degree}, expected {rank} of {len(paths)}")
        found.append(library)
    for path, library, root in zip(paths, found, outer.roots, strict=True):
        for name in ("passes", "mcpu", "inputs", "parameters", "library", "cache", "logits"):
            if getattr(library, name) != getattr(found[0], name):
                raise ModelError(f"{path}: has other {name} than {paths[0].name}; they are of two runs")
        if library.weights.root != root:
            raise ModelError(f"{path}: has other weights than were compiled with the other ranks; they are of two runs")
    return found


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the program that this process runs from the processes that it starts.

    A spawned process imports the main module of its parent, to find what was defined there. Ranks need nothing of it,
    and a script without `if __name__ == "__main__"` would run again in every rank.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class _Processes:
    """The processes of all ranks, which are called all at once."""

    def __init__(
        self, folder: Path, jobs: Sequence[Job], timeout: float, progress: Callable[[int], None] | None
    ) -> None:
        self._folder = folder
        self._timeout = timeout
        self._lost: str | None = None
        context = multiprocessing.get_context("spawn")
        self._pipes: list[_Connection] = []
        self._processes: list[Any] = []
        with tempfile.TemporaryDirectory(prefix="passopt-ranks-", dir=_MEMORY if _MEMORY.is_dir() else None) as room:
            create_room(Path(room), len(jobs))
            self._counters = Counters(Path(room), len(jobs))
            for job in jobs:
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve, args=(theirs, job, Path(room)), name=f"rank{job.rank}", daemon=True
                )
                with _no_main_module():
                    process.start()
                theirs.close()  # Only the process itself holds its end now, so the pipe ends when the process does.
                self._pipes.append(ours)
                self._processes.append(process)
            self._finalizer = weakref.finalize(self, _end, self._pipes, self._processes, self._counters)
            self._collect("load", _LOADING, progress)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of every rank's engine and return the result of rank 0.

        An error of a rank is raised here. If all ranks raise UsageError, they remain usable; after any other error
        they are ended.
        """
        if self._lost is not None:
            raise ModelError(f"{self._about_folder(self._lost)}; load the model again")
        message = bytes(multiprocessing.reduction.ForkingPickler.dumps((method, arguments)))
        if len(message) <= _PIPE_BYTES:
            self._send(message)
        else:  # The thread ends when the message is read, or when the rank that does not read it is killed.
            threading.Thread(target=self._send, args=(message,), daemon=True).start()
        return self._collect(method, self._timeout)

    def _send(self, message: bytes) -> None:
        """Send a message to all ranks; `_collect` finds out if one of them has ended."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(message)

    def _about_folder(self, text: str) -> str:
        """Return a message that begins with the folder, once."""
        return text if text.startswith(str(self._folder)) else f"{self._folder}: {text}"

    def close(self) -> None:
        """End the processes of all ranks; later calls raise ModelError."""
        self._lost = self._lost or "its engine was closed"
        self._finalizer()

    def _collect(self, method: str, timeout: float, progress: Callable[[int], None] | None = None) -> Any:
        replies: dict[int, tuple[PassoptError | None, Any]] = {}
        try:
            self._receive(replies, method, timeout, progress)
        except BaseException as error:
            self._lose(str(error) or "it was interrupted", replies)
            raise
        refused = [error for error, _ in replies.values() if error is not None]
        unchanged = method != "load" and len(refused) == len(self._pipes)
        if refused and not (unchanged and isinstance(refused[0], UsageError)):
            # Some ranks may have loaded nothing, be a step ahead, or be in the middle of a step. They no longer agree,
            # so they cannot be used any more.
            self._lose(str(refused[0]), replies)
        if refused:
            raise refused[0]
        return replies[0][1]

    def _lose(self, why: str, replied: Collection[int]) -> None:
        """End all ranks; those that did not reply are killed, since they may be stopped and never end by themselves."""
        self._lost = why
        for rank, process in enumerate(self._processes):
            if rank not in replied and process.is_alive():
                process.kill()
        self._finalizer()

    def _receive(
        self,
        replies: dict[int, tuple[PassoptError | None, Any]],
        method: str,
        timeout: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Wait for the replies of all ranks and add a pair (error, result) for each of them, in the order they come.

        Once a rank fails, the others cannot go on without it, and only those that fail as well at once are waited for.
        Raises ModelError if a rank ends, or if no rank makes progress for `timeout` seconds.
        """
        moved, seen = time.monotonic(), self._counters.written()
        read = 0
        while len(replies) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            for pipe in multiprocessing.connection.wait(waiting, _POLL):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                with contextlib.suppress(EOFError, OSError):
                    replies[rank] = self._pipes[rank].recv()
                if rank not in replies:
                    text = f"{self._ended(rank)} during {method}; the other ranks were ended"
                    raise ModelError(self._about_folder(text))
                moved = time.monotonic()
            if progress and (reached := self._counters.bytes_read()) > read:
                progress(reached - read)
                read = reached
            now = self._counters.written()
            moved, seen = (time.monotonic() if now != seen else moved), now
            failed = any(error is not None and not isinstance(error, UsageError) for error, _ in replies.values())
            if failed and time.monotonic() - moved > _POLL:
                return
            if time.monotonic() - moved > timeout + 2 * _POLL:
                late = [rank for rank in range(len(self._pipes)) if rank not in replies]
                names = ", ".join(map(str, late))
                text = f"rank {names} gave no sign for {timeout:g} s during {method}; it hangs"
                raise ModelError(self._about_folder(text))

    def _ended(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(1.0)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return f"rank {rank} of {len(self._processes)} {how}"


def _end(pipes: Sequence[_Connection], processes: Sequence[Any], counters: Counters) -> None:
    """Tell all ranks to stop waiting and end their processes; those that do not end within a second are killed."""
    counters.give_up()
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(1.0 if process.is_alive() else None)
        if process.is_alive():
            process.kill()
            process.join()
