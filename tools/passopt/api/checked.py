"""Check the values that operations get: what argparse does for the command line, for Python as well."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from passopt.ir.errors import UsageError


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raise UsageError unless the value of an argument is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} is one of {', '.join(choices)}, not {value!r}")


def whole(name: str, value: object, least: int) -> None:
    """Raise UsageError unless the value is None, or a whole number that is not below the least one."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is a whole number, not {value!r}")
    if value < least:
        raise UsageError(f"{name} is at least {least}, not {value}")


def tolerance(name: str, value: object) -> None:
    """Raise UsageError unless the value is None, or a finite number that is not negative."""
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UsageError(f"{name} is a number from 0 on, not {value!r}")


def streaming(memory: object, workers: object) -> None:
    """Raise UsageError unless the bounds of a write are numbers of bytes and of threads."""
    whole("memory", memory, 1)
    whole("workers", workers, 1)


def path(name: str, value: object) -> Path:
    """Return a path; raise UsageError if the value is none."""
    if not isinstance(value, (str, Path)):
        raise UsageError(f"{name} is a path, not {value!r}")
    return Path(value)


def texts(name: str, value: object) -> Sequence[str]:
    """Return texts; one alone stands for a list of one. Raise UsageError if there is anything else among them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(item, str) for item in found):
        raise UsageError(f"{name} is a text or a list of texts, not {value!r}")
    return found
