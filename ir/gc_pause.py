"""Python's collector of cycles, held back while graphs are rewritten.

A graph is made of cycles that live; looking through all of them again and again takes a third of the time of a rewrite.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No collection in the block; what died in it is collected some time after."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
