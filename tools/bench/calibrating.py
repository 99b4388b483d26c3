"""Measure what calibrating one 13B-shaped layer takes, against what its arithmetic takes at the machine's GEMM rate.

    python tools/bench calibrate [--tokens 16384] [--seqlen 512] [--threads N] [--work DIR] [--record]

A checkpoint of two random layers is exported and fused; the first layer is calibrated in a process of its own, with
codes by GPTQ, the statistics of all inputs, and those of keys and values. CPU time counts from the end of the embedding
to the end of the layer. Goals: 2.5 GiB of memory, and 1.3 times the CPU time that as many floating-point operations
take in products of large matrices. `--record` writes docs/measured/bench-calibrate.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from process_usage import GIB, watched
from tables import processor, table

ROOT = Path(__file__).resolve().parents[2]
#: 13B: 40 layers.
LAYERS, VOCABULARY = 40, 1024
GOAL_PEAK, GOAL_RATIO = 2.5, 1.3
_SIZE = 2048


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and exit with 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        "python tools/bench calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens in all (default: 16384)")
    parser.add_argument("--seqlen", type=int, default=512, metavar="N", help="tokens of a window (default: 512)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="threads")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep checkpoint and export here, and use them again")
    parser.add_argument("--record", action="store_true", help="write docs/measured/bench-calibrate.md")
    parser.add_argument("--child", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(calibrate_layer(options.child, options.tokens, options.seqlen, options.threads)))
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="passopt-bench-"))
    try:
        found = measure(prepared(work), options.tokens, options.seqlen, options.threads)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = report(found, options)
    print(text)
    if options.record:
        (ROOT / "docs" / "measured" / "bench-calibrate.md").write_text(page(text))
    if found["peak"] > GOAL_PEAK * GIB or found["ratio"] > GOAL_RATIO:
        raise SystemExit("calibrate: beyond the goal")


def prepared(work: Path) -> Path:
    """Return the folder of a fused model of two layers of 13B's shape, made if it is not there."""
    from passopt.testing.checkpoints import full_size_spec
    from weights.random_checkpoint import make_random

    model = work / "model"
    if model.exists():
        return model
    work.mkdir(parents=True, exist_ok=True)
    spec = dataclasses.replace(full_size_spec("13b"), layers=2, vocab=VOCABULARY)
    checkpoint = make_random(work / "checkpoint", spec, shards=1)
    export = ("export", str(checkpoint), "-o", str(work / "exported"), "--dtype=fp32", "--weights=reference")
    for command in (
        (*export, "--trust-remote-code", "--no-self-check"),
        ("run", str(work / "exported"), "--passes", "baichuan2", "-o", str(model), "--weights=reference"),
    ):
        usage = watched(work, [sys.executable, "-m", "passopt", *command])
        if usage.failure:
            raise SystemExit(f"calibrate: passopt {command[0]} {usage.failure}")
    return model


def measure(model: Path, tokens: int, length: int, threads: int) -> dict[str, float]:
    """Return what a process of its own used for the layer, and the ratio to the arithmetic."""
    sizes = ("--tokens", str(tokens), "--seqlen", str(length), "--threads", str(threads))
    command = [sys.executable, str(Path(__file__).parent), "calibrate", "--child", str(model), *sizes]
    usage = watched(ROOT, command, seconds=7200)
    if usage.failure:
        raise SystemExit(f"calibrate: {usage.failure}")
    found: dict[str, float] = json.loads(usage.output.splitlines()[-1])
    found["anonymous"], found["peak"] = usage.anonymous, usage.peak
    found["ratio"] = found["cpu"] / (found["flops"] / found["rate"])
    return found


def gemm_rate() -> float:
    """Return the floating-point operations per second of one core in a product of large matrices."""
    import threadpoolctl

    left, right = (np.random.default_rng(seed).standard_normal((_SIZE, _SIZE), np.float32) for seed in (0, 1))
    times = []
    with threadpoolctl.threadpool_limits(1):
        for _ in range(7):
            start = time.process_time()
            left @ right
            times.append(time.process_time() - start)
    return 2.0 * _SIZE**3 / min(times)


def calibrate_layer(path: Path, tokens: int, length: int, threads: int) -> dict[str, float]:
    """Calibrate the first layer, and return CPU and wall seconds, the arithmetic of it, and the rate of the machine."""
    import passopt
    from passopt.calibration.calibrate import calibrate
    from passopt.calibration.meter import Meter
    from passopt.calibration.parts import Settings
    from passopt.calibration.targets import subject_of

    class Stopwatch(Meter):
        """Notes the time at the end of each piece, and stops after the layer."""

        times: list[tuple[float, float]]

        def end_piece(self) -> None:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.times.append((usage.ru_utime + usage.ru_stime, time.monotonic()))
            if len(self.times) == 2:
                raise KeyboardInterrupt

    rate = gemm_rate()
    model = passopt.load(path)
    subject = subject_of(model.ir)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (tokens // length, length))
    watch = Stopwatch()
    watch.times = []
    folder = Path(tempfile.mkdtemp(prefix="calibrate-", dir=path.parent))
    try:
        calibrate(subject, ids, Settings(threads=threads), folder / "calib", {}, {}, watch, lambda note: None)
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder)
    (cpu0, wall0), (cpu1, wall1) = watch.times
    shapes = [target.weight.shape for target in subject.targets[: len(subject.targets) // 2]]
    return {"cpu": cpu1 - cpu0, "wall": wall1 - wall0, "rate": rate, "flops": flops(shapes, ids.size, length)}


def flops(shapes: Sequence[tuple[int, ...]], tokens: int, length: int) -> float:
    """Return the operations of one layer: its linears and attention once, sums, factors and codes.

    Linears of the same input share sum and factor; they are told by their widths, of which 5120 comes three times.
    """
    hidden = min(width for _, width in shapes)
    widths = [hidden] * 3 + [width for _, width in shapes if width != hidden]
    linears = sum(2.0 * tokens * count * width for count, width in shapes)
    attention = 4.0 * tokens * length * hidden
    sums = sum(float(tokens) * width * width for width in widths)
    factors = sum(2.0 / 3 * width**3 for width in widths)
    codes = sum(float(count) * width * width for count, width in shapes)
    return linears + attention + sums + factors + codes


def report(found: dict[str, float], options: argparse.Namespace) -> str:
    """Return the table, and what it means for all layers."""
    ideal = found["flops"] / found["rate"]
    rows = [
        ["CPU seconds", f"{found['cpu']:.0f}", f"{ideal:.0f} · {GOAL_RATIO} = {ideal * GOAL_RATIO:.0f}"],
        ["… over the arithmetic's", f"{found['ratio']:.2f}", f"{GOAL_RATIO}"],
        ["wall seconds", f"{found['wall']:.0f}", "-"],
        ["peak memory, GiB", f"{found['peak'] / GIB:.2f}", f"{GOAL_PEAK}"],
        ["… anonymous, GiB", f"{found['anonymous'] / GIB:.2f}", "-"],
    ]
    hours = found["cpu"] * LAYERS / 3600
    return (
        f"{processor()}, {options.threads} threads; {options.tokens:,} tokens in windows of {options.seqlen}; "
        f"{found['flops'] / 1e12:.1f} TFLOP at {found['rate'] / 1e9:.0f} GFLOP/s a core\n\n"
        f"{table(['one 13B-shaped layer', 'measured', 'goal'], rows)}\n\n"
        f"All {LAYERS} layers would take {hours:.1f} CPU hours."
    )


def page(text: str) -> str:
    """Return the page of the documentation."""
    return (
        "# The cost of calibration\n\n<!-- written by `make bench-calibrate`; do not edit -->\n\n"
        "One decoder layer of Baichuan2-13B's shape (5120×15360, 5120×5120, twice 5120×13696, 13696×5120) with random\n"
        "weights, calibrated by GPTQ with all statistics: `make bench-calibrate`.\n\n" + text + "\n"
    )
