"""Tell the format of a calibration set from the beginning of its file."""

from __future__ import annotations

import zipfile
from pathlib import Path

from passopt.frontends.calibration.text_files import open_text, reading
from passopt.ir.errors import UsageError
from passopt.ir.json_text import parse_json

_HEAD = 1 << 16


def format_of(path: Path) -> str:
    """Return the name of the format of a file.

    Raises:
        UsageError: If its JSON is of no known format.
        ModelError: If the file cannot be read.
    """
    with reading(path):
        if zipfile.is_zipfile(path):
            return "ceval"
    with open_text(path) as file:
        head = file.read(_HEAD)
    start = head.lstrip()
    if start.startswith("["):
        return "alpaca"
    if not start.startswith("{"):
        return "text"
    first = start.partition("\n")[0]
    for key, name in (("messages", "messages"), ("text", "c4")):
        if f'"{key}"' in first:
            return _checked(first, key, name)
    raise UsageError(
        f"{path}: its first line is a JSON object with neither text nor messages; say what it is, as in c4:{path}"
    )


def _checked(line: str, key: str, name: str) -> str:
    """Return the format, unless the line is whole and its object has the key only somewhere inside."""
    try:
        entry = parse_json(line)
    except ValueError:  # the line is longer than what was read
        return name
    if isinstance(entry, dict) and key in entry:
        return name
    return "c4"
