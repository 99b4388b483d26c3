"""Compare the time to shard and quantise full-size checkpoints with a plain copy; write docs/measured/bench-scale.md.

    python tools/bench weights [OUTPUT] [--sizes 7b 13b] [--work DIR] [--rounds N]

Random bf16 weights with the real names and shapes are exported and run through baichuan2,tp{degree=4},int8. The runs
take turns with a plain program that reads and writes as many bytes, also past the page cache. This takes up to ten
minutes and 60 GB of disk, which are free again at the end.
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
#: Bytes of disk that 13B takes: the checkpoint, and either the ranks or the file that the plain copy writes.
DISK = 46 * 10**9
#: Numbers of threads of the plain copy. The best time is the floor that passopt is compared with.
FLOOR_THREADS = (2, 4, 8)
#: Upper limits, set for 13B: wall time over the floor, peak GiB and CPU seconds of the run; then of the graph work.
GOALS = {"ratio": 1.5, "peak": 1.2, "cpu": 45.0, "export cpu": 120.0, "export peak": 1.0, "passes cpu": 5.0}


@dataclasses.dataclass
class Scale:
    """Hold what was measured for one size.

    Attributes:
        name: The size as the page names it.
        source: Bytes of the checkpoint's weight files.
        read: Bytes that a run reads.
        written: Bytes that a run writes.
        export: What `export` used.
        dry: What `run --dry-run` used.
        runs: What `run` used, one per round.
        floors: Seconds of the plain copy by its number of threads, one per round.
        samples: How many samples of tensors were compared with numpy.
    """

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
        """Return the run that took the least wall time."""
        return min(self.runs, key=lambda usage: usage.wall)

    @property
    def floor(self) -> float:
        """Return the least seconds of the plain copy, over all rounds and numbers of threads."""
        return min(min(times) for times in self.floors.values())


def passopt(folder: Path, *arguments: str) -> Usage:
    """Print and run one passopt command in `folder`, and return what it used."""
    print("$ passopt " + " ".join(arguments), flush=True)
    return measured(folder, sys.executable, "-m", "passopt", *arguments)


def measured(folder: Path, *command: str) -> Usage:
    """Run one process to its end and return what it used; raise SystemExit if it fails."""
    usage = watched(folder, command)
    if usage.failure:
        raise SystemExit(f"bench-scale: {' '.join(command)}: {usage.failure}")
    return usage


def run_size(root: Path, size: str, rounds: int) -> Scale:
    """Measure one size in the folder `root`, and remove its files afterwards.

    Raises SystemExit if a command fails, if the files differ in size from what the dry run said, or if a sampled tensor
    differs from what numpy computes.
    """
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
            raise SystemExit(f"bench-scale: the dry run promised files of {planned} bytes, the run wrote {found}")
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
    """Return the page as Markdown; `minutes` is how long the whole measurement took."""
    lines = [
        "# Writing full-size weights at the speed of the disk",
        "",
        "This page compares the time that passopt takes to turn checkpoints of the published sizes into "
        f"{DEGREE} int8 ranks with the time of a plain copy of as many bytes. It was measured in {minutes:.0f} minutes "
        f"on {processor()} with {os.cpu_count()} cores and numpy {np.__version__}. `make bench-scale` repeats the "
        "measurement and writes this page.",
        "",
        "The checkpoints hold random, finite bf16 weights with the published names and shapes, in three files. They "
        f"are exported by `export --weights=reference`. Then `run --passes '{PASSES}'` writes {DEGREE} ranks with int8 "
        "linears, an fp16 embedding and an fp16 head, and a digest of every tensor.",
        "",
        "How to read the table: `wall` is the time of the whole `run` command, graph passes included. `floor` is the "
        "time of a plain program that reads and writes as many bytes past the page cache and computes nothing, with "
        f"the best of {', '.join(map(str, FLOOR_THREADS))} threads. The rounds of both take turns, and the best round "
        "of each counts. `ratio` is wall over floor: 1.00 is as fast as the plain copy. `peak` is the largest memory "
        "of the process as the kernel records it; `anonymous` and `mapped` are the largest samples of its two parts.",
        "",
        table(
            (
                "model",
                "read GB",
                "written GB",
                "wall s",
                "floor s",
                "ratio",
                "CPU s",
                "peak GiB",
                "anonymous GiB",
                "mapped GiB",
            ),
            [_streaming_row(scale) for scale in scales],
        ),
        "",
        "The wall time of every round, and the time of the plain copy in every round by its number of threads:",
        "",
        table(
            ("model", "wall s", *(f"floor s, {threads} threads" for threads in FLOOR_THREADS)),
            [_rounds(scale) for scale in scales],
        ),
        "",
        "The work on the graph alone, in which no byte of a weight takes part: `export`, then `run --dry-run`, which "
        "runs all passes and computes the exact size of every output file.",
        "",
        table(
            ("model", "export CPU s", "export peak GiB", "dry run CPU s", "dry run peak GiB"),
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
        "Every output file had exactly the size that `--dry-run` had computed. "
        f"{sum(scale.samples for scale in scales)} samples of tensors (shards of q, k, v, o_proj and the MLP, the "
        "embedding and the NormHead) equal an independent numpy computation bit for bit.",
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
    """Return one line for each goal that a size misses; all sizes are held to the goals of 13B."""
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
    """Measure the sizes asked for, write and print the page, and raise SystemExit if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "measured" / "bench-scale.md"))
    parser.add_argument("--sizes", nargs="+", choices=["7b", "13b"], default=["7b", "13b"])
    parser.add_argument("--work", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds of run and plain copy, in turns (default: %(default)s)"
    )
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
        raise SystemExit("bench-scale: goals missed: " + "; ".join(missed))
