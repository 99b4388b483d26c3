"""Watch how busy the machine is with other things while a candidate is measured."""

from __future__ import annotations

import os
import resource
import time

import psutil


class Watch:
    """What share of the machine is used by others than the processes that this one starts, from now on."""

    def __init__(self) -> None:
        self._start, self._busy, self._ours = time.monotonic(), _busy_seconds(), _children_seconds()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def others(self) -> float:
        used = _busy_seconds() - self._busy - (_children_seconds() - self._ours)
        return max(0.0, used) / self.seconds() / (os.cpu_count() or 1)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
