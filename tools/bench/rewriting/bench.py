"""Measure the CPU time and memory of rewriting in passopt and other tools, and write docs/measured/bench-rewrite.md.

    python tools/bench rewriting [OUTPUT]

One candidate at a time is measured, each in a process of its own that is stopped at a limit of CPU seconds and memory.
This takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import psutil

from passopt.testing.checkpoints import full_size_spec
from rewriting.graphs import make_graph
from sparse_checkpoint import make_sparse, measured
from tables import processor, table

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools" / "bench" / "rewriting" / "candidates.py"
#: Limits at which a candidate is stopped: CPU seconds, and resident MiB.
SECONDS = 60.0
MIB = 4096.0
RULE_TASKS = ("rms-norm", "silu", "attention", "all-three", "misses")
RULE_CANDIDATES = ("passopt", "onnxscript", "onnxscript, commuted")
#: Numbers of layers that make graphs of about 1,000 to 100,000 nodes.
SCALE = (15, 150, 800, 1515)
#: Channels of the graphs with many layers: at full width, no file system or address space would hold their weights.
NARROW = 256


@dataclasses.dataclass(frozen=True)
class Result:
    """Hold the result of one candidate on one task.

    Attributes:
        ms: The lowest CPU milliseconds of all repeats.
        found: What the candidate says that it changed, mostly a count.
        mib: Peak resident MiB of the process.
        failure: Why there is no result; empty if there is one.
    """

    ms: float = 0.0
    found: Any = None
    mib: float = 0.0
    failure: str = ""

    @property
    def cells(self) -> list[str]:
        """Return the time or the failure, and the memory, as two cells of a table."""
        return [self.failure or f"{self.ms:,.1f}", "" if self.failure else f"{self.mib:,.0f}"]


def run(candidate: str, task: str, model: Path, repeats: int) -> Result:
    """Run a candidate on a task `repeats` times, in one process of its own, and return its result or its failure."""
    command = [sys.executable, str(PROGRAM), candidate, task, str(model), str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=output, stderr=log, env=environment)
        failure = _watched(process)
        process.wait()
        output.seek(0)
        log.seek(0)
        lines, errors = output.read().splitlines(), log.read().strip().splitlines()
    if failure:
        return Result(failure=failure)
    if process.returncode:
        return Result(failure=f"fails: {errors[-1][:80]}" if errors else f"exit code {process.returncode}")
    return Result(**json.loads(lines[-1]))


def _watched(process: subprocess.Popen[Any]) -> str:
    """Wait for a process and kill it at a limit; return which limit that was, or an empty string."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory, cpu = watched.memory_info().rss / 2**20, watched.cpu_times()
        except psutil.NoSuchProcess:
            return ""
        if cpu.user + cpu.system > SECONDS:
            process.kill()
            return f"not done in {SECONDS:.0f} CPU s"
        if memory > MIB:
            process.kill()
            return f"more than {MIB / 1024:.0f} GiB"
        time.sleep(0.02)
    return ""


def count_nodes(model: Path) -> int:
    """Return the number of nodes in the main graph of an ONNX file."""
    return len(onnx.load(model, load_external_data=False).graph.node)


def rules(model: Path, repeats: int, tasks: Sequence[str] = RULE_TASKS) -> str:
    """Measure the same patterns in each rewriter, and return the table.

    Raises SystemExit if passopt fails, or if another rewriter finds a different number of matches.
    """
    rows = []
    for task in tasks:
        results = [run(candidate, task, model, repeats) for candidate in RULE_CANDIDATES[:2]]
        results.append(run(RULE_CANDIDATES[2], task, model, (repeats + 2) // 3))
        ours = results[0]
        if ours.failure:
            raise SystemExit(f"bench-rewrite: passopt {task}: {ours.failure}")
        for candidate, result in zip(RULE_CANDIDATES, results, strict=True):
            if not result.failure and result.found != ours.found:
                raise SystemExit(
                    f"bench-rewrite: {candidate} found {result.found} matches of {task}, passopt {ours.found}"
                )
        ratios = ["" if other.failure else f"{other.ms / ours.ms:.1f}×" for other in results[1:]]
        cells = [cell for result in results for cell in result.cells[:1]]
        row = [task, str(ours.found), *cells, *ratios, f"{ours.mib:,.0f}", results[1].cells[1]]
        rows.append(row)
        print(f"{model.parent.name}: {row}", flush=True)
    header = [
        "rules",
        "matches",
        "passopt ms",
        "onnxscript ms",
        "onnxscript commuted ms",
        "ratio",
        "ratio commuted",
        "passopt MiB",
        "onnxscript MiB",
    ]
    return table(header, rows)


def scaling(root: Path) -> str:
    """Measure passopt on graphs of growing size, and return the table."""
    rows = []
    for layers in SCALE:
        model = make_graph(root / f"scale-{layers}", layers=layers, rotary=False, hidden=NARROW)
        nodes = count_nodes(model)
        for task in ("all-three", "misses"):
            result = run("passopt", task, model, 2)
            per_node = "" if result.failure else f"{1000 * result.ms / nodes:.1f}"
            rows.append([f"{nodes:,}", task, str(result.found), result.cells[0], per_node, result.cells[1]])
            print(f"scaling: {rows[-1]}", flush=True)
    return table(["nodes", "rules", "matches", "CPU ms", "CPU µs per node", "MiB"], rows)


def passes(model: Path) -> str:
    """Measure passes that passopt and onnx-ir both have, and return the table."""
    rows = []
    for task in ("cse", "dead-code"):
        for candidate in ("passopt pass", "onnx-ir pass"):
            result = run(candidate, task, model, 5)
            rows.append([task, candidate.removesuffix(" pass"), str(result.found), *result.cells])
            print(f"passes: {rows[-1]}", flush=True)
    return table(["pass", "tool", "nodes removed", "CPU ms", "MiB"], rows)


def optimizers(models: dict[str, Path]) -> str:
    """Measure whole optimizers on each model, and return the table; some of them cannot finish within the limits."""
    rows = []
    for label, model in models.items():
        for candidate, task in (
            ("passopt", "all-three"),
            ("onnxruntime.transformers", "gpt2"),
            ("onnxsim", "simplify"),
        ):
            result = run(candidate, task, model, 1)
            rows.append([label, candidate, "" if result.failure else str(result.found), *result.cells])
            print(f"optimizers: {rows[-1]}", flush=True)
    return table(["graph", "tool", "found", "CPU ms", "MiB"], rows)


def pipeline(root: Path) -> str:
    """Export both published sizes, measure the pipeline `baichuan2` on them, and return the table."""
    rows = []
    for size in ("13b", "7b"):
        checkpoint = make_sparse(root / size, full_size_spec(size))
        exported = f"{size}-exported"
        command = ("export", str(checkpoint), "-o", exported, "--weights=reference", "--no-self-check")
        measured(root, *command, "--trust-remote-code")
        model = root / exported / "model.onnx"
        result = run("passopt pipeline", "baichuan2", model, 3)
        counts = {} if result.failure else result.found
        matches = ", ".join(f"{name} {count}" for name, count in counts.items() if name.startswith(("fuse", "split")))
        rows.append([size.upper(), f"{count_nodes(model):,}", matches, *result.cells])
        print(f"pipeline: {rows[-1]}", flush=True)
    return table(["model", "nodes", "matches", "CPU ms", "MiB"], rows)


def report(root: Path) -> str:
    """Measure everything, with graphs written below `root`, and return the page as Markdown."""
    alibi = make_graph(root / "alibi", layers=40, rotary=False)
    rotary = make_graph(root / "rotary", layers=40, rotary=True)
    large = make_graph(root / "large", layers=800, rotary=False, hidden=NARROW)
    narrow = make_graph(root / "narrow", layers=40, rotary=False, hidden=NARROW)
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxscript", "onnx-ir", "onnxruntime", "onnxsim"))
    limits = f"{SECONDS:.0f} CPU seconds and {MIB / 1024:.0f} GiB"
    parts = [
        "# Speed of rewriting\n",
        "This page compares the CPU time and the memory that passopt and other tools need to rewrite the same ONNX "
        f"graphs. It was measured on {processor()} with Python {platform.python_version()}, {versions}. "
        "`make bench-rewrite` repeats the measurement and writes this page.\n",
        "How to read the tables: a time is the CPU time of the rewriting alone, in milliseconds, and the lowest of "
        "several runs that each load the graph anew. Loading is not counted; passopt's inference of types, names and "
        "provenance is. MiB is the peak memory of the whole process. The tools run one at a time, each in a process of "
        f"its own that is stopped at {limits}.\n",
        "## The same rules in passopt and onnxscript\n",
        "Both rewriters get the same patterns, which are the same Python functions. passopt always matches the inputs "
        "of commutative operators in either order. onnxscript does so only with `commute=True`, and only then does it "
        "do the same work; this is the column `onnxscript commuted ms`. Both ratios are onnxscript's time over "
        "passopt's: 2.0× means that passopt is twice as fast. `misses` are 20 rules of which none matches. The "
        "benchmark fails unless all rewriters find the same number of matches.\n",
        f"The 13B-shaped graph, with 40 layers and {count_nodes(alibi):,} nodes:\n",
        rules(alibi, 7),
        f"The 7B-shaped graph with rotary embedding, with 40 layers and {count_nodes(rotary):,} nodes:\n",
        rules(rotary, 3, ("all-three", "misses")),
        f"A graph of 800 layers with {NARROW} channels, and {count_nodes(large):,} nodes:\n",
        rules(large, 1, ("all-three", "misses")),
        "## passopt on graphs of growing size\n",
        f"The 13B-shaped graphs have {SCALE[0]} to {SCALE[-1]:,} layers with {NARROW} channels. If the time per node "
        "stays the same, the time grows in proportion to the size of the graph.\n",
        scaling(root),
        "## Passes that passopt and onnx-ir both have\n",
        f"Both tools run on the 13B-shaped graph of {count_nodes(alibi):,} nodes. passopt's `cse` also moves "
        "computations that all layers share in front of the layers.\n",
        passes(alibi),
        "## Whole optimizers\n",
        "onnxruntime.transformers and onnxsim load the file themselves, with all its weights, and their times contain "
        "that; so they are not comparable with the times above. `narrow` is the 13B-shaped graph with "
        f"{NARROW} channels instead of 5,120. passopt applies the three rules of the first table. The column `found` "
        "gives passopt's matches, the operators that onnxruntime.transformers fused, and the nodes that onnxsim "
        "removed.\n",
        optimizers({"narrow": narrow, "13B-shaped": alibi}),
        "## The pipeline `baichuan2`\n",
        "The pipeline runs on the exported graphs of the published sizes. The time includes all passes and the "
        "structure check after each of them.\n",
        pipeline(root),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    """Measure everything in a temporary folder, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench rewriting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "measured" / "bench-rewrite.md"))
    output = Path(parser.parse_args(arguments).output)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="passopt-bench-") as folder:
        text = report(Path(folder))
    output.parent.mkdir(exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"→ {output} in {time.monotonic() - start:.0f} s")
