"""Keep activations on disk: an array of one shape for every window, by the name of the value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Spool:
    """Arrays on disk; windows may be written in any order and from several threads.

    Args:
        folder: An existing folder for the files.
        prefix: What their names begin with.
    """

    def __init__(self, folder: Path, prefix: str = "values") -> None:
        self._folder = folder
        self._prefix = prefix
        self._files: dict[str, tuple[Path, tuple[int, ...], np.dtype[Any]]] = {}
        self._made = 0

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def adopt(self, name: str, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Take over a file that holds the windows of a value."""
        self._files[name] = (path, shape, dtype)

    def put(self, name: str, window: int, array: Array) -> None:
        """Write the array of a window; the first one decides shape and dtype."""
        if name not in self._files:
            path = self._folder / f"{self._prefix}-{self._made}.bin"
            self._made += 1
            path.write_bytes(b"")
            self._files[name] = (path, array.shape, array.dtype)
        path, shape, dtype = self._files[name]
        assert (array.shape, array.dtype) == (shape, dtype), f"{name}: {array.dtype}{array.shape}, not {dtype}{shape}"
        with path.open("r+b") as file:
            file.seek(window * array.nbytes)
            file.write(np.ascontiguousarray(array).data)

    def get(self, name: str, window: int) -> Array:
        """Return the array of a window."""
        path, shape, dtype = self._files[name]
        count = int(np.prod(shape))
        return np.fromfile(path, dtype, count, offset=window * count * dtype.itemsize).reshape(shape)

    def file(self, name: str) -> tuple[Path, tuple[int, ...], np.dtype[Any]]:
        """Return the file of a value, with the shape and dtype of a window, after its bytes are on the disk."""
        path, shape, dtype = self._files[name]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return path, shape, dtype

    def release(self, name: str) -> None:
        """Forget a value, but leave its file."""
        del self._files[name]

    def drop(self, name: str) -> None:
        """Remove a value and its file."""
        self._files.pop(name)[0].unlink(missing_ok=True)
