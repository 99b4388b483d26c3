"""The main job from end to end on two tiny trained checkpoints: export, run, verify, compile, generate, a table.

Both pipelines, `tp,int8` on the graph as exported and `baichuan2,tp,int8` on the fused one, are verified against it. So
is what is compiled of them, one library and two ranks, before they write.

python tools/demo.py [DIR]      (default: a temporary folder that is removed)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from passopt.testing.checkpoints import ALIBI, ROTARY, CheckpointSpec, evaluation_text, make_checkpoint

FAMILIES = {"rotary": ROTARY, "alibi": ALIBI}
PIPELINES = ("tp,int8", "baichuan2,tp,int8")
MAX_TOKENS = "4000"
PROMPT = "The expression list"


def passopt(folder: Path, *arguments: str, show: bool = True) -> str:
    """Run one command in `folder`, as a user would; what it prints is shown unless it is JSON for the table."""
    quoted = " ".join(f"'{item}'" if set(item) & set("{ ") else item for item in arguments)
    print(f"$ passopt {quoted}", flush=True)
    command = [sys.executable, "-m", "passopt", *arguments]
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, check=False)
    if show:
        print("\n".join(f"    {line}" for line in done.stdout.splitlines()), flush=True)
    if done.returncode:
        raise SystemExit(f"demo: passopt {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout


def run_family(root: Path, name: str, spec: CheckpointSpec) -> tuple[list[list[str]], str]:
    """Export, transform and verify one family; returns its rows of the table, and what its int8 model writes."""
    print(f"\n== {name}: {spec.layers} layers, {spec.heads} heads, hidden {spec.hidden}, vocabulary {spec.vocab}")
    checkpoint = make_checkpoint(root / f"checkpoint-{name}", spec, format="bin", shards=2)
    (root / "text.txt").write_text(evaluation_text(), encoding="utf-8")
    passopt(root, "export", checkpoint.name, "-o", name, "--dtype", "fp32", "--trust-remote-code")
    rows = [run_pipeline(root / name, name, pipeline) for pipeline in PIPELINES]
    return rows, run_compiled(root / name)


def run_compiled(folder: Path) -> str:
    """Compile the fused int8 model and its ranks, verify both, and let them write; returns the text of the first."""
    passopt(folder, "compile", "model.onnx", "--passes", "baichuan2,int8", "-o", "compiled")
    passopt(folder, "compile", "model.baichuan2.tp2.int8", "-o", "compiled.tp2")
    passopt(folder, "verify", "model.onnx", "compiled", "--text", "../text.txt", "--max-tokens", MAX_TOKENS)
    passopt(folder, "verify", "model.onnx", "compiled.tp2")
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "48", "--greedy")
    texts = {name: passopt(folder, "generate", name, *arguments) for name in ("compiled", "compiled.tp2")}
    same = texts["compiled"] == texts["compiled.tp2"]
    print("both write the same" if same else "they part where two tokens are nearly equal: ranks sum in another order")
    return texts["compiled"].strip()


def run_pipeline(folder: Path, name: str, pipeline: str) -> list[str]:
    """Transform and verify with one pipeline; returns its row of the table."""
    output = "model." + pipeline.replace(",", ".").replace("tp", "tp2")
    passopt(folder, "run", "model.onnx", "--passes", pipeline)
    against = ("verify", "model.onnx", output, "--text", "../text.txt", "--max-tokens", MAX_TOKENS)
    passopt(folder, *against)
    return _row(name, pipeline, folder, output, json.loads(passopt(folder, *against, "--json", show=False)))


def _row(name: str, pipeline: str, folder: Path, output: str, report: dict[str, Any]) -> list[str]:
    manifest = json.loads((folder / output / "manifest.json").read_text())
    collectives = [entry["op"] for entry in manifest["collectives"]]
    patterns = ("weights.safetensors", f"{output}/rank*/weights.safetensors")
    sizes = [sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in patterns]
    counts = f"{collectives.count('AllReduce')} + {collectives.count('AllGather')}"
    return [name, pipeline, f"{sizes[0]:,}", f"{sizes[1]:,}", counts, *_figures(report)]


_HEADER = (
    "family",
    "passes",
    "fp32 bytes",
    "2 ranks int8",
    "AllReduce + AllGather",
    "twin error",
    "perplexity",
    "change",
)


def _figures(report: dict[str, Any]) -> list[str]:
    """The worst error against the graph's own dequantised codes, and what int8 costs in perplexity."""
    twin = [row["error"] for row in report["rows"] if "dequantised" in row["comparison"] and row["scenario"] != "text"]
    (text,) = [row for row in report["rows"] if row["scenario"] == "text" and "original" in row["comparison"]]
    return [f"{max(twin):.1e}", text["note"].removeprefix("perplexity "), f"{text['error']:.3%}"]


def main() -> None:
    start = time.monotonic()
    root = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="passopt-demo-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        found = {name: run_family(root, name, spec) for name, spec in FAMILIES.items()}
    finally:
        if len(sys.argv) <= 1:
            shutil.rmtree(root, ignore_errors=True)
    print()
    rows = [row for family, _ in found.values() for row in family]
    widths = [max(len(row[column]) for row in [_HEADER, *rows]) for column in range(len(_HEADER))]
    for row in [_HEADER, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(f"\nboth families verified in {time.monotonic() - start:.0f} s; their compiled int8 models go on:")
    for name, (_, text) in found.items():
        print(f"{name}: {PROMPT} {' '.join(text.split())}")


if __name__ == "__main__":
    main()
