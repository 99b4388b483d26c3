"""Record which tensors are safely on disk, so that an interrupted write can resume.

The first line is a key of everything that decides the output's bytes; then there is one line per finished tensor. A
line is appended only after the tensor's data was synced, and an incomplete last line is ignored. So a tensor that the
journal names is complete, whatever happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from passopt.ir.json_text import parse_json


class Journal:
    """The finished tensors of an output, with their digests and overflows.

    An existing journal is used only if it has the same `key` and all `files` of the output are there in their sizes (in
    bytes). Otherwise the files are removed, because bytes of another output must not remain where this output has
    padding.
    """

    def __init__(self, path: Path, key: str, files: Mapping[Path, int]) -> None:
        self.finished: dict[str, str] = {}
        self.overflows: dict[str, dict[str, int]] = {}
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        whole = all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in files.items())
        if not (whole and self._read(path.read_bytes(), key)):
            # Empty the journal first: if the process is killed from here on, the journal must not name any tensor.
            os.ftruncate(self._descriptor, 0)
            self.sync()
            for file in files:
                file.unlink(missing_ok=True)
            self._append({"key": key})

    def _read(self, data: bytes, key: str) -> bool:
        """Take over the entries in `data`, and return whether they belong to this key and are readable."""
        end = data.rfind(b"\n") + 1
        try:
            first, *rest = [parse_json(line) for line in data[:end].splitlines()]
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
        """Record a tensor whose bytes are synced."""
        self.finished[tensor] = digest
        self.overflows[tensor] = dict(overflows)
        self._append({"tensor": tensor, "digest": digest, "overflows": self.overflows[tensor]})

    def sync(self) -> None:
        """Wait until the recorded entries are on the disk."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the journal's file."""
        os.close(self._descriptor)

    def _append(self, entry: Mapping[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(entry) + "\n").encode())
