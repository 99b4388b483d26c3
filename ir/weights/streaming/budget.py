"""Calculate how much memory a streamed write takes, and how many workers that allows."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Sequence

from passopt.ir.errors import UsageError
from passopt.ir.weights.streaming.chunk_values import READ_OF_HELD, row_bytes
from passopt.ir.weights.streaming.direct_io import PAGE
from passopt.ir.weights.streaming.output_groups import Group, is_held, is_turned
from passopt.ir.weights.streaming.output_stream import STAGE_BYTES, stream_bytes
from passopt.ir.weights.streaming.row_kernels import RowKernels
from passopt.ir.weights.streaming.row_spans import matrix_shape

DEFAULT_MEMORY = 1 << 30
#: The most memory in bytes that a worker gets: more makes nothing faster.
_ARENA_BYTES = 64 << 20
#: The same if columns are read: the wider a panel of columns, the longer are its contiguous pieces in the file.
_PANEL_BYTES = 256 << 20
#: Rows are read in pieces of up to this many bytes, as far as memory allows.
_READ_BYTES = 8 << 20
#: Bytes that are kept free for the interpreter, libraries and stacks, which may grow while weights are written.
_RESERVE = 160 << 20
#: There are more workers than CPU cores so that reading, computing and writing overlap; this many keep a disk busy.
_MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Limits of a write: `memory` in bytes for the whole process, `workers` (threads), `arena_bytes` for each worker.

    Without `memory`, the limit is `DEFAULT_MEMORY`, or the least that works if the process already holds more than
    that. With `arena_bytes`, every worker gets that much, whatever the rest of the process holds.
    """

    memory: int | None = None
    workers: int | None = None
    arena_bytes: int | None = None


DEFAULT_STREAM = StreamOptions()


@dataclasses.dataclass(frozen=True)
class Budget:
    """The number of worker threads, and the bytes of buffers that each of them has."""

    workers: int
    arena_bytes: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The division of an arena for one group: rows of the base per chunk, and bytes for the stage of each output."""

    rows: int
    stage: int


def resident_bytes() -> int:
    """Return how many bytes the process holds in memory now, mapped files included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most bytes that the process ever held in memory, mapped files included."""
    # getrusage would also count the memory of the program that launched this one.
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def needed_bytes(group: Group, kernels: RowKernels) -> int:
    """Return the least memory in bytes in which a group can be written, one grain of rows at a time."""
    return _fixed_bytes(group, 0) + group.grain * row_bytes(group, kernels)


def budget_for(groups: Sequence[Group], options: StreamOptions, kernels: RowKernels) -> Budget:
    """Choose the number of workers and the memory of each for writing these groups.

    Raises:
        UsageError: If the allowed memory cannot hold the widest rows; the message names the least that works.
    """
    least = max((needed_bytes(group, kernels) for group in groups), default=0)
    most = max((_wanted_bytes(group, kernels) for group in groups), default=0)
    workers = min(options.workers or default_workers(), max(len(groups), 1))
    shares = 2 if any(group.is_boxed for group in groups) else 1  # Boxes need as much memory again, outside of arenas.
    if options.arena_bytes is not None:
        return Budget(workers, max(options.arena_bytes, least))
    memory = options.memory or DEFAULT_MEMORY
    free = memory - resident_bytes() - _RESERVE
    if free < least and options.memory is None and least < DEFAULT_MEMORY // 2:
        free = least
    if free < least:
        wanted = memory - free + least
        raise UsageError(
            f"`memory={memory / 2**20:.0f}MiB` is too little: writing these weights takes {-(-wanted // 2**20)} MiB at "
            f"least. Give `memory={-(-wanted // 2**20)}MiB`."
        )
    workers = max(1, min(workers, free // max(shares * least, 1)))
    cap = _PANEL_BYTES if any(is_turned(group.base) for group in groups) else _ARENA_BYTES
    return Budget(workers, max(least, min(free // (shares * workers), most, cap)))


def default_workers() -> int:
    """Return the default number of workers: twice the usable CPU cores, but at most eight."""
    return min(_MOST_WORKERS, 2 * len(os.sched_getaffinity(0)))


def sizes_of(group: Group, arena_bytes: int, kernels: RowKernels) -> Sizes:
    """Divide an arena for a group: up to half of it for the stages of outputs, the rest for rows."""
    grain, per_row = group.grain, row_bytes(group, kernels)
    stage = min(STAGE_BYTES, arena_bytes // 2 // max(1, len(group.outputs)))
    if _fixed_bytes(group, stage) + grain * per_row > arena_bytes:
        stage = 0
    rows = (arena_bytes - _fixed_bytes(group, stage)) // max(1, per_row)
    width = int(matrix_shape(group.base)[1] * group.base.dtype.itemsize)
    rows = min(rows, matrix_shape(group.base)[0])
    if not is_turned(group.base):
        rows = min(rows, max(_READ_BYTES // max(1, width), 1))
    return Sizes(max(rows // grain, 1) * grain, stage)


def _wanted_bytes(group: Group, kernels: RowKernels) -> int:
    height = -(-matrix_shape(group.base)[0] // group.grain) * group.grain
    return _fixed_bytes(group, STAGE_BYTES) + height * row_bytes(group, kernels)


def _fixed_bytes(group: Group, stage: int) -> int:
    """Return the memory for everything but rows: stages, a base that is held, and buffers rounded up to whole pages."""
    stages = sum(stream_bytes(output, stage) for output in group.outputs)
    stages += group.base.nbytes + READ_OF_HELD if is_held(group.base) else 0
    return stages + (len(group.stored_cores) + 4) * PAGE
