"""Stream the text of files that anyone may have written: plain, compressed by gzip, or inside a zip archive."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from passopt.ir.errors import ModelError
from passopt.ir.regular_files import check_regular

_GZIP = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class Document:
    """One piece of a calibration set: a text, or the messages of a conversation.

    Attributes:
        text: The text; "" for a conversation.
        messages: Pairs of role and content.
    """

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """Return the number of characters."""
        return len(self.text) + sum(len(content) for _, content in self.messages)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text for reading, also one that gzip compressed, whatever its name is.

    Raises:
        ModelError: If the file is missing, damaged or not UTF-8, also while it is read.
    """
    with reading(path):
        check_regular(path)
        with path.open("rb") as raw:
            is_compressed = raw.read(2) == _GZIP
            raw.seek(0)
            data = gzip.GzipFile(fileobj=raw) if is_compressed else raw
            yield io.TextIOWrapper(data, encoding="utf-8-sig", newline="")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into ModelErrors that name it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(f"{path}: cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from error
