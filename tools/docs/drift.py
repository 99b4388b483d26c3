"""Check that the fusions still find everything, for every family, exporter, attention and opset, and write the table.

    python tools/docs/drift.py [--only FAMILY] [--json] [--write FILE] [--keep DIR] [--numeric]

A cell that misses a part, or whose numbers change, is marked ✗ and makes the exit code 1. The expected counts follow
from the architectures and their configurations, never from passes. This takes some 15 minutes. Each row runs in a
process of its own, so that only one is in memory.
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

import drift_peers
from drift_row import BAICHUAN2
from passopt.testing.families import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
#: The largest max|Δ| / max|reference| that a fused graph may have against the unfused one, over all outputs and rows.
TOLERANCE = 1e-5

EXPORTS = (("dynamo", 18), ("dynamo", 23), ("torchscript", 18), ("torchscript", 20))
ATTENTIONS = ("eager", "sdpa")
KINDS = ("norms", "rotary", "attention")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Say what one layer of an architecture consists of.

    Attributes:
        norms: RMS norms, including those of q and k; 0 where a family has layer norms.
        rotary: Whether q and k are rotated.
        attentions: The implementations of attention that the class has.
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
    """A row of the table: a family, exported for all phases (`merged`) or for one of them."""

    family: str
    phase: str

    @property
    def name(self) -> str:
        """Return the name of the row in the table."""
        return self.family if self.phase == "merged" else f"{self.family}, {self.phase} only"

    @property
    def pipeline(self) -> str:
        """Return the pipeline that fuses the graphs of this row."""
        return "baichuan2" if self.family in BAICHUAN2 else "fuse"

    @property
    def expected(self) -> dict[str, int]:
        """Return the expected number of parts by kind.

        They are the norms of all layers and the last norm, one rotation of q and one of k per layer, and one attention
        per layer.
        """
        layers, architecture = _layers(self.family), ARCHITECTURES[self.family]
        norms = layers * architecture.norms + 1 if architecture.norms else 0
        return {"norms": norms, "rotary": 2 * layers * architecture.rotary, "attention": layers}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Hold the result of one export.

    Attributes:
        row: The row of the table.
        exporter: The exporter's name.
        opset: The opset that was exported.
        attention: The implementation of attention.
        found: How many parts of each kind were fused; empty if a step failed.
        error: The largest relative error against the unfused graph; None if it is not finite or a step failed.
        reason: Why a step failed, or why the cell cannot be made.
        made: False where the class has no such attention, so that there is nothing to export.
    """

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
        """Return whether everything was found and the numbers stayed the same, or the cell cannot be made."""
        if not self.made:
            return True
        return self.found == self.row.expected and self.error is not None and self.error <= TOLERANCE

    def text(self) -> str:
        """Return the cell as the table shows it."""
        if not self.made:
            return "–"
        if not self.found:
            return "✗ failed"
        counts = " ".join(f"{self.found[kind]}/{self.row.expected[kind]}" for kind in KINDS)
        error = "not finite" if self.error is None else f"{self.error:.0e}"
        return f"{counts} {error}" if self.ok else f"✗ {counts} {error}"

    def to_json(self) -> dict[str, object]:
        """Return the cell with everything that is known of it, for `--json`."""
        return {
            **dataclasses.asdict(self),
            "row": self.row.name,
            "pipeline": self.row.pipeline,
            "expected": self.row.expected,
            "ok": self.ok,
        }


def _layers(family: str) -> int:
    """Return the number of layers from the configuration, in which families call it by different names."""
    if family in BAICHUAN2:
        return 2
    config = CONFIGS[family]
    return int(next(config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in config))


def rows(only: Sequence[str]) -> list[Row]:
    """Return the rows of the families named, or all rows; raise SystemExit if a family is unknown."""
    if unknown := set(only) - ARCHITECTURES.keys():
        raise SystemExit(f"drift: no family {', '.join(sorted(unknown))}; there are {', '.join(ARCHITECTURES)}")
    chosen = [family for family in ARCHITECTURES if not only or family in only]
    found = [Row(family, "merged") for family in chosen]
    return found + [Row(family, phase) for family in _ALL_PHASES if family in chosen for phase in ("prefill", "decode")]


def run_row(row: Row, keep: str, *, numeric: bool = False) -> Iterator[Cell]:
    """Run a row in a process of its own, and yield its cells, including those that cannot be made.

    If the process dies, the cells that it has not reported are failures. With `keep`, graphs are saved in that folder.
    With `numeric`, every rewrite is checked by `--verify-each=numeric`, and an alarm makes the cell fail.
    """
    wanted = [
        (exporter, opset, attention)
        for exporter, opset in EXPORTS
        for attention in ATTENTIONS
        if attention in ARCHITECTURES[row.family].attentions
    ]
    names = [f"{exporter}:{opset}:{attention}" for exporter, opset, attention in wanted]
    program = str(ROOT / "tools" / "docs" / "drift_row.py")
    checks = "numeric" if numeric else "structure"
    command = [sys.executable, program, row.family, row.phase, row.pipeline, keep, checks, *names]
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
    """Return the table, followed by the reasons why cells failed or cannot be made."""
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
        lines += ["", "Cells that show – cannot be made:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def document(table: str, peers: str) -> str:
    """Return the page docs/measured/drift.md around the table, followed by the section on peers' graphs."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    return f"""# Drift: what the fusions find in exported graphs

This page shows, for every model family, exporter, opset and implementation of attention, whether passopt's fusions
still find every part of the graph that the exporter writes, and whether the fused graph computes the same. It was
measured with {versions}. `make drift` repeats the measurement and
writes this page.

How to read the table: each column names the exporter, the opset and the implementation of attention. Each cell gives
fused / expected RMS norms, rotary embeddings (those of q and k are counted separately) and attentions of a model with
two layers, after the pipeline `fuse` (`baichuan2` for Baichuan2). The last number of a cell is the largest relative
error of the fused graph against the unfused one. Both run in onnxruntime in fp32, and the error is taken over all
outputs and rows of a prefill with padding on the left, a chunk and cached decode; {TOLERANCE:.0e} is allowed.

The expected counts follow from each architecture and its configuration; 0 norms means that the family has layer norms
instead. ✗ marks a part that was missed, numbers that changed, or a step that failed. Any ✗ makes `make drift` fail.

{table}{peers}"""


def main() -> int:
    """Run the rows asked for, print the table, and return 1 if any cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="FAMILY", action="append", default=[], help="run this family only (may be repeated)"
    )
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    parser.add_argument("--write", metavar="FILE", help="also write the page with the table to FILE")
    parser.add_argument("--numeric", action="store_true", help="check every rewrite by numbers, too")
    parser.add_argument("--keep", metavar="DIR", default="", help="save every exported graph below DIR")
    options = parser.parse_args()
    todo, cells = rows(options.only), []
    for number, row in enumerate(todo, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number}/{len(todo)} {row.name}", end="", file=sys.stderr, flush=True)
        cells += list(run_row(row, options.keep, numeric=options.numeric))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    table = markdown(cells)
    print(json.dumps([cell.to_json() for cell in cells], indent=2) if options.json else table, end="")
    peers = drift_peers.measure()
    if not options.json:
        print(drift_peers.section(peers), end="")
    if options.write:
        Path(options.write).write_text(document(table, drift_peers.section(peers)), encoding="utf-8")
    return 0 if all(part.ok for part in (*cells, *peers)) else 1


if __name__ == "__main__":
    sys.exit(main())
