"""Name the texts of the measurement: a book and Python's own documentation, each cut into parts that do not overlap."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

#: An English book of 1704, which comes with TVM's package as a test file of a library inside of it.
BOOK = "Isaac.Newton-Opticks.txt"
#: Characters of the book that are measured, and those from which calibration begins.
_MEASURED, _CALIBRATED = slice(40_000, 110_000), slice(200_000, None)
_LENGTH = 70_000


def texts() -> tuple[Mapping[str, str], str]:
    """Return the texts to measure by name, and the text to calibrate on.

    Raises:
        SystemExit: If the book is not there.
    """
    book, topics = _book(), _topics()
    measured = {"book": book[_MEASURED], "Python's documentation": "\n\n".join(topics[0::2])[:_LENGTH]}
    return measured, book[_CALIBRATED] + "\n\n" + "\n\n".join(topics[1::2])


def _book() -> str:
    spec = importlib.util.find_spec("tvm_ffi")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((path for folder in folders for path in Path(folder).rglob(BOOK)), None)
    if path is None:
        raise SystemExit(
            f"quality: {BOOK} is not in the package apache-tvm-ffi; install the version in constraints.txt"
        )
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "")
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)  # a line break within a paragraph is none of the text


def _topics() -> list[str]:
    """Return the topics that `help()` shows, which come with Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
