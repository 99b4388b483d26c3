"""Measure full-size checkpoints on their way to sharded int8 against the disk's speed, and write docs/bench-scale.md.

    python tools/bench weights [OUTPUT] [--sizes 7b 13b] [--work DIR] [--rounds N]

Random bf16 weights of the real names and shapes are exported and run through baichuan2,tp{degree=4},int8, in turns with
a plain program that reads and writes as many bytes by the same route. This takes up to ten minutes and 60 GB of disk,
which it gives back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from passopt.testing.checkpoints import full_size_spec
from process_usage import GIB, Usage, watched
from tables import processor, table
from weights.check import check_samples
from weights.random_checkpoint import make_random

ROOT = Path(__file__).resolve().parents[3]
FLOOR_PROGRAM = ROOT / "tools" / "bench" / "weights" / "plain_copy.py"
DEGREE = 4
PASSES = f"baichuan2,tp{{degree={DEGREE}}},int8"
#: Bytes that 13B takes: the checkpoint, and the ranks or what the floor writes.
DISK = 46 * 10**9
#: Threads of the floor; its best counts.
FLOOR_THREADS = (2, 4, 8)
#: What must hold of 13B: wall over floor, peak GiB, CPU seconds of the run; seconds and GiB of the graph's side.
GOALS = {"ratio": 1.5, "peak": 1.2, "cpu": 45.0, "export cpu": 120.0, "export peak": 1.0, "passes cpu": 5.0}


@dataclasses.dataclass
class Scale:
    """What was measured of one size."""

    name: str
    source: int = 0
    read: int = 0
    written: int = 0
    export: Usage = dataclasses.field(default_factory=Usage)
    dry: Usage = dataclasses.field(default_factory=Usage)
    runs: list[Usage] = dataclasses.field(default_factory=list)
    floors: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    samples: int = 0

    @property
    def best(self) -> Usage:
        return min(self.runs, key=lambda usage: usage.wall)

    @property
    def floor(self) -> float:
        return min(min(times) for times in self.floors.values())


def passopt(folder: Path, *arguments: str) -> Usage:
    print("$ passopt " + " ".join(arguments), flush=True)
    return measured(folder, sys.executable, "-m", "passopt", *arguments)


def measured(folder: Path, *command: str) -> Usage:
    """One process to its end. SystemExit if it fails."""
    usage = watched(folder, command)
    if usage.failure:
        raise SystemExit(f"bench-scale: {' '.join(command)}: {usage.failure}")
    return usage


def run_size(root: Path, size: str, rounds: int) -> Scale:
    """Everything of one size, in `root`; its files are gone afterwards."""
    scale = Scale(size.upper())
    start = time.monotonic()
    checkpoint = make_random(root / size, full_size_spec("7b" if size == "7b" else "13b"))
    files = sorted(checkpoint.glob("*.safetensors"))
    scale.source = sum(file.stat().st_size for file in files)
    print(f"{scale.name}: {scale.source / 1e9:.1f} GB of weights made in {time.monotonic() - start:.0f} s", flush=True)
    options = ("--weights=reference", "--no-self-check", "--trust-remote-code")
    scale.export = passopt(root, "export", size, "-o", "exported", *options)
    scale.dry = passopt(root, "run", "exported", "--passes", PASSES, "--dry-run", "--json")
    planned = json.loads(scale.dry.output)["files"]
    for round_ in range(rounds):
        scale.runs.append(passopt(root, "run", "exported", "--passes", PASSES, "-o", "ranks", "--json"))
        report = json.loads(scale.runs[-1].output)
        scale.read, scale.written = report["stream"]["read"], report["stream"]["written"]
        found = {str(path.relative_to(root / "ranks")): path.stat().st_size for path in (root / "ranks").rglob("*.*")}
        if found != planned:
            raise SystemExit(f"bench-scale: the dry run said {planned}, written was {found}")
        if round_ == 0:
            scale.samples = check_samples(checkpoint, root / "ranks", DEGREE)
        shutil.rmtree(root / "ranks")
        for threads in FLOOR_THREADS:
            scale.floors.setdefault(threads, []).append(_floor(root, threads, scale.written, files))
    shutil.rmtree(checkpoint)
    shutil.rmtree(root / "exported")
    return scale


def _floor(root: Path, threads: int, nbytes: int, files: list[Path]) -> float:
    output = root / "floor.bin"
    usage = measured(root, sys.executable, str(FLOOR_PROGRAM), str(threads), str(nbytes), str(output), *map(str, files))
    output.unlink()
    seconds = float(usage.output)
    print(f"floor, {threads} threads: {seconds:.1f} s", flush=True)
    return seconds


def report(scales: list[Scale], minutes: float) -> str:
    lines = [
        "# Full-size weights at the speed of the disk",
        "",
        f"Made by `make bench-scale` in {minutes:.0f} minutes on {processor()}, {os.cpu_count()} cores, "
        f"numpy {np.__version__}.",
        "",
        f"Random finite bf16 checkpoints with the published names, shapes and three files → `export --weights="
        f"reference` → `run --passes '{PASSES}'`: {DEGREE} ranks of int8, embedding and head fp16, a digest for every "
        "tensor. The floor is a plain program that reads and writes as many bytes past the page cache and computes "
        f"nothing, best of {', '.join(map(str, FLOOR_THREADS))} threads. Wall is the whole command, graph passes "
        "included; both are the best of their rounds, taken in turns. Memory is the kernel's peak of the process; "
        "anonymous and mapped parts are sampled.",
        "",
        table(
            ("", "read GB", "written GB", "wall s", "floor s", "ratio", "CPU s", "peak GiB", "anonymous", "mapped"),
            [_streaming_row(scale) for scale in scales],
        ),
        "",
        "Wall of every round, and the floor by threads:",
        "",
        table(
            ("", "wall s", *(f"floor, {threads}" for threads in FLOOR_THREADS)), [_rounds(scale) for scale in scales]
        ),
        "",
        "The graph's side, of which no weight byte is a part:",
        "",
        table(
            ("", "export CPU s", "export peak GiB", "passes and plan CPU s", "peak GiB"),
            [
                (
                    scale.name,
                    f"{scale.export.cpu:.1f}",
                    f"{scale.export.peak / GIB:.2f}",
                    f"{scale.dry.cpu:.1f}",
                    f"{scale.dry.peak / GIB:.2f}",
                )
                for scale in scales
            ],
        ),
        "",
        f"Every size was written to the byte as `--dry-run` said, and {sum(scale.samples for scale in scales)} sampled "
        "tensors (shards of q, k, v, of o_proj and of the MLP, embedding, NormHead) equal an independent numpy "
        "computation bit for bit.",
        "",
    ]
    return "\n".join(lines)


def _streaming_row(scale: Scale) -> tuple[str, ...]:
    best = scale.best
    return (
        scale.name,
        f"{scale.read / 1e9:.2f}",
        f"{scale.written / 1e9:.2f}",
        f"{best.wall:.1f}",
        f"{scale.floor:.1f}",
        f"{best.wall / scale.floor:.2f}",
        f"{best.cpu:.1f}",
        f"{best.peak / GIB:.2f}",
        f"{best.anonymous / GIB:.2f}",
        f"{best.mapped / GIB:.2f}",
    )


def _rounds(scale: Scale) -> tuple[str, ...]:
    floors = (", ".join(f"{seconds:.1f}" for seconds in scale.floors[threads]) for threads in FLOOR_THREADS)
    return (scale.name, ", ".join(f"{usage.wall:.1f}" for usage in scale.runs), *floors)


def failures(scale: Scale) -> list[str]:
    """What does not hold of the goals, which are those of 13B."""
    found: dict[str, Any] = {
        "ratio": scale.best.wall / scale.floor,
        "peak": max(usage.peak for usage in scale.runs) / GIB,
        "cpu": scale.best.cpu,
        "export cpu": scale.export.cpu,
        "export peak": scale.export.peak / GIB,
        "passes cpu": scale.dry.cpu,
    }
    return [
        f"{scale.name}: {name} {found[name]:.2f}, goal {goal}" for name, goal in GOALS.items() if found[name] > goal
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/bench weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "bench-scale.md"))
    parser.add_argument("--sizes", nargs="+", choices=["7b", "13b"], default=["7b", "13b"])
    parser.add_argument("--work", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=2, help="of run and floor in turns (default: %(default)s)")
    options = parser.parse_args(arguments)
    free = shutil.disk_usage(options.work or tempfile.gettempdir()).free
    if free < DISK:
        raise SystemExit(f"bench-scale: needs {DISK / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free; give --work DIR")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="passopt-bench-scale-", dir=options.work) as folder:
        scales = [run_size(Path(folder), size, options.rounds) for size in options.sizes]
    text = report(scales, (time.monotonic() - start) / 60)
    Path(options.output).write_text(text)
    print(text)
    missed = [line for scale in scales for line in failures(scale)]
    if missed:
        raise SystemExit("bench-scale: does not hold: " + "; ".join(missed))
