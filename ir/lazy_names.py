"""Look up the public names of a package on first use, so that importing the package alone costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose public `names` live in other modules (PEP 562).

    Args:
        package: The import name of the package, for its error message.
        names: Public name → the module that defines it. The name is looked up there once, at its first use.

    Returns:
        Two functions, to be bound to `__getattr__` and `__dir__` in the package's `__init__`.
    """

    def get(name: str) -> Any:
        module = names.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module), name)
        setattr(importlib.import_module(package), name, value)
        return value

    def listed() -> list[str]:
        return sorted({*names, *(name for name in vars(importlib.import_module(package)) if name.startswith("__"))})

    return get, listed
