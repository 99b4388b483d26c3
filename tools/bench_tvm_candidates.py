"""What `bench_tvm` measures, one candidate per process: writes its model, or prints its times as JSON.

    python tools/bench_tvm_candidates.py write|measure JOB.json

A job names the `candidate` (machine, passopt, onnxruntime, torch), its `variant`, `model`, `shape`, and the points.
llama.cpp is asked in the same way, through bench_tvm_llama in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench_tvm_shapes import Shape


def write(job: dict[str, Any]) -> None:
    """The model of a job. torch and the machine need none."""
    folder, shape = Path(job["model"]), Shape(**job["shape"])
    if job["candidate"] == "onnxruntime":
        import bench_tvm_onnxruntime

        bench_tvm_onnxruntime.write(folder, shape, job["variant"])
    elif job["candidate"] == "passopt":
        import bench_tvm_passopt

        bench_tvm_passopt.write(folder, shape, job["variant"])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    if job["candidate"] == "onnxruntime":
        import bench_tvm_onnxruntime

        return bench_tvm_onnxruntime.measure(job)
    if job["candidate"] == "torch":
        import bench_tvm_torch

        return bench_tvm_torch.measure(job | {"dtype": job["variant"]})
    if job["candidate"] == "passopt":
        import bench_tvm_passopt

        return bench_tvm_passopt.measure(job)
    import bench_tvm_machine

    return bench_tvm_machine.measure(job)


def main(task: str, file: str) -> None:
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
