"""The header of a safetensors file as bytes; nothing of ONNX is needed to read it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from passopt.ir.errors import ModelError

_MAX_BYTES = 100 << 20


def read_header(path: Path) -> bytes:
    """The header's length (8 bytes) and the header; the tensors follow. Raises ModelError if the file is shorter."""
    try:
        with path.open("rb") as stream:
            return read_header_of(stream, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def read_header_of(stream: BinaryIO, path: Path) -> bytes:
    """As `read_header`, of the file at `path` that is open at its start. Raises OSError too."""
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= min(_MAX_BYTES, size - 8):
        raise ModelError(f"{path}: not a safetensors file, or truncated (header of {length} bytes)")
    return prefix + stream.read(length)
