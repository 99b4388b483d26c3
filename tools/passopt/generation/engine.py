"""What generation asks of an engine, and the engine that a compiled folder needs."""

from __future__ import annotations

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


def check_folder(folder: Path) -> None:
    """Raise ModelError unless `folder` was compiled; a folder of ranks, unless each of them was."""
    found = read_library(folder)
    for name in found.ranks if isinstance(found, RankFolders) else ():
        read_library(folder / name)


def open_engine(folder: Path, *, threads: int | None = None, verify_weights: bool = False) -> Engine:
    """The engine for `folder`, with room for one column; `allocate` makes more. Raises ModelError, UsageError."""
    if isinstance(read_library(folder), RankFolders):
        from passopt.targets.tvm import ranks

        return ranks.RankEngine.load(folder, capacity=1, threads=threads, verify_weights=verify_weights)
    from passopt.targets.tvm import runtime

    return runtime.Engine.load(folder, capacity=1, threads=threads, verify_weights=verify_weights)
