"""Sum and concatenate tensors over the ranks of one machine, through memory that they share.

Every rank writes a piece of its tensor to a slot of its own, waits for the other ranks, and reads their pieces. Sums
are taken in the order of ranks, so they are the same bits on every rank and in every run. Each rank has two slots that
it uses in turn, so one wait per piece is enough.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from passopt.ir.errors import ModelError
from passopt.targets.tvm.compiled_folder import ALL_GATHER, ALL_REDUCE

#: The bytes of a piece: few enough to stay in a CPU cache, enough that waiting takes little of the time.
PIECE = 1 << 20
_FLOAT = np.dtype(np.float32)
_COUNTERS = "counters"
#: The int64 counters per rank, which fill a cache line. Used are: the number of pieces that the rank has written, the
#: bytes of its last two pieces (by the parity of their number), and the bytes of weights that it has read.
_LINE = 8
#: A waiting rank first yields the CPU this many times; then it sleeps for `_NAP` seconds between looks.
_SPINS = 2000
_NAP = 5e-5

Array = npt.NDArray[Any]


class CollectiveError(ModelError):
    """Raised when the ranks do not meet at a collective: one hangs, has ended, or runs another program."""


def create_room(directory: Path, degree: int) -> None:
    """Create the files that `degree` ranks share in `directory`; raise ModelError if there is no room for them."""
    try:
        for rank in range(degree):
            _create(directory / _slot_name(rank), 2 * PIECE)
        _create(directory / _COUNTERS, (degree + 1) * _LINE * 8)
    except OSError as error:
        needed = 2 * PIECE * degree
        raise ModelError(f"{directory}: no room for {needed:,} bytes between ranks: {error.strerror}") from error


def _create(path: Path, nbytes: int) -> None:
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # Writing to the map of a file on a full disk would kill us.


class Counters:
    """Shared counters that say how far each rank is, and whether the group was given up."""

    def __init__(self, directory: Path, degree: int) -> None:
        self._lines = _mapped(directory / _COUNTERS).view(np.int64).reshape(degree + 1, _LINE)
        self.degree = degree

    def written(self) -> list[int]:
        """Return the number of pieces that each rank has written."""
        return [int(number) for number in self._lines[: self.degree, 0]]

    def count_read(self, rank: int, nbytes: int) -> None:
        """Record that `rank` has read another `nbytes` bytes of its weights."""
        self._lines[rank, 3] += nbytes

    def bytes_read(self) -> int:
        """Return the bytes of weights that all ranks together have read."""
        return int(self._lines[: self.degree, 3].sum())

    def announce(self, rank: int, pieces: int, nbytes: int) -> None:
        """Record that `rank` has written piece number `pieces`, of `nbytes` bytes.

        x86 keeps stores in order, so whoever sees the new number also sees the piece, which was written before.
        """
        self._lines[rank, 1 + pieces % 2] = nbytes
        self._lines[rank, 0] = pieces

    def sizes(self, pieces: int) -> list[int]:
        """Return the size in bytes of piece number `pieces` of each rank."""
        return [int(number) for number in self._lines[: self.degree, 1 + pieces % 2]]

    def give_up(self) -> None:
        """Tell all ranks that wait to stop waiting and fail."""
        self._lines[self.degree, 0] = 1

    @property
    def is_given_up(self) -> bool:
        """Return whether `give_up` was called by any process."""
        return bool(self._lines[self.degree, 0])


class Group:
    """The view that the process of one rank has of the group of all `degree` ranks.

    `rank` is the number of this process, and `timeout` is how many seconds it waits for the others at a collective.
    `failure` is the last error of a collective; None if there was none.
    """

    def __init__(self, directory: Path, rank: int, degree: int, timeout: float) -> None:
        self.rank = rank
        self.degree = degree
        self.timeout = timeout
        self.counters = Counters(directory, degree)
        self.failure: CollectiveError | None = None
        self._slots = [_mapped(directory / _slot_name(each)).view(_FLOAT).reshape(2, -1) for each in range(degree)]
        self._pieces = 0

    def all_reduce(self, mine: Array, result: Array) -> None:
        """Write the sum of every rank's `mine` to `result`; both are fp32 of the same shape."""
        flat, total = mine.reshape(-1), result.reshape(-1)
        for piece in _blocks(len(flat), PIECE // _FLOAT.itemsize):
            parts = self._exchange(flat[piece])
            np.add(parts[0], parts[1], out=total[piece])
            for part in parts[2:]:
                total[piece] += part

    def all_gather(self, mine: Array, result: Array) -> None:
        """Write every rank's `mine` to `result`, concatenated along the axis in which their shapes differ."""
        axis = next(axis for axis, (one, other) in enumerate(zip(mine.shape, result.shape)) if one != other)
        inner = int(np.prod(mine.shape[axis:]))
        rows, joined = mine.reshape(-1, inner), result.reshape(-1, self.degree, inner)
        width = min(inner, PIECE // _FLOAT.itemsize)
        for columns in _blocks(inner, width):
            for chosen in _blocks(len(rows), max(1, PIECE // _FLOAT.itemsize // width)):
                block = rows[chosen, columns]
                for rank, part in enumerate(self._exchange(block)):
                    joined[chosen, rank, columns] = part.reshape(block.shape)

    def register(self, ffi: Any) -> None:
        """Register the collectives with `ffi` (tvm_ffi), for the libraries that this process loads from now on."""
        for name, function in ((ALL_REDUCE, self.all_reduce), (ALL_GATHER, self.all_gather)):
            ffi.register_global_func(name, self._called_by_library(function), override=True)

    def _called_by_library(self, function: Any) -> Any:
        def call(operand: Any, result: Any) -> None:
            try:
                function(np.from_dlpack(operand), np.from_dlpack(result))
            except CollectiveError as error:
                self.failure = error  # Kept here because the library passes on nothing but its message.
                raise

        return call

    def _exchange(self, mine: Array) -> list[Array]:
        """Publish this rank's piece and return the pieces of all ranks, in order.

        The pieces are views of the slots and must be read before the exchange after the next, which overwrites them.
        Raises CollectiveError if the ranks' pieces differ in size, or as `_wait` does.
        """
        self._pieces += 1
        slot = self._pieces % 2
        self._slots[self.rank][slot, : mine.size].reshape(mine.shape)[...] = mine
        self.counters.announce(self.rank, self._pieces, mine.nbytes)
        self._wait()
        sizes = self.counters.sizes(self._pieces)
        if len(set(sizes)) != 1:
            raise CollectiveError(f"piece {self._pieces}: ranks bring {sizes} bytes; they run different programs")
        return [each[slot, : mine.size] for each in self._slots]

    def _wait(self) -> None:
        """Wait until every rank has written its piece.

        It polls without sleeping at first, since the others usually take microseconds. Raises CollectiveError if the
        group was given up or if the wait takes longer than the timeout.
        """
        spins, end = 0, time.monotonic() + self.timeout
        while min(self.counters.written()) < self._pieces:
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
                continue
            time.sleep(_NAP)
            if self.counters.is_given_up:
                raise CollectiveError(f"rank {self.rank} stops: the others have ended")
            if time.monotonic() > end:
                late = [rank for rank, number in enumerate(self.counters.written()) if number < self._pieces]
                raise CollectiveError(
                    f"rank {', '.join(map(str, late))} did not come to collective piece {self._pieces} within "
                    f"{self.timeout:g} s; it hangs, or the machine has too few cores or swaps"
                )


def _slot_name(rank: int) -> str:
    return f"slot{rank}"


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file, shared with all who map it; the file may be unlinked afterwards."""
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)


def _blocks(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
