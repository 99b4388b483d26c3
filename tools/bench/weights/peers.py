"""Measure other tools on the same weights under a limit of memory, and write docs/measured/bench-scale-peers.md.

    python tools/bench peers [OUTPUT] [--sizes 1.4 3 10] [--peers DIR] [--work DIR]

One tool at a time is measured at fixed sizes, each in a process of its own. This takes up to half an hour and 25 GB of
disk. `--peers` names the folder of a second Python environment, for tools that this one lacks (onnxslim,
onnx-neural-compressor, with onnx and onnxruntime).
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
#: For each size in GB of fp32 weights: channels and layers. It includes the embedding and head of 125,696 rows.
SIZES = {"1.4": (1024, 9), "3": (1024, 47), "10": (4096, 9)}
#: Limits at which a tool is stopped: wall-clock seconds, and bytes of anonymous memory.
SECONDS = 300.0
ANONYMOUS = 17 * 10**9
#: For each tool that this environment may lack: the package that it needs.
PACKAGES = {"onnxslim": "onnxslim", "onnx-neural-compressor RTN": "onnx_neural_compressor"}
_PIECE = 16 << 20


def fill(path: Path) -> int:
    """Fill a sparse file with normally distributed fp32 of the size of trained weights, and return its bytes."""
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
    """Return the Python interpreter whose environment has the tool, this one or that of `peers`; None if none has."""
    package = PACKAGES.get(candidate)
    if package is None or importlib.util.find_spec(package) is not None:
        return sys.executable
    other = Path(peers or "") / "bin" / "python"
    if peers is None or not other.is_file():
        return None
    found = subprocess.run([str(other), "-c", f"import {package}"], capture_output=True, check=False)
    return str(other) if found.returncode == 0 else None


def run(candidate: str, model: Path, folder: Path, peers: str | None) -> tuple[Usage, int]:
    """Run one tool on one model; return what it used, and how many bytes it wrote."""
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
    """Return a tool's row of the table; one that failed shows why, and its anonymous memory until then."""
    if usage.failure:
        return (candidate, usage.failure, "", "", f"{usage.anonymous / GIB:.2f}", "", "")
    memory = (f"{number / GIB:.2f}" for number in (usage.peak, usage.anonymous, usage.mapped))
    return (candidate, f"{usage.wall:.1f}", f"{usage.cpu:.1f}", *memory, f"{written / 1e9:.2f}")


def main(arguments: Sequence[str]) -> None:
    """Measure the tools and sizes asked for, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", nargs="?", default=str(ROOT / "docs" / "measured" / "bench-scale-peers.md"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tools whose name contains one of these")
    parser.add_argument("--peers", metavar="DIR", help="Python environment with the tools that this one lacks")
    parser.add_argument("--work", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args(arguments)
    names = [name for name in CANDIDATES if not options.only or any(part in name for part in options.only)]
    lines = [
        "# Writing weights: passopt and other tools",
        "",
        "This page compares the time and the memory that passopt and other tools need to process the same 13B-shaped "
        f"fp32 graphs with random weights. It was measured on {processor()}. `make bench-scale-peers` repeats the "
        "measurement and writes this page.",
        "",
        "How to read the tables: the tools run one at a time, each in a process of its own that is stopped after "
        f"{SECONDS:.0f} s or at {ANONYMOUS / 1e9:.0f} GB of anonymous memory. `peak` is the largest memory of the "
        "process as the kernel records it; `anonymous` and `mapped` are the largest samples of its two parts.",
        "",
        "The tools do not all do the same work. passopt writes int8 codes and a scale per output channel. onnxsim and "
        "onnxslim only simplify the graph and save it. onnx-neural-compressor rounds the weights to 8 bits, but stores "
        "the rounded values in fp32.",
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
        header = ("tool", "wall s", "CPU s", "peak GiB", "anonymous GiB", "mapped GiB", "written GB")
        lines += [
            "",
            f"## {nbytes / 1e9:.1f} GB of weights: {layers} layers with {hidden} channels",
            "",
            table(header, rows),
        ]
    Path(options.output).write_text("\n".join(lines))
