"""Make full-size checkpoints that take no disk space, and measure one passopt command."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

from passopt.testing.checkpoints import CheckpointSpec, make_checkpoint

GIB = 1 << 30


def make_sparse(folder: Path, spec: CheckpointSpec) -> Path:
    """Make a checkpoint whose bf16 weights are one sparse safetensors file, and return its folder.

    The file has a true header. Behind it is a hole as long as the weights, so that it takes no disk space.
    """
    checkpoint = make_checkpoint(folder, spec, trained=False, weights=False)
    entries, position = {}, 0
    for name, shape in spec.shapes().items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + position)
    return checkpoint


def measured(folder: Path, *arguments: str) -> tuple[str, float, float, float]:
    """Run one passopt command in `folder`, and return its stdout, wall seconds, CPU seconds and peak resident GiB.

    Raises SystemExit if the command fails.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "passopt", *arguments], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"full-size: passopt {arguments[0]} failed with exit code {process.returncode}")
    return output, time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GIB
