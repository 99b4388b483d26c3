"""Write the model of one candidate of `compiled/bench.py`, or measure it and print its times as JSON.

    python tools/bench/compiled/candidates.py write|measure JOB.json

A job names the `candidate` (machine, passopt, onnxruntime, torch), its `variant`, `model` and `shape`, and the points
to measure. `with_llama_cpp.py` takes the same jobs for llama.cpp, in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

# A program finds only the modules beside it, but the modules of the benchmarks import each other from tools/bench.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compiled.shapes import Shape


def write(job: dict[str, Any]) -> None:
    """Write the model of a job for onnxruntime or passopt; torch and the machine need none."""
    folder, shape = Path(job["model"]), Shape(**job["shape"])
    if job["candidate"] == "onnxruntime":
        from compiled import with_onnxruntime

        with_onnxruntime.write(folder, shape, job["variant"])
    elif job["candidate"] == "passopt":
        from compiled import with_passopt

        with_passopt.write(folder, shape, job["variant"])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the candidate of a job, and return its results by point."""
    if job["candidate"] == "onnxruntime":
        from compiled import with_onnxruntime

        return with_onnxruntime.measure(job)
    if job["candidate"] == "torch":
        from compiled import with_torch

        return with_torch.measure(job | {"dtype": job["variant"]})
    if job["candidate"] == "passopt":
        from compiled import with_passopt

        return with_passopt.measure(job)
    from compiled import machine_limits

    return machine_limits.measure(job)


def main(task: str, file: str) -> None:
    """Write or measure as the job in `file` says, and print the results and the wall seconds as JSON."""
    job = json.loads(Path(file).read_text())
    start = time.monotonic()
    results: dict[str, Any] = {}
    if task == "write":
        write(job)
    else:
        results = measure(job)
    print(json.dumps(results | {"wall": time.monotonic() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
