"""Run one process to its end or to a limit, and record its seconds and its anonymous and mapped memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

GIB = 1 << 30


@dataclasses.dataclass
class Usage:
    """Hold the seconds and the bytes of memory that one process used.

    The maximum that wait4 reports is not used for `peak`, because it counts the program that launched the process too.

    Attributes:
        wall: Wall-clock seconds from start to end.
        cpu: CPU seconds, user and system together.
        peak: The kernel's own record of the largest resident bytes, as read at the last sample.
        anonymous: The largest sample of anonymous resident bytes.
        mapped: The largest sample of resident bytes that belong to mapped files.
        output: What the process wrote to stdout.
        failure: Why the process failed or was killed; empty if it ended well.
    """

    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    anonymous: int = 0
    mapped: int = 0
    output: str = ""
    failure: str = ""


def watched(folder: Path, command: Sequence[str], *, seconds: float = 3600, anonymous: int = 1 << 60) -> Usage:
    """Run `command` in `folder`, sample its memory, and kill it if it exceeds a limit.

    Args:
        folder: The working directory of the process.
        command: The program and its arguments.
        seconds: The limit of wall-clock seconds.
        anonymous: The limit of anonymous resident bytes.

    Returns:
        What the process used. Its `failure` names the limit that was exceeded or, if the process ended with another
        exit code than 0, the last line of its stderr.
    """
    start = time.monotonic()
    found = Usage()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            _sample(process.pid, found)
            if found.anonymous > anonymous:
                found.failure = f"killed at {anonymous / 1e9:.0f} GB"
            elif time.monotonic() - start > seconds:
                found.failure = f"not done in {seconds:.0f} s"
            if found.failure:
                process.kill()
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        log.seek(0)
        found.output = output.read()
        lines = log.read().strip().splitlines()
    if process.returncode and not found.failure:
        found.failure = f"fails: {lines[-1][:100]}" if lines else f"exit code {process.returncode}"
    found.wall = time.monotonic() - start
    found.cpu = usage.ru_utime + usage.ru_stime
    return found


def _sample(pid: int, usage: Usage) -> None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "RssAnon":
            usage.anonymous = max(usage.anonymous, int(rest.split()[0]) * 1024)
        elif name == "RssFile":
            usage.mapped = max(usage.mapped, int(rest.split()[0]) * 1024)
        elif name == "VmHWM":
            usage.peak = int(rest.split()[0]) * 1024
