"""Measure other tools on the same graphs and weights under a cap of memory, and write docs/bench-scale-peers.md.

    python tools/bench peers [OUTPUT] [--sizes 1.4 3 10] [--peers DIR] [--work DIR]

One tool at a time is measured at fixed sizes, each in a process of its own. This takes up to half an hour and 25 GB of
disk. `--peers` is an environment of tools that this one lacks (onnxslim, onnx-neural-compressor, with onnx and
onnxruntime).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from passopt.ir.weights.streaming.direct_io import Arena, OutputFile
from process_usage import GIB, Usage, watched
from rewriting.graphs import WEIGHTS, make_graph
from tables import processor, table
from weights.peer_candidates import CANDIDATES

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools" / "bench" / "weights" / "peer_candidates.py"
#: Width and layers that make so many GB of fp32, embedding and head of 125,696 rows included.
SIZES = {"1.4": (1024, 9), "3": (1024, 47), "10": (4096, 9)}
SECONDS = 300.0
ANONYMOUS = 17 * 10**9
#: What each tool needs besides this environment.
PACKAGES = {"onnxslim": "onnxslim", "onnx-neural-compressor RTN": "onnx_neural_compressor"}
_PIECE = 16 << 20


def fill(path: Path) -> int:
    """Normal numbers of the size of trained weights into a sparse file; returns its bytes."""
    size = path.stat().st_size
    memory = Arena(_PIECE).take(_PIECE)
    numbers = np.frombuffer(memory, np.float32)
    numbers[...] = np.random.default_rng(0).standard_normal(len(numbers), np.float32) * np.float32(0.02)
    output = OutputFile(path, size)
    for offset in range(0, size, _PIECE):
        output.write(offset, memory[: min(_PIECE, size - offset)])
    output.sync()
    output.close()
    return size


def python_for(candidate: str, peers: str | None) -> str | None:
    """The interpreter that has the tool; None if there is none."""
    package = PACKAGES.get(candidate)
    if package is None or importlib.util.find_spec(package) is not None:
        return sys.executable
    other = Path(peers or "") / "bin" / "python"
    if peers is None or not other.is_file():
        return None
    found = subprocess.run([str(other), "-c", f"import {package}"], capture_output=True, check=False)
    return str(other) if found.returncode == 0 else None


def run(candidate: str, model: Path, folder: Path, peers: str | None) -> tuple[Usage, int]:
    """One tool on one model: its usage, and the bytes that it wrote."""
    python = python_for(candidate, peers)
    if python is None:
        return Usage(failure="not installed"), 0
    output = folder / "output"
    output.mkdir()
    command = [python, str(PROGRAM), candidate, str(model), str(output)]
    usage = watched(folder, command, seconds=SECONDS, anonymous=ANONYMOUS)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    shutil.rmtree(output)
    return usage, written


def row(candidate: str, usage: Usage, written: int) -> tuple[str, ...]:
    if usage.failure:
        return (candidate, usage.failure, "", "", f"{usage.anonymous / GIB:.2f}", "", "")
    memory = (f"{number / GIB:.2f}" for number in (usage.peak, usage.anonymous, usage.mapped))
    return (candidate, f"{usage.wall:.1f}", f"{usage.cpu:.1f}", *memory, f"{written / 1e9:.2f}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/bench peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "bench-scale-peers.md"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tools whose name contains one of these")
    parser.add_argument("--peers", metavar="DIR", help="environment of tools that this one lacks")
    parser.add_argument("--work", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args(arguments)
    names = [name for name in CANDIDATES if not options.only or any(part in name for part in options.only)]
    lines = [
        "# Weights of other tools",
        "",
        f"Made by `make bench-scale-peers` on {processor()}. The same 13B-shaped fp32 graphs, random weights, for all;"
        f" one tool at a time in a process of its own, stopped at {SECONDS:.0f} s or {ANONYMOUS / 1e9:.0f} GB of "
        "anonymous memory. passopt writes int8 codes and scales per output channel; onnxsim and onnxslim only rewrite "
        "the graph and save it; onnx-neural-compressor rounds 8-bit weights to what their codes stand for and keeps "
        "them in fp32.",
    ]
    for size in options.sizes:
        hidden, layers = SIZES[size]
        with tempfile.TemporaryDirectory(prefix="passopt-bench-peers-", dir=options.work) as name:
            folder = Path(name)
            model = make_graph(folder / "model", layers=layers, rotary=False, hidden=hidden)
            nbytes = fill(folder / "model" / WEIGHTS)
            rows = []
            for candidate in names:
                usage, written = run(candidate, model, folder, options.peers)
                rows.append(row(candidate, usage, written))
                print(f"{nbytes / 1e9:.1f} GB: " + "  ".join(rows[-1]), flush=True)
        header = ("", "wall s", "CPU s", "peak GiB", "anonymous", "mapped", "written GB")
        lines += ["", f"## {nbytes / 1e9:.1f} GB: {layers} layers of {hidden}", "", table(header, rows)]
    Path(options.output).write_text("\n".join(lines))
