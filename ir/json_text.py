"""Parse JSON of files that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from passopt.ir.regular_files import check_regular


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Args:
        text: The text, or its bytes in UTF-8.

    Returns:
        Objects, lists, texts, numbers, booleans and None.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or holds no number that this Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.

    Returns:
        What `parse_json` returns.

    Raises:
        OSError: There is no such file, it cannot be read, or it is none: reading a named pipe would wait for ever.
        ValueError: It is not JSON.
    """
    check_regular(path)
    return parse_json(path.read_bytes())
