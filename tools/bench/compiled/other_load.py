"""Measure how much of the machine other programs use while a candidate is measured."""

from __future__ import annotations

import os
import resource
import time

import psutil


class Watch:
    """Measure, from its creation on, the share of the machine that programs use which this process did not start.

    Only processes that have ended and been waited for count as started by this one.
    """

    def __init__(self) -> None:
        self._start, self._busy, self._ours = time.monotonic(), _busy_seconds(), _children_seconds()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def others(self) -> float:
        """Return the share of all cores' time since the start that other programs used, from 0 to 1."""
        used = _busy_seconds() - self._busy - (_children_seconds() - self._ours)
        return max(0.0, used) / self.seconds() / (os.cpu_count() or 1)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
