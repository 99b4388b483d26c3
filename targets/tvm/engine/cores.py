"""How many threads are worth starting: the cores that this process may run on."""

from __future__ import annotations

import math
import os
from pathlib import Path

PROCESSORS = Path("/sys/devices/system/cpu")
#: Quota and period of a control group (version 2), both in microseconds, or `max`.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores() -> int:
    """Physical cores, fewer where a container's quota grants fewer.

    Threads of a pool wait for each other at every kernel: two on one core only get in each other's way.
    """
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(processor) for processor in allowed}
    return max(1, min(len(cores), _granted()))


def _siblings(processor: int) -> str:
    try:
        return (PROCESSORS / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def _granted() -> int:
    try:
        quota, period = QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
