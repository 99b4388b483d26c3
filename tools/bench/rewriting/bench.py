"""Measure CPU time and memory of rewriting, passopt's and others', and write docs/bench-rewrite.md.

    python tools/bench rewriting [OUTPUT]

One candidate at a time is measured, each in a process of its own that is stopped at a limit of seconds and memory. This
takes some minutes.
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
SECONDS = 60.0
MIB = 4096.0
RULE_TASKS = ("rms-norm", "silu", "attention", "all-three", "misses")
RULE_CANDIDATES = ("passopt", "onnxscript", "onnxscript, commuted")
#: Layers of the graphs of 1 k to 100 k nodes.
SCALE = (15, 150, 800, 1515)
#: Channels where the weights of so many layers would be more than a file system or address space holds.
NARROW = 256


@dataclasses.dataclass(frozen=True)
class Result:
    """Least CPU milliseconds, what was found, and peak MiB; `failure` says why there is none."""

    ms: float = 0.0
    found: Any = None
    mib: float = 0.0
    failure: str = ""

    @property
    def cells(self) -> list[str]:
        return [self.failure or f"{self.ms:,.1f}", "" if self.failure else f"{self.mib:,.0f}"]


def run(candidate: str, task: str, model: Path, repeats: int) -> Result:
    """One measurement in a process of its own."""
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
    """Wait for the process; kill it at the limit, and say which."""
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
    return len(onnx.load(model, load_external_data=False).graph.node)


def rules(model: Path, repeats: int, tasks: Sequence[str] = RULE_TASKS) -> str:
    """The same patterns in each rewriter; all must find the same number of matches."""
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
        "commuted ms",
        "ratio",
        "commuted",
        "MiB",
        "onnxscript MiB",
    ]
    return table(header, rows)


def scaling(root: Path) -> str:
    rows = []
    for layers in SCALE:
        model = make_graph(root / f"scale-{layers}", layers=layers, rotary=False, hidden=NARROW)
        nodes = count_nodes(model)
        for task in ("all-three", "misses"):
            result = run("passopt", task, model, 2)
            per_node = "" if result.failure else f"{1000 * result.ms / nodes:.1f}"
            rows.append([f"{nodes:,}", task, str(result.found), result.cells[0], per_node, result.cells[1]])
            print(f"scaling: {rows[-1]}", flush=True)
    return table(["nodes", "rules", "matches", "CPU ms", "µs per node", "MiB"], rows)


def passes(model: Path) -> str:
    rows = []
    for task in ("cse", "dead-code"):
        for candidate in ("passopt pass", "onnx-ir pass"):
            result = run(candidate, task, model, 5)
            rows.append([task, candidate.removesuffix(" pass"), str(result.found), *result.cells])
            print(f"passes: {rows[-1]}", flush=True)
    return table(["pass", "of", "nodes removed", "CPU ms", "MiB"], rows)


def optimizers(models: dict[str, Path]) -> str:
    """Whole optimizers, which read and hold the weights: where they finish at all."""
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
    return table(["graph", "candidate", "found", "CPU ms", "MiB"], rows)


def pipeline(root: Path) -> str:
    """`baichuan2` on the exports of both published sizes."""
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
    alibi = make_graph(root / "alibi", layers=40, rotary=False)
    rotary = make_graph(root / "rotary", layers=40, rotary=True)
    large = make_graph(root / "large", layers=800, rotary=False, hidden=NARROW)
    narrow = make_graph(root / "narrow", layers=40, rotary=False, hidden=NARROW)
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxscript", "onnx-ir", "onnxruntime", "onnxsim"))
    limits = f"{SECONDS:.0f} CPU seconds and {MIB / 1024:.0f} GiB"
    parts = [
        "# Speed of rewriting\n",
        f"Made by `make bench-rewrite` on {processor()}, Python {platform.python_version()}, {versions}.\n",
        "One candidate at a time, each in a process of its own. CPU milliseconds of the rewriting alone (loading is "
        "not counted; passopt's inference of types, names and provenance is), the least of several fresh loads. "
        f"Peak memory is that of the whole process. A candidate is stopped at {limits}.\n",
        "## The same rules in both rewriters\n",
        "The patterns are the same Python functions. passopt's always match commuted inputs; onnxscript's do so with "
        "`commute=True` (column commuted), which is the equal task. `misses` are 20 rules of which none matches. "
        "The run stops unless all find the same number of matches.\n",
        f"13B-shaped graph, 40 layers, {count_nodes(alibi):,} nodes:\n",
        rules(alibi, 7),
        f"7B-shaped graph with rotary embedding, {count_nodes(rotary):,} nodes:\n",
        rules(rotary, 3, ("all-three", "misses")),
        f"800 layers, {count_nodes(large):,} nodes:\n",
        rules(large, 1, ("all-three", "misses")),
        "## Scaling of passopt\n",
        scaling(root),
        "## Common passes\n",
        f"On the graph of {count_nodes(alibi):,} nodes. passopt's cse also moves what layers share before them.\n",
        passes(alibi),
        "## Whole optimizers\n",
        "They load the weights. `narrow` is the 13B-shaped graph with "
        f"{NARROW} channels instead of 5,120; passopt applies the three rules above.\n",
        optimizers({"narrow": narrow, "13B-shaped": alibi}),
        "## The pipeline `baichuan2`\n",
        "On the exported graphs of the published sizes, all passes and the structure check after each.\n",
        pipeline(root),
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/bench rewriting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "bench-rewrite.md"))
    output = Path(parser.parse_args(arguments).output)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="passopt-bench-") as folder:
        text = report(Path(folder))
    output.parent.mkdir(exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"→ {output} in {time.monotonic() - start:.0f} s")
