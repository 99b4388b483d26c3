"""Say what a calibration set is: a format, a file and a weight; and find the reader of the format."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from passopt.frontends.calibration.formats import read_alpaca, read_c4, read_ceval, read_messages, read_text
from passopt.frontends.calibration.sniffing import format_of
from passopt.frontends.calibration.text_files import Document
from passopt.ir.errors import UsageError

Reader: TypeAlias = Callable[[Path], Iterator[Document]]

#: The group of entry points by which installed packages add formats. Each names a function from a path to documents.
ENTRY_POINTS = "passopt.calibration"
READERS: Mapping[str, Reader] = {
    "alpaca": read_alpaca,
    "c4": read_c4,
    "ceval": read_ceval,
    "messages": read_messages,
    "text": read_text,
}
_SOURCE = re.compile(r"(?:(?P<format>[A-Za-z][\w.-]*):)?(?P<path>.+?)(?:\*(?P<weight>[0-9.]+))?")


@dataclasses.dataclass(frozen=True)
class Source:
    """One calibration set.

    Attributes:
        format: The name of its format.
        path: The file.
        weight: Its share of all windows, in proportion to the weights of the other sets.
    """

    format: str
    path: Path
    weight: float = 1.0

    def documents(self) -> Iterator[Document]:
        """Yield the documents of the set, as they are read.

        Raises:
            ModelError: If the file cannot be read, or is not of the format.
        """
        return reader_of(self.format)(self.path)


def parse_source(text: str) -> Source:
    """Return the set that a text such as `c4:c4-train.00000.json.gz*2` names.

    Args:
        text: The format and a colon, which may be left out where the file shows its format; the path of the file; and
            `*` with a weight, by default 1.

    Raises:
        UsageError: If there is no such file or format, or the weight is no positive number.
        ModelError: If the file cannot be read.
    """
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} names no calibration set; expected FORMAT:FILE*WEIGHT, such as c4:c4.json.gz*2")
    name, path = match["format"], Path(match["path"])
    if name is not None and name not in formats() and not path.is_file() and Path(f"{name}:{path}").is_file():
        name, path = None, Path(f"{name}:{path}")
    if name is not None:
        reader_of(name)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file; a calibration set is read from a local file")
    try:
        weight = float(match["weight"] or 1)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise UsageError(f"{text}: the weight {match['weight']} is no positive number")
    return Source(name or format_of(path), path, weight)


def formats() -> list[str]:
    """Return the names of all formats, those of installed packages included."""
    return sorted({*READERS, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def reader_of(name: str) -> Reader:
    """Return the reader of a format.

    Raises:
        UsageError: If there is none of this name, or the package that offers it cannot be used.
    """
    if name in READERS:
        return READERS[name]
    points = [point for point in importlib.metadata.entry_points(group=ENTRY_POINTS) if point.name == name]
    if not points:
        raise UsageError(f"unknown calibration format {name!r}; known are {', '.join(formats())}")
    try:
        reader: Reader = points[0].load()
    except Exception as error:  # the package may raise anything
        raise UsageError(f"the calibration format {name!r} cannot be loaded ({points[0].value}): {error}") from error
    return reader
