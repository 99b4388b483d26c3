"""Read the header of a safetensors file as bytes, without importing anything of ONNX."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from passopt.ir.errors import ModelError
from passopt.ir.regular_files import open_regular

_MAX_BYTES = 100 << 20


def read_header(path: Path) -> bytes:
    """Return the first bytes of the file: the header's length (8 bytes) and the header, behind which the tensors start.

    Raises:
        ModelError: If the file cannot be read, is truncated or is not a safetensors file.
    """
    try:
        with open_regular(path) as stream:
            return read_header_of(stream, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def read_header_of(stream: BinaryIO, path: Path) -> bytes:
    """Return what `read_header` returns, from a stream that is open at the start of the file `path`.

    Raises:
        ModelError: If the file is truncated or not a safetensors file.
        OSError: If it cannot be read.
    """
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= min(_MAX_BYTES, size - 8):
        raise ModelError(f"{path}: not a safetensors file, or truncated (header of {length} bytes)")
    return prefix + stream.read(length)
