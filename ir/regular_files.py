"""Open files, and nothing else: reading from a named pipe, or from a device, could wait for ever."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO


def check_regular(path: Path) -> None:
    """Raise OSError if something is there that is neither a file nor a link to one; a missing file is not looked for.

    Args:
        path: The path.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device instead of a file", os.fspath(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading bytes.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        OSError: There is no such file, it cannot be read, or it is none.
    """
    check_regular(path)
    return path.open("rb")
