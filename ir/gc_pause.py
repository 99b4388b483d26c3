"""Pause Python's cyclic garbage collector while graphs are rewritten.

A graph consists of reference cycles that stay alive. Scanning all of them again and again would take a third of the
time of a rewrite.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic collector within the block; garbage of the block is collected some time after it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
