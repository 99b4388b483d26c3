"""Identify the files that weights are read from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """The identity of a file that weights are read from: if the file differs later, reading it is an error."""

    path: str
    size: int
    mtime_ns: int
    header_digest: str
