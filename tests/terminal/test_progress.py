"""The bar of long work: on terminals only, with a speed of what is done now."""

from __future__ import annotations

import sys

import pytest

from passopt.terminal import progress
from passopt.terminal.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_nothing_is_drawn_where_there_is_no_terminal(clock, capsys):
    bar = Progress("writing", 100)
    clock[0] += 1
    bar(50)
    bar.close()
    assert shown(capsys) == ""


def test_speed_and_time_left(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("writing out", 10_000_000_000)
    clock[0] += 2
    bar(2_500_000_000)
    text = shown(capsys)
    assert all(part in text for part in ("writing out", "25%", "1.25 GB/s", "6 s left"))
    bar.close()
    assert shown(capsys).endswith("\033[K")


def test_what_was_done_before_is_no_speed(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("writing", 4_000_000_000)
    clock[0] += 1
    bar.skip(2_000_000_000)
    assert "left" not in shown(capsys)
    clock[0] += 1
    bar(1_000_000_000)
    text = shown(capsys)
    assert all(part in text for part in ("75%", "0.50 GB/s", "2 s left"))


def test_items_are_counted(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("comparing layers", 40, in_items=True)
    clock[0] += 10
    bar(1)
    text = shown(capsys)
    assert "1/40" in text
    assert "390 s left" in text
