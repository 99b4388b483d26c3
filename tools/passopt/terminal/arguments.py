"""Parse the values of options, and add the options that several commands share."""

from __future__ import annotations

import argparse
import re
from typing import Any

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def positive(text: str) -> int:
    """Return the whole number in `text`, which must be at least 1.

    Raises:
        ArgumentTypeError: If it is not such a number.
    """
    return _whole(text, 1, "is not a positive number")


def count(text: str) -> int:
    """Return the whole number in `text`, which must be at least 0.

    Raises:
        ArgumentTypeError: If it is not such a number.
    """
    return _whole(text, 0, "is negative")


def _whole(text: str, least: int, complaint: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} {complaint}")
    return number


def size(text: str) -> int:
    """Return the number of bytes that `text` says, such as `1GiB`, `750MB` or `1073741824`.

    Raises:
        ArgumentTypeError: If it is not a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text}: not a size; write it like 1GiB, 750MB or 1073741824")
    found = int(float(match[1]) * _UNITS[match[2]])
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{text} is too little memory; give a size such as 1GiB")
    return found


def tolerance(text: str) -> float:
    """Return the finite number in `text`, which must be at least 0.

    Raises:
        ArgumentTypeError: If it is not such a number.
    """
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a tolerance")
    return number


def add_streaming(command: argparse.ArgumentParser) -> None:
    """Add the options --memory and --workers of commands that write weights."""
    command.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="limit the memory that the whole process may take while it writes weights (default: 1GiB)",
    )
    command.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="write weights with N threads (default: two per core, at most 8)",
    )


def streaming(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of --memory and --workers as keyword arguments of an operation."""
    return {"memory": options.memory, "workers": options.workers}


def named_or_all(names: list[str] | None) -> list[str] | None:
    """Return the names given to an option such as --print-after.

    The result is None if the option was not given, and an empty list if it was given without a name and means
    everything.
    """
    if names is None:
        return None
    return names if all(names) else []
