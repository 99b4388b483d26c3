"""Parse JSON of files that anyone may have written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from passopt.ir.errors import ModelError
from passopt.ir.regular_files import check_regular

#: One more than the largest token id, and than the largest number of tokens: both are 32-bit numbers somewhere.
_TOKENS = 1 << 31


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # A whole number beyond those of floating point.
        return False


#: What a value may have to be, in the words of messages. Python takes true for 1, and JSON does not.
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": _is_int,
    "a number": _is_number,
    "a token id": lambda value: _is_int(value) and 0 <= value < _TOKENS,
    "a number of tokens": lambda value: _is_int(value) and 0 < value < _TOKENS,
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}


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


def stated(content: Mapping[str, Any], key: str, kind: str, where: str) -> Any:
    """Return what an object of a file states under a key, or None if that is nothing or null.

    Args:
        content: The object.
        key: The key.
        kind: What the value has to be, such as "a text" or "a token id".
        where: The file, and the object in it, for the message.

    Raises:
        ModelError: The value is something else.
    """
    value = content.get(key)
    if value is not None:
        check_kind(value, kind, f"{where}: {key}")
    return value


def check_kind(value: Any, kind: str, subject: str) -> None:
    """Raise ModelError, naming the subject and what was found, unless a value of a file is of a kind."""
    if not _KINDS[kind](value):
        raise ModelError(f"{subject} is {shown(value)}, expected {kind}; the file is damaged, or was edited wrongly")


def shown(value: Any, length: int = 60) -> str:
    """Return the beginning of a value of a file, as JSON writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else f"{text[:length]}…"
