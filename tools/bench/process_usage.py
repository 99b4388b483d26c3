"""Watch one process to its end or to a limit: its seconds, and its memory told apart."""

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
    """Seconds and bytes of one process, sampled; `peak` is the kernel's own account of it, up to the last sample.

    (What wait4 gives counts the program that launched it as well.)
    """

    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    anonymous: int = 0
    mapped: int = 0
    output: str = ""
    failure: str = ""


def watched(folder: Path, command: Sequence[str], *, seconds: float = 3600, anonymous: int = 1 << 60) -> Usage:
    """Run `command` in `folder`; kill it at a limit, which then is its failure. Its stderr is shown when it fails."""
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
