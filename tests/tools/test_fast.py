"""`make test FAST=1` leaves out what is marked slow, and still runs tests of every folder."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_every_folder_of_tests_has_fast_ones(request):
    folders = {file.parent for file in TESTS.rglob("test_*.py")}
    items = request.session.items
    if folders - {item.path.parent for item in items}:
        pytest.skip("not all folders were collected")
    fast = {item.path.parent for item in items if item.get_closest_marker("slow") is None}
    assert folders - fast == set()
