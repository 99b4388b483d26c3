"""What of an unfinished output is finished: one line per tensor that lies on the disk whole, so that a run can go on.

The first line is the key of everything that decides the bytes. A line is appended only after the data it speaks of was
synced, and a torn last line counts for nothing; so what the journal names is whole, whatever happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class Journal:
    """Finished tensors by name, with their digests; of files by path, with their bytes.

    It counts only if it is of this key and all files are there; otherwise they are removed, since bytes of another
    output must not show where this one has padding.
    """

    def __init__(self, path: Path, key: str, files: Mapping[Path, int]) -> None:
        self.finished: dict[str, str] = {}
        self.overflows: dict[str, dict[str, int]] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        whole = all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in files.items())
        if not (whole and self._read(path.read_bytes(), key)):
            os.ftruncate(self._descriptor, 0)  # before anything else: a kill from here on must leave no claim
            self.sync()
            for file in files:
                file.unlink(missing_ok=True)
            self._append({"key": key})

    def _read(self, data: bytes, key: str) -> bool:
        """Take what `data` says if it is of this key."""
        end = data.rfind(b"\n") + 1
        try:
            first, *rest = [json.loads(line) for line in data[:end].splitlines()]
            if first != {"key": key}:
                return False
            for entry in rest:
                self.finished[entry["tensor"]] = entry["digest"]
                self.overflows[entry["tensor"]] = entry["overflows"]
        except (ValueError, KeyError, TypeError):
            self.finished, self.overflows = {}, {}
            return False
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)
        return True

    def add(self, tensor: str, digest: str, overflows: Mapping[str, int]) -> None:
        """Note a tensor whose bytes are synced."""
        self.finished[tensor] = digest
        self.overflows[tensor] = dict(overflows)
        self._append({"tensor": tensor, "digest": digest, "overflows": self.overflows[tensor]})

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, entry: Mapping[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(entry) + "\n").encode())
