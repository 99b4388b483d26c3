"""Keep the logits of a text on disk: of 2,048 tokens and 50,000 words they take 400 MB."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class LogitStore:
    """A temporary folder of arrays that are mapped into memory when they are read."""

    def __init__(self, scratch: Path | None = None) -> None:
        """Make the folder below `scratch`, by default the system's temporary folder."""
        self._folder = tempfile.TemporaryDirectory(prefix="passopt-logits-", dir=scratch)
        self._count = 0

    def keep(self, logits: Array) -> Array:
        """Write an array, and return it as a map of its file."""
        path = Path(self._folder.name) / f"{self._count}.npy"
        self._count += 1
        np.save(path, logits)
        kept: Array = np.load(path, mmap_mode="r")
        return kept

    def __enter__(self) -> LogitStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()
