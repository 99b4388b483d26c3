"""Write the drift matrix: do the fusions still find everything, for every family, exporter, attention and opset?

    python tools/docs/drift.py [--only FAMILY] [--json] [--write FILE] [--keep DIR]

A cell that misses a part, or whose numbers change, is marked ✗ and makes the exit code 1. What to expect follows from
the architectures and their configurations, never from passes. It takes some 15 minutes; one row at a time is in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from drift_row import BAICHUAN2
from passopt.testing.families import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
#: Largest max|Δ| / max|reference| between a graph and its fused form, over all outputs and all rows.
TOLERANCE = 1e-5

EXPORTS = (("dynamo", 18), ("dynamo", 23), ("torchscript", 18), ("torchscript", 20))
ATTENTIONS = ("eager", "sdpa")
KINDS = ("norms", "rotary", "attention")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Per layer: RMS norms (0 where a family has layer norms; those of q and k count) and whether q and k rotate.

    `attentions` are the implementations that the class has.
    """

    norms: int = 0
    rotary: bool = False
    attentions: tuple[str, ...] = ATTENTIONS


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(2, rotary=True),
    "mistral": Architecture(2, rotary=True),
    "qwen2": Architecture(2, rotary=True),
    "qwen3": Architecture(4, rotary=True),
    "phi3": Architecture(2, rotary=True),
    "gemma2": Architecture(4, rotary=True, attentions=("eager",)),
    "gpt-neox": Architecture(rotary=True),
    "falcon-mqa": Architecture(rotary=True),
    "falcon-gqa": Architecture(rotary=True),
    "opt": Architecture(),
    "gpt2": Architecture(),
    "bloom": Architecture(attentions=("eager",)),
    "mpt": Architecture(attentions=("eager",)),
    "baichuan2-7b": Architecture(2, rotary=True, attentions=("sdpa",)),
    "baichuan2-13b": Architecture(2, attentions=("eager",)),
}
#: Families that are also exported for prefill only and for single tokens only.
_ALL_PHASES = ("baichuan2-7b", "baichuan2-13b", "llama", "bloom")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    phase: str

    @property
    def name(self) -> str:
        return self.family if self.phase == "merged" else f"{self.family}, {self.phase} only"

    @property
    def pipeline(self) -> str:
        return "baichuan2" if self.family in BAICHUAN2 else "fuse"

    @property
    def expected(self) -> dict[str, int]:
        """Norms of all layers and the last one, a rotation of q and one of k, one attention per layer."""
        layers, architecture = _layers(self.family), ARCHITECTURES[self.family]
        norms = layers * architecture.norms + 1 if architecture.norms else 0
        return {"norms": norms, "rotary": 2 * layers * architecture.rotary, "attention": layers}


@dataclasses.dataclass(frozen=True)
class Cell:
    """`found` per kind and `error`, or `reason`: why there is none. `made` is False where the exporter cannot."""

    row: Row
    exporter: str
    opset: int
    attention: str
    found: Mapping[str, int] = dataclasses.field(default_factory=dict)
    error: float | None = None
    reason: str = ""
    made: bool = True

    @property
    def ok(self) -> bool:
        if not self.made:
            return True
        return self.found == self.row.expected and self.error is not None and self.error <= TOLERANCE

    def text(self) -> str:
        if not self.made:
            return "–"
        if not self.found:
            return "✗ failed"
        counts = " ".join(f"{self.found[kind]}/{self.row.expected[kind]}" for kind in KINDS)
        error = "not finite" if self.error is None else f"{self.error:.0e}"
        return f"{counts} {error}" if self.ok else f"✗ {counts} {error}"

    def as_json(self) -> dict[str, object]:
        return {
            **dataclasses.asdict(self),
            "row": self.row.name,
            "pipeline": self.row.pipeline,
            "expected": self.row.expected,
            "ok": self.ok,
        }


def _layers(family: str) -> int:
    """By the configuration, whatever its class calls it."""
    if family in BAICHUAN2:
        return 2
    config = CONFIGS[family]
    return int(next(config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config))


def rows(only: Sequence[str]) -> list[Row]:
    """All rows, or those of the families named."""
    if unknown := set(only) - ARCHITECTURES.keys():
        raise SystemExit(f"drift: no family {', '.join(sorted(unknown))}; there are {', '.join(ARCHITECTURES)}")
    chosen = [family for family in ARCHITECTURES if not only or family in only]
    found = [Row(family, "merged") for family in chosen]
    return found + [Row(family, phase) for family in _ALL_PHASES if family in chosen for phase in ("prefill", "decode")]


def run_row(row: Row, keep: str) -> Iterator[Cell]:
    """The cells of a row, from a process of its own."""
    wanted = [
        (exporter, opset, attention)
        for exporter, opset in EXPORTS
        for attention in ATTENTIONS
        if attention in ARCHITECTURES[row.family].attentions
    ]
    names = [f"{exporter}:{opset}:{attention}" for exporter, opset, attention in wanted]
    program = str(ROOT / "tools" / "docs" / "drift_row.py")
    command = [sys.executable, program, row.family, row.phase, row.pipeline, keep, *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    output, log = process.communicate()
    results = {item["cell"]: item for item in map(json.loads, output.splitlines())}
    crash = (log.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    for (exporter, opset, attention), name in zip(wanted, names, strict=True):
        result = results.get(name, {"step": "process", "reason": crash})
        reason = f"{result['step']}: {result['reason']}" if "reason" in result else ""
        yield Cell(row, exporter, opset, attention, result.get("found", {}), result.get("error"), reason)
    for exporter, opset in EXPORTS:
        for attention in set(ATTENTIONS) - set(ARCHITECTURES[row.family].attentions):
            yield Cell(row, exporter, opset, attention, reason=f"its class has no {attention} attention", made=False)


def markdown(cells: Sequence[Cell]) -> str:
    """The table, then why cells failed or are missing."""
    columns = [(exporter, opset, attention) for exporter, opset in EXPORTS for attention in ATTENTIONS]
    by_place = {(cell.row, cell.exporter, cell.opset, cell.attention): cell for cell in cells}
    lines = ["| family | " + " | ".join(f"{one} {two}, {three}" for one, two, three in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for row in dict.fromkeys(cell.row for cell in cells):
        texts = [by_place[(row, *column)].text() for column in columns]
        lines.append(f"| {row.name} | " + " | ".join(texts) + " |")
    failed = [cell for cell in cells if not cell.ok]
    reasons = dict.fromkeys(f"{cell.row.family}: {cell.reason}" for cell in cells if not cell.made)
    if failed:
        lines += ["", f"{len(failed)} of {sum(cell.made for cell in cells)} cells are wrong (✗)."]
        lines += [
            f"- {cell.row.name}, {cell.exporter} {cell.opset}, {cell.attention}: {cell.reason}"
            for cell in failed
            if cell.reason
        ]
    if reasons:
        lines += ["", "Cells that cannot be made (–):", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def document(table: str) -> str:
    """docs/drift.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    return f"""# Drift

What the fusions find in the graphs that exporters write, by `make drift` ({versions}).

Each cell: fused / expected RMS norms, rotary embeddings (q and k apart) and attentions of a two-layer model after the
pipeline `fuse` (`baichuan2` for Baichuan2), then the largest relative error against the unfused graph in onnxruntime,
fp32, over all outputs and rows of a prefill with padding on the left, a chunk and cached decode; {TOLERANCE:.0e} is
allowed. What is expected follows from each architecture and its configuration (0 norms: the family has layer norms).
✗ is a part that was missed, numbers that changed, or a failure; any makes `make drift` fail.

{table}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="FAMILY", action="append", default=[], help="may be repeated")
    parser.add_argument("--json", action="store_true", help="the cells as JSON")
    parser.add_argument("--write", metavar="FILE", help="also write the table as a document")
    parser.add_argument("--keep", metavar="DIR", default="", help="save every exported graph")
    options = parser.parse_args()
    todo, cells = rows(options.only), []
    for number, row in enumerate(todo, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number}/{len(todo)} {row.name}", end="", file=sys.stderr, flush=True)
        cells += list(run_row(row, options.keep))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    table = markdown(cells)
    print(json.dumps([cell.as_json() for cell in cells], indent=2) if options.json else table, end="")
    if options.write:
        Path(options.write).write_text(document(table), encoding="utf-8")
    return 0 if all(cell.ok for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
