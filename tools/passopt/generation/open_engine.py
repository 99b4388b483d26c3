"""What generation asks of an engine, and the engine that a compiled folder needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from passopt.targets.tvm.compiled_folder import CacheLayout, Library, RankFolders, read_library


class Bounds(Protocol):
    """What a prompt is held against."""

    @property
    def vocab(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...


class Engine(Bounds, Protocol):
    """A decoder with its past: `batch` sequences that advance together, up to `capacity` columns."""

    @property
    def batch(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def past(self) -> int: ...
    def allocate(self, batch: int, capacity: int | None = None) -> None:
        """Forget everything; room for `batch` sequences of `capacity` columns."""

    def reset(self) -> None:
        """Forget everything; the room stays."""

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Append `ids` [batch, seq] under `mask` [batch, past + seq]; logits [batch, seq or 1, vocab]."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What is known of a compiled folder before it is loaded: `Bounds`, bytes of weights and caches of all ranks."""

    vocab: int
    max_positions: int | None
    weight_bytes: int
    caches: tuple[CacheLayout, ...]


def read_facts(folder: Path) -> ModelFacts:
    """Of the library in `folder`, or of all its ranks. Raises ModelError unless it was compiled, and each of them."""
    libraries = list(_libraries(folder))
    first = libraries[0]
    weight_bytes = sum(library.weights.nbytes for library in libraries)
    caches = tuple(library.cache for library in libraries)
    return ModelFacts(first.logits.vocab, first.max_positions, weight_bytes, caches)


def _libraries(folder: Path) -> Iterator[Library]:
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
    """The engine for `folder`, with room for one column; `allocate` makes more. Raises ModelError, UsageError.

    Weights are hashed anew with `verify_weights`, and copied to memory with `copy_weights`, each rank's to its own.
    `progress` gets the bytes of weights, of all ranks, read since its last call.
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
