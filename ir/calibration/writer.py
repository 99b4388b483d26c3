"""Write a calibration folder part by part, so that an interrupted run goes on where it stopped.

A part is what was measured on one piece of a model, as a safetensors file. A journal names the parts that are on the
disk; the manifest is made of it at the end, and the same parts give the same bytes, however often a run was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.atomic_folders import JOURNAL_NAME, sync_path
from passopt.ir.calibration.entries import FORMAT, MANIFEST_NAME, VERSION, CacheEntry, WeightEntry
from passopt.ir.json_text import parse_json
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.safetensors_layout import layout_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class CalibrationWriter:
    """Writes the parts of a calibration.

    Attributes:
        finished: The parts that an earlier run finished, in their order, with what they said of themselves.

    Args:
        folder: An existing folder, such as `atomic_folders.resumable_directory` gives.
        key: A text that decides all bytes: what an earlier run wrote under another one is not taken over.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.finished: list[Mapping[str, Any]] = []
        self._folder = folder
        self._journal = folder / JOURNAL_NAME
        if not self._read(key):
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
            self._journal.write_text(json.dumps({"key": key}) + "\n")
            sync_path(self._journal)
            sync_path(folder)

    def _read(self, key: str) -> bool:
        """Take over the parts that the journal names, if they belong to the key and are whole."""
        if not self._journal.is_file():
            return False
        data = self._journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *rest = [parse_json(line) for line in whole.splitlines()]
            sizes = [(self._folder / part["file"]).stat().st_size == part["bytes"] for part in rest]
        except (ValueError, KeyError, TypeError, OSError):
            return False
        if first != {"key": key} or not all(sizes):
            return False
        os.truncate(self._journal, len(whole))
        self.finished = rest
        return True

    def add(
        self,
        name: str,
        tensors: Mapping[str, Array],
        weights: Mapping[str, WeightEntry] | None = None,
        cache: Mapping[str, CacheEntry] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the tensors of a part, and record it when they are on the disk.

        Args:
            name: The name of the part, such as "layer-3"; its file is called so.
            tensors: The tensors by name.
            weights: What is known of weights, by their keys; it names tensors of the file `NAME.safetensors`.
            cache: The same of keys and values, by the names of the graph's outputs.
            more: What a run that goes on needs to know of the part.
        """
        file = f"{name}.safetensors"
        nbytes = write_tensors(self._folder / file, tensors)
        part = {
            "part": name,
            "file": file,
            "bytes": nbytes,
            "weights": {key: entry.to_json() for key, entry in (weights or {}).items()},
            "cache": {key: entry.to_json() for key, entry in (cache or {}).items()},
            "more": dict(more or {}),
        }
        sync_path(self._folder)
        with self._journal.open("a") as journal:
            journal.write(json.dumps(part) + "\n")
        sync_path(self._journal)
        self.finished.append(part)

    def finish(self, model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write the manifest of all parts; a weight of several parts is what the first of them says.

        Args:
            model: The model's identity.
            data: The data's identity.
        """
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": dict(model), "data": dict(data)}
        manifest["files"] = {part["file"]: part["bytes"] for part in self.finished}
        manifest["weights"], manifest["cache"] = {}, {}
        for part in self.finished:
            for what in ("weights", "cache"):
                for key, entry in part[what].items():
                    manifest[what].setdefault(key, entry)
        (self._folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> int:
    """Write arrays to a safetensors file, wait until they are on the disk, and return the bytes of the file."""
    shapes = {name: Literal(DataType.from_numpy(array.dtype), array.shape, b"") for name, array in tensors.items()}
    layout = layout_of(shapes)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, offset in layout.offsets.items():
            file.seek(offset)
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        file.truncate(layout.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return layout.nbytes
