"""Guest passes that are declared for one test, and forgotten after it."""

from __future__ import annotations

import pytest

from passopt.passes.framework import base


@pytest.fixture(autouse=True)
def _forget_declared():
    before = set(base.REGISTERED)
    yield
    for name, declared in list(base.REGISTERED.items()):
        if name not in before and not declared.__module__.startswith("passopt."):
            del base.REGISTERED[name]
