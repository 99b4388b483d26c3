"""Look for garbage less often: what was imported and collected before the first test is there until the last one."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Leave thousands of tests, and modules as large as torch, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
