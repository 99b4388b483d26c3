"""Count the cores that this process may run on, which is the number of threads worth starting."""

from __future__ import annotations

import math
import os
from pathlib import Path

PROCESSORS = Path("/sys/devices/system/cpu")
#: The CPU limit of a control group (version 2): a quota, or `max` for none, and a period, both in microseconds.
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_cores() -> int:
    """Return the number of physical cores, or fewer if the quota of a container grants fewer; at least 1.

    Physical cores count, not hyper-threads: the threads of a pool wait for each other at every kernel, so two threads
    on one core would only slow each other down.
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
