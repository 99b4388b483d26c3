"""Collect the measurements of compiled models, and write them as the page docs/measured/bench-tvm.md."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from compiled.shapes import HEAD_DIM, WHOLE_LABEL, Shape
from tables import processor, table

#: Candidates whose logits the others are compared with; the first one that was measured is the reference.
REFERENCES = ("torch fp32", "onnxruntime fp32", "onnxruntime MatMulNBits 8, blocks of 128", "passopt int8")
EIGHT_BITS = ("passopt W8A8", "passopt int8")
HALF_CACHE = ("passopt W8A8, fp16 cache",)
BYTE_CACHE = ("passopt W8A8, int8 cache",)
MAPPED = ("passopt W8A8, mapped",)
ONNXRUNTIME_8 = ("Dynamic", "MatMulInteger", "NBits")
#: Name of the comparison; candidates of passopt; parts of the names of competitors, of which the best counts; kind of
#: point (any, if empty); and the ratio to reach.
GOALS = (
    ("8-bit decode, against onnxruntime's best 8-bit form", EIGHT_BITS, ONNXRUNTIME_8, "decode", 1.3),
    ("8-bit decode, W8A8 mapped, against onnxruntime's best 8-bit form", MAPPED, ONNXRUNTIME_8, "decode", 1.3),
    (
        "8-bit decode, W8A8 with fp16 cache, against onnxruntime's best 8-bit form with fp32 cache",
        HALF_CACHE,
        ONNXRUNTIME_8,
        "decode",
        1.3,
    ),
    (
        "8-bit decode, W8A8 with int8 cache, against passopt's own with fp16 cache",
        BYTE_CACHE,
        HALF_CACHE,
        "decode",
        1.0,
    ),
    ("8-bit decode, against llama.cpp Q8_0", EIGHT_BITS, ("llama.cpp",), "decode", 1.1),
    ("8-bit prefill, against onnxruntime's best 8-bit form", EIGHT_BITS, ONNXRUNTIME_8, "prefill", 1.3),
    ("8-bit prefill, against llama.cpp Q8_0", EIGHT_BITS, ("llama.cpp",), "prefill", 1.5),
    ("fp32, against onnxruntime fp32", ("passopt fp32",), ("onnxruntime fp32",), "", 1.0),
    ("fp32, against torch fp32", ("passopt fp32",), ("torch fp32",), "", 1.0),
    ("int8 weight-only prefill, against passopt's own fp32", ("passopt int8",), ("passopt fp32",), "prefill", 1.0),
)
#: The share of the read bandwidth that 8-bit decode should reach.
BANDWIDTH_GOAL = 0.7
#: The limits of the machine, per second: bytes read, fp32 operations, and int8 operations.
LIMITS = ("read", "fp32", "int8")
#: Bytes of a number in the KV cache, of the candidates whose cache is not fp32; codes with a share of their scale.
CACHE_BYTES = dict.fromkeys(HALF_CACHE, 2.0) | dict.fromkeys(BYTE_CACHE, 1 + 4 / HEAD_DIM)
#: The competitor whose use of the bandwidth is shown beside passopt's.
CLOSEST_PEER = "onnxruntime DynamicQuantizeMatMul"


@dataclasses.dataclass
class Measured:
    """Hold what was measured of one candidate in one model.

    Attributes:
        times: Seconds per layer, or per whole model, by point. A point such as `decode 128 2` names its kind, its
            number of tokens and its number of threads.
        logits: The logits after one prompt.
        failure: Why the candidate failed; empty if it did not.
        shape: The shape that was measured last.
        others: The share of the machine that other programs used, in the quietest launch of the worst measurement.
        memory: Bytes of the largest of its processes, as `Memory.held` returns them.
    """

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    logits: list[float] = dataclasses.field(default_factory=list)
    failure: str = ""
    shape: Shape | None = None
    others: float = 0.0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, result: dict[str, Any], shape: Shape) -> None:
        """Add the result of one process that measured this candidate in `shape`."""
        self.shape = shape
        self.memory = max(
            self.memory, result["memory"], key=lambda item: item.get("private", 0) + item.get("mapped", 0)
        )
        self.logits = self.logits or result.get("logits", [])
        for point, times in points_of(result).items():
            self.times.setdefault(point, []).extend(time / divisor(shape) for time in times)

    def best(self, point: str) -> float | None:
        """Return the lowest seconds at a point, or None if it was not measured."""
        return min(self.times[point]) if self.times.get(point) else None

    def spread(self, points: Iterable[str]) -> float:
        """Return the largest ratio of median to lowest time of these points: near 1, the machine was quiet."""
        known = (self.times[point] for point in points if point in self.times)
        return max((statistics.median(times) / min(times) for times in known), default=1.0)

    @staticmethod
    def line(result: dict[str, Any], shape: Shape) -> str:
        """Return the lowest milliseconds at each point of one process's result, for the log."""
        points = points_of(result).items()
        return ", ".join(f"{point}: {1000 * min(times) / divisor(shape):.2f} ms" for point, times in points)


def points_of(result: dict[str, Any]) -> dict[str, list[float]]:
    """Return the times by point from the result of a process, without what else it holds."""
    return {name: times for name, times in result.items() if name.startswith(("decode", "prefill"))}


def divisor(shape: Shape) -> int:
    """Return what times are divided by: the number of layers, or 1 for a whole model."""
    return 1 if shape.is_whole else shape.layers


@dataclasses.dataclass
class Run:
    """Hold everything that one run of the benchmark has measured.

    Attributes:
        threads: The numbers of threads that are measured.
        measured: The measurements, by the label of the model and the name of the candidate.
        limits: The limits of the machine, by number of threads and by the names of `LIMITS`.
        notes: Paragraphs about this run for the page.
        seconds: How long the run took.
        load: Load averages of the machine, one for each measurement of its limits.
    """

    threads: tuple[int, ...]
    measured: dict[str, dict[str, Measured]] = dataclasses.field(default_factory=dict)
    limits: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    load: list[float] = dataclasses.field(default_factory=list)

    def of(self, label: str, candidate: str) -> Measured:
        """Return the measurements of a candidate in a model; they are empty at first."""
        return self.measured.setdefault(label, {}).setdefault(candidate, Measured())

    def machine(self, threads: int, speeds: dict[str, float]) -> None:
        """Keep the best of all measurements of the machine, since they are limits, and note its load."""
        known = self.limits.setdefault(threads, {})
        for name, speed in speeds.items():
            known[name] = max(known.get(name, 0.0), speed)
        self.load.append(os.getloadavg()[0])

    def failures(self) -> list[tuple[str, str]]:
        """Return the label of the model and the candidate's name of everything that failed."""
        found = ((label, name, item) for label, items in self.measured.items() for name, item in items.items())
        return [(label, name) for label, name, item in found if item.failure]


def report(run: Run) -> str:
    """Return the page as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("apache-tvm", "onnxruntime", "torch", "numpy"))
    load = ", ".join(f"{item:.1f}" for item in run.load)
    parts = [
        "# Speed of compiled models\n",
        "This page compares the speed of passopt's compiled models with the speed of onnxruntime, torch and llama.cpp "
        "on the same CPU, for single layers of the 7B and 13B shapes and for a whole 7B model. It was measured in "
        f"{run.seconds / 60:.0f} minutes on {processor()} with {os.cpu_count()} cores under {platform.system()}, with "
        f"{versions} and the llama.cpp of llama-cpp-python. `make bench-tvm` repeats the measurement and writes this "
        f"page. The load average of the machine, at the start and at the end, was {load}.\n",
        METHOD,
        *[f"{note}\n" for note in run.notes],
        "## The limits of the machine\n",
        "These are the most bytes that the machine reads per second, and the most fp32 and int8 operations that it "
        "does per second in registers.\n",
        limits(run),
        "## Speed-up over each competitor\n",
        "The lowest and the highest ratio that we measured, over all points of a row: 2.00 means that passopt is twice "
        "as fast. At each point, the best of the competitor's forms counts. For 8 bits, the fastest of passopt's forms "
        "counts too, unless the row says `mapped` or names a cache. A goal in bold is missed by the lowest ratio.\n",
        ratios(run),
        "## Use of the memory bandwidth\n",
        "The share of the machine's read bandwidth that decode reaches: the bytes of int8 weights and of the KV cache "
        "that one step must read, divided by its time and by the read bandwidth. `128: 96%` means 96 % with 128 tokens "
        "in the cache. Where a competitor is close to 100 %, memory leaves little room to be faster than it.\n",
        bandwidth(run),
    ]
    for label in run.measured:
        parts += [f"## {label}\n", *[one_model(run, label, threads) for threads in run.threads]]
    return "\n".join(parts).rstrip("\n") + "\n"


METHOD = """How to read the tables of the models:

- passopt's `int8` has int8 weights and fp32 activations. `W8A8` has int8 weights too, and quantises the activations to
  8 bits while it runs.
- `decode 128` is one step of decoding with 128 tokens in the cache, and `prefill 512` is a prompt of 512 tokens. `tp4`
  is what one of four tensor-parallel ranks holds of a layer. Layers are in milliseconds per layer, where less is
  better; the whole model is in tokens per second, where more is better.
- `spread` is the largest ratio of the median to the lowest time of the row's points. Near 1.00, the machine was quiet.
- `other load` is how much of the machine other programs used, in the quietest launch of the worst point.
- `memory GB` is what the largest process of the candidate came to hold: its own memory with the share of it in huge
  pages, or its own memory and the mapped files beside it.
- `error` is the largest difference of the logits after one prompt from the reference's, relative to the reference's
  largest logit.

How the times are measured: each candidate runs alone, in one process per number of threads. A time is the lowest of
several repeats in several launches. The launches of different candidates are interleaved, because the speed of a shared
machine's memory varies. Decode of a layer is timed in a model with as many layers as take 1 GiB, no two of them alike,
and divided by their number. Prefill is timed in a single layer, and the CPU caches are emptied before each repeat. All
candidates have the same random weights.

Where the weights lie: every candidate but `mapped` holds its weights in memory of its own, in huge pages. glibc and
torch are asked for huge pages for all candidates, which no tool does by itself. passopt copies the weights
(`--copy-weights`), onnxruntime packs them, and llama.cpp reads its file. A candidate has failed if it holds less memory
besides its caches than its weights take. `mapped` decodes as `generate` does unless told otherwise, with weights in
mapped files. Then the page cache decides on which NUMA node, of this machine or of a virtual machine's host, the
weights lie, and they may be read more slowly.

The number type of the cache: for `fp16 cache` the model was exported in fp16, as the stock checkpoints are used, and
then quantised; for `int8 cache` it ran through the pipeline `int8-cache`. Their times count only in the rows that name
them. The caches of the other tools are fp32, except llama.cpp's, which is fp16.

The competitors run in their best form. onnxruntime has fused operators and a cache that is updated in place through I/O
binding; the bias of ALiBi is made beforehand. torch has SDPA and a cache that is allocated beforehand. llama.cpp has
flash attention; in prefill of layers, the better of with and without counts. Its ALiBi layers are those of its model
`refact`. It computes all rows of a last layer only if all logits are asked for, as they are where layers are measured;
the head is then up to 4 % of its work. In the whole model, the past is random numbers in the cache, except for
llama.cpp, which computes it.
"""


def limits(run: Run) -> str:
    """Return the table of the machine's limits."""
    rows = []
    for threads, speeds in run.limits.items():
        cells = [f"{speeds.get(name, 0.0) / 1e9:,.1f}" for name in LIMITS]
        rows.append([str(threads), *cells])
    return table(["threads", "read GB/s", "fp32 GFLOPS", "int8 GOPS"], rows)


def point_key(point: str) -> tuple[str, int]:
    """Return the kind of a point and its number of tokens, by which points are sorted."""
    kind, number, _ = point.split()
    return kind, int(number)


def points(items: Iterable[Measured], threads: int) -> list[str]:
    """Return all points that were measured with this number of threads, in order."""
    found = {point for item in items for point in item.times if point.endswith(f" {threads}")}
    return sorted(found, key=point_key)


def one_model(run: Run, label: str, threads: int) -> str:
    """Return the table of one model and number of threads: ms per layer, or tokens/s of the whole model."""
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
    unit = "tokens per second" if whole else "milliseconds per layer"
    titles = [" ".join(point.split()[:2]) for point in columns]
    shown = table(["candidate", *titles, "spread", "other load", "memory GB", "error"], rows)
    failed = "".join(f"\n{name} failed: {item.failure[:200]}\n" for name, item in items.items() if item.failure)
    return f"With {threads} thread{'s' * (threads > 1)}, in {unit}:\n\n{shown}{failed}"


def _cell(seconds: float | None, point: str, whole: bool) -> str:
    if seconds is None:
        return ""
    kind, number = point_key(point)
    if whole:
        return f"{(number if kind == 'prefill' else 1) / seconds:,.2f}"
    return f"{1000 * seconds:,.2f}"


def _memory(held: dict[str, int]) -> str:
    """Return the private GB with their share of huge pages, or with the mapped GB if these are the larger part."""
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
    """Return the table of speed-ups over the competitors, by comparison, model and number of threads."""
    rows = []
    for goal, ours, parts, kind, least in GOALS:
        for label, items in run.measured.items():
            for threads in run.threads:
                found = _ratios(items, ours, parts, kind, threads)
                if found:
                    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
                    held = f"{least:.1f}" if min(found) >= least else f"**{least:.1f}**"
                    rows.append([goal, label, str(threads), low, high, held])
    return table(["comparison", "model", "threads", "lowest", "highest", "goal"], rows)


def _ratios(
    items: dict[str, Measured], ours: Sequence[str], parts: Sequence[str], kind: str, threads: int
) -> list[float]:
    """Return the competitors' best time over ours, at every point of `kind` (any if empty) that both have."""
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
    """Return the table of the bandwidth that 8-bit decode reaches, in passopt and its closest competitor."""
    rows = []
    for label, items in run.measured.items():
        for name in (*EIGHT_BITS, *MAPPED, *HALF_CACHE, *BYTE_CACHE, CLOSEST_PEER):
            item = items.get(name)
            if item is None or item.shape is None:
                continue
            for threads in run.threads:
                read, cache = run.limits[threads]["read"], CACHE_BYTES.get(name, 4.0)
                cells = [_share(item, point, read, cache) for point in points([item], threads)]
                decode = [cell for cell in cells if cell]
                if decode:
                    rows.append([name, label, str(threads), ", ".join(decode)])
    return table(["candidate", "model", "threads", f"share by tokens in the cache (goal: {BANDWIDTH_GOAL:.0%})"], rows)


def _share(item: Measured, point: str, read: float, cache_bytes: float) -> str:
    """Return one share of the read bandwidth with its past, such as `128: 96%`; empty if this is no point of decode."""
    kind, past = point_key(point)
    seconds = item.best(point)
    if kind != "decode" or item.shape is None or seconds is None:
        return ""
    shape = item.shape.with_layers(item.shape.layers if divisor(item.shape) == 1 else 1)
    weights = shape.read_parameters if shape.is_whole else shape.layer_parameters
    cache = 2 * cache_bytes * shape.width * past * shape.layers
    return f"{past}: {(weights + cache) / seconds / read:.0%}"
