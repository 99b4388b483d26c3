"""Collect what was measured of compiled models, and make docs/bench-tvm.md of it."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from compiled.shapes import WHOLE_LABEL, Shape
from tables import processor, table

#: Numbers of a candidate's logits behind one prompt that may differ from those of the reference, relative.
REFERENCES = ("torch fp32", "onnxruntime fp32", "onnxruntime MatMulNBits 8, blocks of 128", "passopt int8")
EIGHT_BITS = ("passopt W8A8", "passopt int8")
HALF_CACHE = ("passopt W8A8, fp16 cache",)
MAPPED = ("passopt W8A8, mapped",)
ONNXRUNTIME_8 = ("Dynamic", "MatMulInteger", "NBits")
#: Candidate of passopt, peers whose best counts, kind of point, and the ratio that must hold.
GOALS = (
    ("8-bit decode : onnxruntime's best 8-bit", EIGHT_BITS, ONNXRUNTIME_8, "decode", 1.3),
    ("8-bit decode, W8A8 mapped : onnxruntime's best 8-bit", MAPPED, ONNXRUNTIME_8, "decode", 1.3),
    (
        "8-bit decode, W8A8 with fp16 cache : onnxruntime's best 8-bit, fp32 cache",
        HALF_CACHE,
        ONNXRUNTIME_8,
        "decode",
        1.3,
    ),
    ("8-bit decode : llama.cpp Q8_0", EIGHT_BITS, ("llama.cpp",), "decode", 1.1),
    ("8-bit prefill : onnxruntime's best 8-bit", EIGHT_BITS, ONNXRUNTIME_8, "prefill", 1.3),
    ("8-bit prefill : llama.cpp Q8_0", EIGHT_BITS, ("llama.cpp",), "prefill", 1.5),
    ("fp32 : onnxruntime fp32", ("passopt fp32",), ("onnxruntime fp32",), "", 1.0),
    ("fp32 : torch fp32", ("passopt fp32",), ("torch fp32",), "", 1.0),
    ("int8 weight-only prefill : fp32 of passopt", ("passopt int8",), ("passopt fp32",), "prefill", 1.0),
)
BANDWIDTH_GOAL = 0.7
#: What the machine can do at most: bytes read, operations with numbers of 4 bytes and of 1, per second.
LIMITS = ("read", "fp32", "int8")
#: Bytes of a number in the caches; others' are fp32.
CACHE_BYTES = dict.fromkeys(HALF_CACHE, 2)
CLOSEST_PEER = "onnxruntime DynamicQuantizeMatMul"


@dataclasses.dataclass
class Measured:
    """Times of one candidate by point (`decode 128 2`: kind, tokens, threads), in seconds per layer or per model."""

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    logits: list[float] = dataclasses.field(default_factory=list)
    failure: str = ""
    shape: Shape | None = None
    #: Share of the machine that other programs used in the quietest launch, at the worst point.
    others: float = 0.0
    #: Bytes of the largest of its processes, as `Memory.held` says.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, result: dict[str, Any], shape: Shape) -> None:
        self.shape = shape
        self.memory = max(
            self.memory, result["memory"], key=lambda item: item.get("private", 0) + item.get("mapped", 0)
        )
        self.logits = self.logits or result.get("logits", [])
        for point, times in points_of(result).items():
            self.times.setdefault(point, []).extend(time / divisor(shape) for time in times)

    def best(self, point: str) -> float | None:
        return min(self.times[point]) if self.times.get(point) else None

    def spread(self, points: Iterable[str]) -> float:
        """The largest median over best of these points, as a measure of how quiet the machine was."""
        known = (self.times[point] for point in points if point in self.times)
        return max((statistics.median(times) / min(times) for times in known), default=1.0)

    @staticmethod
    def line(result: dict[str, Any], shape: Shape) -> str:
        points = points_of(result).items()
        return ", ".join(f"{point}: {1000 * min(times) / divisor(shape):.2f} ms" for point, times in points)


def points_of(result: dict[str, Any]) -> dict[str, list[float]]:
    return {name: times for name, times in result.items() if name.startswith(("decode", "prefill"))}


def divisor(shape: Shape) -> int:
    """Layers are reported per layer, a model with a true vocabulary as a whole."""
    return 1 if shape.is_whole else shape.layers


@dataclasses.dataclass
class Run:
    """Everything of one run, by model and candidate."""

    threads: tuple[int, ...]
    measured: dict[str, dict[str, Measured]] = dataclasses.field(default_factory=dict)
    limits: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    load: list[float] = dataclasses.field(default_factory=list)

    def of(self, label: str, candidate: str) -> Measured:
        return self.measured.setdefault(label, {}).setdefault(candidate, Measured())

    def machine(self, threads: int, speeds: dict[str, float]) -> None:
        """The better of all measurements of the machine: it is a limit."""
        known = self.limits.setdefault(threads, {})
        for name, speed in speeds.items():
            known[name] = max(known.get(name, 0.0), speed)
        self.load.append(os.getloadavg()[0])

    def failures(self) -> list[tuple[str, str]]:
        found = ((label, name, item) for label, items in self.measured.items() for name, item in items.items())
        return [(label, name) for label, name, item in found if item.failure]


def report(run: Run) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("apache-tvm", "onnxruntime", "torch", "numpy"))
    load = ", ".join(f"{item:.1f}" for item in run.load)
    parts = [
        "# Speed of compiled models\n",
        f"Made by `make bench-tvm` in {run.seconds / 60:.0f} minutes on {processor()}, {os.cpu_count()} cores, "
        f"{platform.system()}, {versions}, llama.cpp of llama-cpp-python. Load of the machine when it was measured "
        f"itself, at start and end: {load}.\n",
        METHOD,
        *[f"{note}\n" for note in run.notes],
        "## The machine\n",
        limits(run),
        "## Ratios\n",
        "How many times as fast as the best of the peers, least and greatest over all points of a row; for 8 bits the "
        "fastest of passopt's forms at each point, unless the row says mapped. What does not hold is in bold.\n",
        ratios(run),
        "Bytes of int8 weights and of the cache that a decode must read, over its time and the read bandwidth. Where a "
        "peer is near 100 %, memory leaves nothing to be faster by:\n",
        bandwidth(run),
    ]
    for label in run.measured:
        parts += [f"## {label}\n", *[one_model(run, label, threads) for threads in run.threads]]
    return "\n".join(parts).rstrip("\n") + "\n"


METHOD = """Each candidate runs alone, in a process per number of threads. A time is the least of several repeats and
of several launches, interleaved with those of the others, since the speed of a shared machine's memory varies;
`spread` is the largest median over the least, `others` how much of the machine other programs used in the quietest
launch. Decode of a layer is timed in a model of so many layers that they take 1 GiB, no two of them alike, and divided
by their number; prefill in one layer, with caches evicted before each repeat. Weights are the same random numbers for
all, and `error` is the largest difference of logits behind one prompt, relative to the largest of the reference's.

Everyone holds its weights in memory of its own, in huge pages (asked of glibc and torch for all of them, which nobody
does unless told): passopt copies them (`--copy-weights`), onnxruntime packs them, llama.cpp reads its file. `memory` is
what the largest process of a candidate came to hold; one that holds less beside its caches than its weights take has
failed. `mapped` is decoding as `generate` loads weights unless asked. There the page cache decides on which NUMA node,
of this machine or of a virtual one's host, the weights lie, and they may be read more slowly. With `fp16 cache` the
model was exported in fp16, as the stock checkpoints are used, and then quantised; it is not what other rows count. The
caches of others are fp32, but llama.cpp's, which is fp16.

Peers get their best: fused operators and a cache in place through I/O binding for onnxruntime (ALiBi's bias made
beforehand), SDPA with a cache allocated beforehand for torch, flash attention for llama.cpp (in prefill of layers the
better of with and without). Its ALiBi layers are those of `refact`. It computes all rows of a last layer only where all
logits are asked for, as they are where layers are measured: their head is up to 4 % of its work. In the whole model the
past is random numbers in the cache, but for llama.cpp, which computes it.
"""


def limits(run: Run) -> str:
    rows = []
    for threads, speeds in run.limits.items():
        cells = [f"{speeds.get(name, 0.0) / 1e9:,.1f}" for name in LIMITS]
        rows.append([str(threads), *cells])
    return table(["threads", "read GB/s", "fp32 GFLOPS", "int8 GOPS"], rows)


def point_key(point: str) -> tuple[str, int]:
    kind, number, _ = point.split()
    return kind, int(number)


def points(items: Iterable[Measured], threads: int) -> list[str]:
    found = {point for item in items for point in item.times if point.endswith(f" {threads}")}
    return sorted(found, key=point_key)


def one_model(run: Run, label: str, threads: int) -> str:
    """Milliseconds of every candidate, per layer or (whole) tokens per second."""
    items = run.measured[label]
    columns = points(items.values(), threads)
    whole = label.startswith(WHOLE_LABEL)
    reference = next((name for name in REFERENCES if name in items and items[name].logits), None)
    rows = []
    for name, item in items.items():
        cells = [_cell(item.best(point), point, whole) for point in columns]
        rows.append(
            [
                name,
                *cells,
                f"{item.spread(columns):.2f}",
                f"{item.others:.0%}",
                _memory(item.memory),
                _error(item, items[reference]) if reference else "",
            ]
        )
    unit = "tokens/s" if whole else "ms per layer"
    titles = [" ".join(point.split()[:2]) for point in columns]
    shown = table(["", *titles, "spread", "others", "memory GB", "error"], rows)
    failed = "".join(f"\n{name} failed: {item.failure[:200]}\n" for name, item in items.items() if item.failure)
    return f"{threads} thread{'s' * (threads > 1)}, {unit}:\n\n{shown}{failed}"


def _cell(seconds: float | None, point: str, whole: bool) -> str:
    if seconds is None:
        return ""
    kind, number = point_key(point)
    if whole:
        return f"{(number if kind == 'prefill' else 1) / seconds:,.2f}"
    return f"{1000 * seconds:,.2f}"


def _memory(held: dict[str, int]) -> str:
    """Private memory and the share of huge pages in it, or with the files mapped where they are most of it."""
    if not held:
        return ""
    private, mapped = f"{held['private'] / 1e9:.2f}", f"{held['mapped'] / 1e9:.2f}"
    if held["mapped"] > held["private"]:
        return f"{private} + {mapped} mapped"
    return f"{private} ({held['huge'] / max(held['private'], 1):.0%} huge)"


def _error(item: Measured, reference: Measured) -> str:
    if item is reference:
        return "reference"
    if len(item.logits) != len(reference.logits) or not item.logits:
        return ""
    ours, theirs = np.array(item.logits), np.array(reference.logits)
    return f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"


def ratios(run: Run) -> str:
    rows = []
    for goal, ours, parts, kind, least in GOALS:
        for label, items in run.measured.items():
            for threads in run.threads:
                found = _ratios(items, ours, parts, kind, threads)
                if found:
                    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
                    held = f"{least:.1f}" if min(found) >= least else f"**{least:.1f}**"
                    rows.append([goal, label, str(threads), low, high, held])
    return table(["", "model", "threads", "least", "greatest", "goal"], rows)


def _ratios(
    items: dict[str, Measured], ours: Sequence[str], parts: Sequence[str], kind: str, threads: int
) -> list[float]:
    """Peers' best time over ours at every point of `kind` (any if empty) that both have."""
    mine = [item for name, item in items.items() if name in ours]
    theirs = [item for name, item in items.items() if name not in ours and any(part in name for part in parts)]
    found = []
    for point in points(mine, threads):
        our_best, their_best = _least(mine, point), _least(theirs, point)
        if point.startswith(kind) and our_best and their_best:
            found.append(their_best / our_best)
    return found


def _least(items: Iterable[Measured], point: str) -> float | None:
    return min((best for item in items if (best := item.best(point))), default=None)


def bandwidth(run: Run) -> str:
    """Share of the read bandwidth that 8-bit decode reaches, passopt's and its closest peer's, by model and past."""
    rows = []
    for label, items in run.measured.items():
        for name in (*EIGHT_BITS, *MAPPED, *HALF_CACHE, CLOSEST_PEER):
            item = items.get(name)
            if item is None or item.shape is None:
                continue
            for threads in run.threads:
                read, cache = run.limits[threads]["read"], CACHE_BYTES.get(name, 4)
                cells = [_share(item, point, read, cache) for point in points([item], threads)]
                decode = [cell for cell in cells if cell]
                if decode:
                    rows.append([name, label, str(threads), ", ".join(decode)])
    return table(["", "model", "threads", f"passopt's goal {BANDWIDTH_GOAL:.0%}"], rows)


def _share(item: Measured, point: str, read: float, cache_bytes: int) -> str:
    """int8 weights, and the cache of the layers."""
    kind, past = point_key(point)
    seconds = item.best(point)
    if kind != "decode" or item.shape is None or seconds is None:
        return ""
    shape = item.shape.with_layers(item.shape.layers if divisor(item.shape) == 1 else 1)
    weights = shape.read_parameters if shape.is_whole else shape.layer_parameters
    cache = 2 * cache_bytes * shape.width * past * shape.layers
    return f"{past}: {(weights + cache) / seconds / read:.0%}"
