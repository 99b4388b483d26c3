"""Instruments for `passopt run`: print after passes, dump between passes, tables of times and counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir

from passopt.ir.files import save_reference
from passopt.ir.text import print_model
from passopt.passes.manager import PassRecord


@dataclasses.dataclass
class PrintAfter:
    """Writes the canonical text after passes: the named ones, all, or those that changed it."""

    write: Callable[[str], None]
    names: tuple[str, ...] = ()
    only_changes: bool = False

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        if self.names and record.name not in self.names:
            return
        if self.only_changes and not record.result.modified:
            return
        self.write(f"# after {index + 1}: {record.name}\n{print_model(model)}")


@dataclasses.dataclass
class Dump:
    """Saves model.onnx + weights.plan.json after every pass, numbered; no weight is copied."""

    directory: Path

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        folder = self.directory / f"{index + 1:02d}-{record.name}"
        folder.mkdir(parents=True)
        save_reference(model, folder)


def summary_table(records: Sequence[PassRecord], *, times: bool = False) -> str:
    """One aligned line per pass: matches, declines, nodes, and CPU milliseconds if `times`."""
    rows = [["pass", "matches", "declined", "nodes", *(["CPU ms"] if times else [])]]
    for record in records:
        nodes = f"{record.nodes_before} → {record.nodes_after}"
        declined = str(sum(record.result.declines.values()))
        row = [record.name, str(record.result.matches), declined, nodes]
        rows.append([*row, *([f"{1000 * record.seconds:.1f}"] if times else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
