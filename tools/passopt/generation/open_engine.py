"""Define the interface of an engine that generation needs, and open the engine of a compiled folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from passopt.targets.tvm.compiled_folder import CacheLayout, Library, RankFolders, read_library


class Bounds(Protocol):
    """The limits of a model that prompts are checked against."""

    @property
    def vocab(self) -> int:
        """Return the number of token ids, which is that of logits per position."""

    @property
    def max_positions(self) -> int | None:
        """Return the number of positions, or None if the model has no limit."""


class Engine(Bounds, Protocol):
    """A decoder with its past: `batch` sequences that advance together, up to `capacity` columns."""

    @property
    def batch(self) -> int:
        """Return the number of sequences."""

    @property
    def capacity(self) -> int:
        """Return the number of columns that the cache has room for."""

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the cache."""

    @property
    def past(self) -> int:
        """Return the number of columns that are in the cache now."""

    def allocate(self, batch: int, capacity: int | None = None) -> None:
        """Forget all sequences, and make room for `batch` new ones of `capacity` columns."""

    def reset(self) -> None:
        """Forget all sequences but keep their room."""

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append `ids` [batch, seq] under `mask` [batch, past + seq], and return logits [batch, seq or 1, vocab]."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The facts that a compiled folder states before it is loaded.

    They are the bounds of the model, the bytes of the weights of all ranks together, and the cache of each rank.
    """

    vocab: int
    max_positions: int | None
    weight_bytes: int
    caches: tuple[CacheLayout, ...]


def read_facts(folder: Path) -> ModelFacts:
    """Read the facts of the library in `folder`, or of all its ranks.

    Raises:
        ModelError: If the folder, or that of a rank, holds no compiled library.
    """
    libraries = list(_libraries(folder))
    first = libraries[0]
    weight_bytes = sum(library.weights.nbytes for library in libraries)
    caches = tuple(library.cache for library in libraries)
    return ModelFacts(first.logits.vocab, first.max_positions, weight_bytes, caches)


def _libraries(folder: Path) -> Iterator[Library]:
    """Yield the library in the folder, or the libraries of all ranks below it."""
    found = read_library(folder)
    if isinstance(found, Library):
        yield found
        return
    for name in found.ranks:
        yield from _libraries(folder / name)


def open_engine(
    folder: Path,
    *,
    threads: int | None = None,
    verify_weights: bool = False,
    copy_weights: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Engine:
    """Open the engine for a compiled folder, with room for one column; `allocate` makes more.

    Args:
        folder: The compiled folder, or a folder of ranks.
        threads: The number of threads, of all ranks together; None for the cores of this machine.
        verify_weights: Hash all weights again.
        copy_weights: Copy the weights to memory, each rank's weights to the memory of its own process.
        progress: A function that gets the bytes of weights, of all ranks, that were read since its last call.

    Raises:
        ModelError: If the folder is damaged, its ranks do not belong together, or its library cannot run on this CPU.
        UsageError: If `threads` is less than 1, or if there is not enough memory.
    """
    if isinstance(read_library(folder), RankFolders):
        from passopt.targets.tvm.engine import rank_engine

        load: Callable[..., Engine] = rank_engine.RankEngine.load
    else:
        from passopt.targets.tvm.engine import engine

        load = engine.Engine.load
    return load(
        folder,
        capacity=1,
        threads=threads,
        verify_weights=verify_weights,
        copy_weights=copy_weights,
        progress=progress,
    )
