"""Run the corpus in several processes, so that a crash or a hang of one model ends nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from outcomes import ORIGINAL

HERE = Path(__file__).resolve().parent
#: Seconds that one step may take; the start, which builds ONNX's models, may take longer.
STEP_LIMIT, START_LIMIT = 60.0, 300.0

#: A folder in memory, if there is one: models are written many times, and each write would wait for the disk.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

#: How often a process is started that dies before it takes a case.
_MOST_STARTS = 3

#: case, variant, step, outcome, detail
Row = tuple[str, str, str, str, str]


@dataclasses.dataclass
class _Share:
    """What one worker has to do, and how far it is."""

    options: dict[str, Any]
    at: list[str] = dataclasses.field(default_factory=list)


def run_all(options: Mapping[str, Any], number: int) -> Iterator[Row]:
    """Run the corpus in `number` processes and yield a row for each outcome as it comes."""
    rows: queue.Queue[Row | None] = queue.Queue()
    threads = []
    for index in range(number):
        share = _Share({**options, "share": [index, number], "done": [], "skip": []})
        threads.append(threading.Thread(target=_run_share, args=(share, rows), daemon=True))
        threads[-1].start()
    running = number
    while running:
        row = rows.get()
        running -= row is None
        if row is not None:
            yield row


def _run_share(share: _Share, rows: queue.Queue[Row | None]) -> None:
    """Run a worker until its share is done; start another one where it hangs or dies."""
    try:
        starts = 0
        while (reason := _run_once(share, rows)) is not None:
            case, variant, step = share.at or ["(start)", "", ""]
            starts = starts + 1 if case == "(start)" else 0
            is_known = [case, variant, step] in share.options["skip"]
            if case != "(start)":
                share.options["skip"].append([case, variant, step])
            if is_known:  # the model as it is ends the process with its own inputs too
                share.options["done"].append([case, variant])
            if (case != "(start)" and step != ORIGINAL) or starts == _MOST_STARTS:
                rows.put((case, variant, step, "hang", reason))
            if starts == _MOST_STARTS:
                return
    finally:
        rows.put(None)


def _run_once(share: _Share, rows: queue.Queue[Row | None]) -> str | None:
    """Run one process; return None if it did all, else why it ended."""
    command = [sys.executable, str(HERE / "worker.py")]
    # onnxruntime hands out memory that it has not written where lengths mean nothing to an operator, such as an odd
    # size of RotaryEmbedding. The C library fills all memory with one byte, so that both sides hold the same there.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "85"}
    with (
        # It belongs to this process, as a worker that is killed removes nothing.
        tempfile.TemporaryDirectory(prefix="passopt-corpus-", dir=_MEMORY) as folder,
        tempfile.TemporaryFile("w+", errors="replace") as log,
        tempfile.TemporaryFile("w+") as given,
    ):
        # What is done grows too long for an argument.
        json.dump({**share.options, "folder": folder}, given)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        share.at = []
        try:
            while True:
                line = lines.get(timeout=STEP_LIMIT if share.at and share.at[0] != "(start)" else START_LIMIT)
                if line is None:
                    break
                _take(json.loads(line), share, rows)
            code = process.wait()
        except queue.Empty:
            return f"no answer within {STEP_LIMIT:.0f} s"
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()
        if code == 0:
            return None
        log.seek(0)
        return f"exit code {code}: {(log.read().strip().splitlines() or ['nothing was printed'])[-1]}"


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _take(item: Mapping[str, Any], share: _Share, rows: queue.Queue[Row | None]) -> None:
    if "at" in item:
        share.at = item["at"]
        return
    case, variant = item["done"]
    share.options["done"].append([case, variant])
    for step, (kind, detail) in item["outcomes"].items():
        rows.put((case, variant, step, kind, detail))
