"""What generation asks of an engine, and the engine that a compiled folder needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from passopt.targets.tvm.library import RankFolders, read_library


class Engine(Protocol):
    """A decoder with its past: `batch` sequences that advance together, up to `capacity` columns."""

    @property
    def vocab(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
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


def count_weight_bytes(folder: Path) -> int:
    """Bytes of the weights in `folder`. Raises ModelError unless it was compiled, and each of its ranks."""
    found = read_library(folder)
    if isinstance(found, RankFolders):
        return sum(count_weight_bytes(folder / name) for name in found.ranks)
    return found.weights.nbytes


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
    `progress` gets the bytes of weights read since its last call; of ranks, which read in processes of their own, none.
    """
    if isinstance(read_library(folder), RankFolders):
        from passopt.targets.tvm import ranks

        return ranks.RankEngine.load(
            folder, capacity=1, threads=threads, verify_weights=verify_weights, copy_weights=copy_weights
        )
    from passopt.targets.tvm import runtime

    return runtime.Engine.load(
        folder,
        capacity=1,
        threads=threads,
        verify_weights=verify_weights,
        copy_weights=copy_weights,
        progress=progress,
    )
