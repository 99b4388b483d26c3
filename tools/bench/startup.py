"""Measure how long passopt takes to start, in CPU time beyond bare Python, and fail where that is too long.

    python tools/bench startup [--repeat 15]

Every command runs in a process of its own, the kinds taking turns so that a busy machine disturbs them alike; what
counts is the median. Goals: `import passopt` within 50 ms and `passopt --help` within 150 ms of CPU time beyond bare
Python; `passopt compile` of a file that is not there within a second in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

from tables import processor, table

#: Label → the arguments of Python, and the most milliseconds of CPU time beyond bare Python; None for no goal.
COMMANDS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "bare Python": (("-c", "pass"), None),
    "import passopt": (("-c", "import passopt"), 50),
    "import passopt.passes, passopt.ir, passopt.testing": (
        ("-c", "import passopt.passes, passopt.ir, passopt.testing"),
        50,
    ),
    "passopt --help": (("-m", "passopt", "--help"), 150),
    "passopt --version": (("-m", "passopt", "--version"), 150),
    "passopt list": (("-m", "passopt", "list"), None),
    "passopt compile nosuch.onnx -o x": (("-m", "passopt", "compile", "nosuch.onnx", "-o", "x"), 1000),
}


def cpu_milliseconds(arguments: Sequence[str]) -> float:
    """Return the CPU time, user and system, of one run of Python with these arguments."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return 1000 * (usage.ru_utime + usage.ru_stime)


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and exit with 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        "python tools/bench startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="runs of each command (default: 15)")
    options = parser.parse_args(arguments)
    found: dict[str, list[float]] = {label: [] for label in COMMANDS}
    for _ in range(options.repeat):
        for label, (command, _) in COMMANDS.items():
            found[label].append(cpu_milliseconds(command))
    medians = {label: statistics.median(times) for label, times in found.items()}
    bare = medians["bare Python"]
    rows, missed = [], []
    for label, (_, goal) in COMMANDS.items():
        beyond = medians[label] - bare
        if goal is not None and beyond > goal:
            missed.append(label)
        least, most = min(found[label]), max(found[label])
        rows.append([label, f"{medians[label]:.0f}", f"{beyond:.0f}", f"{least:.0f}–{most:.0f}", f"{goal or '-'}"])
    print(f"{processor()}, {options.repeat} runs of each, CPU milliseconds\n")
    print(table(["command", "median", "beyond bare Python", "least–most", "goal"], rows))
    if missed:
        raise SystemExit(f"startup: beyond the goal: {', '.join(missed)}")
