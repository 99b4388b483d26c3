"""Write all weights of an output in one pass over their sources, with a few threads, in bounded memory.

A worker takes a group (everything that is made from one base) and reads, computes, hashes and writes it chunk by chunk;
while one worker waits for the disk, another computes. The output bytes do not depend on the number of workers, on the
memory, on chunk sizes or on interruptions.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from passopt.ir.atomic_folders import sync_path
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.sources import check_unchanged
from passopt.ir.weights.streaming.budget import (
    DEFAULT_MEMORY,
    DEFAULT_STREAM,
    Budget,
    StreamOptions,
    budget_for,
    peak_bytes,
    sizes_of,
)
from passopt.ir.weights.streaming.chunk_values import ChunkValues
from passopt.ir.weights.streaming.direct_io import Arena, OutputFile, SourceReader
from passopt.ir.weights.streaming.journal import Journal
from passopt.ir.weights.streaming.output_groups import Group, WeightFile, schedule
from passopt.ir.weights.streaming.output_stream import OutputStream
from passopt.ir.weights.streaming.row_kernels import RowKernels, kernels_for
from passopt.ir.weights.streaming.row_spans import matrix_shape

Progress = Callable[[int], None]

#: Increase this number when the same expressions start to give other bytes, so that no resumed output mixes both.
_ARITHMETIC = 1
#: Below this many bytes, threads cost more than they gain.
_THREADS_FROM = 8 << 20
#: The options for a process that holds other things too: a fixed, small memory per worker.
_BESIDE_OTHERS = StreamOptions(arena_bytes=16 << 20)
#: The smallest chunk, in bytes, that the evaluator of boxes gets.
_LEAST_BOXES = 1 << 20
#: Finished tensors are synced and recorded after this many seconds, which is about what an interruption can cost.
_COMMIT_EVERY = 4.0


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """The result of a write in bytes and seconds; `resumed` is the number of bytes that an earlier run had written.

    `digests` are, per file, the blake3 digests of each tensor's bytes. `overflows` count, per source tensor, the finite
    values that fp16 made infinite. `memory` is the allowed number of bytes, `peak` the most that the process ever held.
    """

    digests: tuple[Mapping[str, str], ...]
    overflows: Mapping[str, int]
    read: int
    written: int
    resumed: int
    seconds: float
    workers: int
    memory: int
    peak: int
    kernels: str

    def to_json(self) -> dict[str, object]:
        """Return all fields but the digests, which are in the manifest."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "digests"}

    def to_text(self) -> str:
        """Return one line for the user."""
        rate = (self.read + self.written) / max(self.seconds, 1e-9) / 1e9
        resumed = f", {self.resumed / 1e9:.2f} GB of an earlier run kept" if self.resumed else ""
        return (
            f"read {self.read / 1e9:.2f} GB, wrote {self.written / 1e9:.2f} GB in {self.seconds:.1f} s "
            f"({rate:.2f} GB/s){resumed}; {self.workers} workers, {self.kernels} kernels, peak memory "
            f"{self.peak / 2**30:.2f} of {self.memory / 2**30:.2f} GiB"
        )


def write_safetensors(
    path: Path, weights: Mapping[str, ex.Expression], rank: int = 0, progress: Progress | None = None
) -> dict[str, str]:
    """Evaluate weights, write them to one file, and return the blake3 digest of each tensor's bytes.

    This is for programs that hold more than weights: its buffers are small, whatever else is in memory.

    Args:
        path: The file to write.
        weights: The expressions by tensor name.
        rank: The rank whose shards are written.
        progress: Called as in `write_weight_files`.

    Raises:
        ModelError: If a source cannot be read, has changed, or has no scale.
        OSError: If the disk fails.
    """
    return dict(write_weight_files([WeightFile(path, weights, rank)], _BESIDE_OTHERS, progress=progress).digests[0])


def write_weight_files(
    files: Sequence[WeightFile],
    options: StreamOptions = DEFAULT_STREAM,
    *,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> StreamReport:
    """Write all files, in folders that exist; each source byte is read once for all of them.

    Args:
        files: The files to write.
        options: The limits of memory and threads.
        progress: Called with the bytes written since its last call, one call at a time. If it has an attribute `skip`,
            that is called with the bytes of tensors which an earlier run wrote.
        journal: The file that records finished tensors. With it, an interrupted run is resumed: finished tensors are
            not written again, others are written from their beginning.

    Returns:
        Digests, overflows, and what the write took.

    Raises:
        ModelError: If a source cannot be read, has changed, or has no scale.
        UsageError: If the allowed memory is too little.
        OSError: If the disk fails.
    """
    start = time.monotonic()
    groups = schedule(files)
    kernels = kernels_for(sum(group.read_bytes for group in groups))
    budget = budget_for(groups, options, kernels)
    if sum(group.read_bytes + group.written_bytes for group in groups) < _THREADS_FROM:
        budget = dataclasses.replace(budget, workers=1)
    with contextlib.ExitStack() as stack:
        book = None
        if journal is not None:
            book = Journal(journal, _key(files), {file.path: file.layout.nbytes for file in files})
            stack.callback(book.close)
        targets = []
        for file in files:
            targets.append(OutputFile(file.path, file.layout.nbytes))
            stack.callback(targets[-1].close)
            targets[-1].write(0, memoryview(file.layout.header))
        for folder in {path.parent for path in (journal, *(file.path for file in files)) if path is not None}:
            sync_path(folder)  # Files that the journal will name must be found under their names after a crash.
        run = _Run(files, targets, budget, kernels, progress, book)
        left = [group for group in groups if not run.is_finished(group)]
        run.write(left)
        for target in targets:
            target.sync()
        for source in {
            source.file for file in files for weight in file.weights.values() for source in weight.sources()
        }:
            check_unchanged(source)
    return StreamReport(
        digests=run.digests(),
        overflows=run.overflows,
        read=run.read_bytes,
        written=sum(group.written_bytes for group in left),
        resumed=sum(group.written_bytes for group in groups) - sum(group.written_bytes for group in left),
        seconds=time.monotonic() - start,
        workers=budget.workers,
        memory=options.memory or DEFAULT_MEMORY,
        peak=peak_bytes(),
        kernels=kernels.name,
    )


def _key(files: Sequence[WeightFile]) -> str:
    """Return a digest of all that decides the bytes: arithmetic, names, expressions, places of sources, and layout."""
    hasher = hashlib.blake2b(f"{_ARITHMETIC}\n".encode(), digest_size=16)
    for file in files:
        hasher.update(f"{file.path.parent.name}/{file.path.name} {file.rank}\n".encode())
        hasher.update(file.layout.header)
    for weights in {id(file.weights): file.weights for file in files}.values():
        for name, weight in weights.items():
            places = [(dataclasses.astuple(source.file), source.offset) for source in weight.sources()]
            hasher.update(f"{name} {weight.text()} {places}\n".encode())
    return hasher.hexdigest()


class _Stopped(Exception):
    """Raised in a worker to make it stop."""


class _Run:
    """The state of one write that its workers share."""

    def __init__(
        self,
        files: Sequence[WeightFile],
        targets: Sequence[OutputFile],
        budget: Budget,
        kernels: RowKernels,
        progress: Progress | None,
        journal: Journal | None,
    ) -> None:
        self.overflows: dict[str, int] = {}
        self._files = files
        self._targets = targets
        self._budget = budget
        self._kernels = kernels
        self._progress = progress
        self._journal = journal
        self._found: dict[tuple[int, str], str] = {}
        self._pending: list[tuple[str, str, Mapping[str, int]]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._local = threading.local()
        self._reader = SourceReader()
        self._boxes_read = 0
        self._committed = 0.0

    def is_finished(self, group: Group) -> bool:
        """Return whether an earlier run wrote all outputs of the group; if so, record them as done."""
        if self._journal is None:
            return False
        names = [_label(output.file, output.name) for output in group.outputs]
        if not all(name in self._journal.finished for name in names):
            return False
        for output, name in zip(group.outputs, names, strict=True):
            self._found[output.file, output.name] = self._journal.finished[name]
            self._count(self._journal.overflows[name])
            if self._progress is not None:
                getattr(self._progress, "skip", self._progress)(output.nbytes)
        return True

    @property
    def read_bytes(self) -> int:
        """Return the bytes that were actually read, which may differ from what the outputs needed."""
        return self._reader.read_bytes + self._boxes_read

    def digests(self) -> tuple[Mapping[str, str], ...]:
        """Return the digests of the tensors per file, in the order of the file."""
        return tuple(
            {name: self._found[index, name] for name in file.layout.offsets} for index, file in enumerate(self._files)
        )

    def write(self, groups: Sequence[Group]) -> None:
        """Write `groups`; after an error or an interruption, record at least the tensors that are finished."""
        self._committed = time.monotonic()
        try:
            if self._budget.workers == 1:
                for group in groups:
                    self._write_group(group)
                    self._commit_if_due()
            else:
                self._write_in_threads(groups)
            self._commit()
        except BaseException:
            with contextlib.suppress(OSError):
                self._commit()
            raise
        finally:
            self._reader.close()

    def _write_in_threads(self, groups: Sequence[Group]) -> None:
        with concurrent.futures.ThreadPoolExecutor(self._budget.workers, "passopt-write") as pool:
            futures = [pool.submit(self._write_group, group) for group in groups]
            try:
                left = set(futures)
                while left:
                    done, left = concurrent.futures.wait(
                        left, timeout=min(0.5, _COMMIT_EVERY), return_when=concurrent.futures.FIRST_EXCEPTION
                    )
                    for future in done:
                        future.result()
                    self._commit_if_due()
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _commit_if_due(self) -> None:
        if time.monotonic() - self._committed > _COMMIT_EVERY:
            self._commit()
            self._committed = time.monotonic()

    def _commit(self) -> None:
        """Sync the finished tensors and record them in the journal."""
        if self._journal is None:
            return
        with self._lock:
            entries, self._pending = self._pending, []
        if not entries:
            return
        for target in self._targets:
            target.sync()
        for entry in entries:
            self._journal.add(*entry)
        self._journal.sync()

    def _write_group(self, group: Group) -> None:
        arena = self._arena()
        sizes = sizes_of(group, self._budget.arena_bytes, self._kernels)
        streams = [OutputStream(output, self._targets[output.file], arena, sizes.stage) for output in group.outputs]
        chunk_bytes = max(_LEAST_BOXES, self._budget.arena_bytes // 8)
        values = ChunkValues(group, self._reader, arena, self._kernels, sizes.rows, chunk_bytes)
        try:
            self._measure(group, values, sizes.rows)
            self._pass_by(group, values, streams, sizes.rows)
            digests = [stream.finish() for stream in streams]
        finally:
            values.close()
        self._finish(group, digests, values)

    def _pass_by(self, group: Group, values: ChunkValues, streams: Sequence[OutputStream], rows: int) -> None:
        """Feed all streams chunk by chunk, and report progress in proportion to the rows."""
        passing = []
        for stream in streams:
            if group.is_summary(stream.output):
                stream.feed(0, sys.maxsize, values)
            else:
                passing.append(stream)
        first, last = group.rows()
        left = group.written_bytes
        for start, stop in _chunks(group, first, last, rows):
            self._give_up_if_told()
            if any(stream.needs(start, stop) for stream in passing):
                values.load(start, stop)
                for stream in passing:
                    stream.feed(start, stop, values)
            share = min(left, group.written_bytes * (stop - max(start, first)) // (last - first))
            left -= share
            self._advance(share)
        self._advance(left)

    def _measure(self, group: Group, values: ChunkValues, rows: int) -> None:
        """If columns have scales, read the whole base once to measure them."""
        if group.measured:
            for start, stop in _chunks(group, 0, matrix_shape(group.base)[0], rows):
                self._give_up_if_told()
                values.load(start, stop)
                values.measure()

    def _give_up_if_told(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _finish(self, group: Group, digests: Sequence[str], values: ChunkValues) -> None:
        overflows: Mapping[str, int] = values.overflows
        self._count(overflows)
        with self._lock:
            self._boxes_read += values.read_bytes
            for output, digest in zip(group.outputs, digests, strict=True):
                self._found[output.file, output.name] = digest
                self._pending.append((_label(output.file, output.name), digest, overflows))
                overflows = {}  # The overflows of the group are recorded with its first tensor only.

    def _count(self, overflows: Mapping[str, int]) -> None:
        with self._lock:
            for name, count in overflows.items():
                self.overflows[name] = self.overflows.get(name, 0) + count

    def _advance(self, nbytes: int) -> None:
        if self._progress is not None and nbytes:
            with self._lock:
                self._progress(nbytes)

    def _arena(self) -> Arena:
        """Return the memory of this thread, with all of it free."""
        if not hasattr(self._local, "arena"):
            self._local.arena = Arena(self._budget.arena_bytes)
        arena: Arena = self._local.arena
        arena.clear()
        return arena


def _label(file: int, name: str) -> str:
    """Return the name of a tensor in the journal."""
    return f"{file}:{name}"


def _chunks(group: Group, first: int, last: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of up to `rows` rows of the base, from `first` to `last`; they begin where a grain does."""
    first = first // group.grain * group.grain
    for start in range(first, last, rows):
        yield start, min(start + rows, last)
