"""Export, shard, quantise and compile models of the published sizes, and print time, memory and exact bytes.

    python tools/bench full-size [7b|13b ...]

The checkpoints are sparse files with the real names, shapes and number types, so they take no disk space. Only the
compiled int8 model is really written (14 GB for 13B), and removed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from passopt.testing.checkpoints import full_size_spec
from sparse_checkpoint import GIB, make_sparse, measured

PIPELINES = ("baichuan2", "int8", "tp{degree=4},int8", "baichuan2,tp{degree=4},int8")
#: Bytes of all weights, computed from the published sizes: int8 linears; fp16 scales, norms, embedding and head.
EXPECTED_BYTES = {"7b": 8_538_660_864, "13b": 15_188_449_280}
#: Passes before `compile`: linears then compute with int8 weights and int8 activations.
COMPILED = "baichuan2,slice-last-token,int8{activations=dynamic,head=true}"
LOAD = """
import sys, time
from pathlib import Path
from passopt.targets.tvm.engine.engine import Engine
start = time.perf_counter()
Engine.load(Path(sys.argv[1]), capacity=16)
print(time.perf_counter() - start)
"""


def run_size(root: Path, size: str) -> None:
    """Export one size, run every pipeline on it as a dry run, and print time, memory and bytes.

    Raises SystemExit if the pipeline `int8` would write other than `EXPECTED_BYTES` of weights.
    """
    checkpoint = make_sparse(root / size, full_size_spec("7b" if size == "7b" else "13b"))
    exported = f"{size}-exported"
    _, wall, cpu, memory = measured(
        root, "export", checkpoint.name, "-o", exported, "--weights=reference", "--no-self-check", "--trust-remote-code"
    )
    print(f"{size:>4}  export   {wall:6.1f} s  {cpu:6.1f} CPU s  {memory:5.2f} GiB peak", flush=True)
    text, *_ = measured(root, "print", exported)
    print(f"{size:>4}  canonical text: {len(text.encode()):,} bytes")
    for pipeline in PIPELINES:
        output, wall, cpu, memory = measured(root, "run", exported, "--passes", pipeline, "--dry-run", "--json")
        report = json.loads(output)
        weights = report["weights"]
        found = weights["codes"] + weights["scales"] + weights["other"]
        print(
            f"{size:>4}  {pipeline}: {wall:.1f} s, {cpu:.1f} CPU s, {memory:.2f} GiB peak; weights {found:,} bytes",
            end="",
        )
        print(f" = {found / GIB:.4f} GiB, all files {sum(report['files'].values()):,} bytes", flush=True)
        if pipeline == "int8" and found != EXPECTED_BYTES[size]:
            raise SystemExit(f"full-size: expected {EXPECTED_BYTES[size]:,} bytes")


def compile_size(root: Path, size: str) -> None:
    """Compile one exported size, load the result in two fresh processes, and print the time of each step.

    The time of `compile` includes packing the weights. The first load hashes all weights; the second one recognises
    the file and does not.
    """
    folder = f"{size}-compiled"
    _, wall, cpu, memory = measured(root, "compile", f"{size}-exported", "--passes", COMPILED, "-o", folder)
    print(f"{size:>4}  compile  {wall:6.1f} s  {cpu:6.1f} CPU s  {memory:5.2f} GiB peak, weights written", flush=True)
    for what in ("first load", "load"):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, folder], cwd=root, stdout=subprocess.PIPE, text=True, check=True
        )
        print(f"{size:>4}  {what}: {float(done.stdout):.2f} s", flush=True)
    shutil.rmtree(root / folder)


def main(arguments: Sequence[str]) -> None:
    """Measure the sizes that the command line names, in a temporary folder that is removed afterwards."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench full-size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="7b, 13b or both (default: both)")
    sizes = parser.parse_args(arguments).sizes or ["7b", "13b"]
    with tempfile.TemporaryDirectory(prefix="passopt-full-size-") as folder:
        for size in sizes:
            run_size(Path(folder), size)
            compile_size(Path(folder), size)
