"""Observe the passes of `passopt run`: print or save the model after each pass, and tabulate counts and times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from pathlib import Path

import onnx_ir

from passopt.ir.serialization.model_files import save_reference
from passopt.ir.serialization.text import print_model
from passopt.passes.framework.records import PassRecord
from passopt.passes.pipeline.runner import Instrument

#: How many reasons to decline the table of rules shows for each rule.
_SHOWN_REASONS = 5


@dataclasses.dataclass
class PrintAfter(Instrument):
    """Write the text of the model after passes.

    Attributes:
        write: Called with the text of the model, headed by a line with the number and name of the pass.
        names: The passes after which the model is written; all if empty.
        only_changes: Write only after passes that changed the model.
    """

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
class Dump(Instrument):
    """Save model.onnx and weights.plan.json after every pass, in a numbered folder each; no weight is copied."""

    directory: Path

    def after_pass(self, index: int, record: PassRecord, model: onnx_ir.Model) -> None:
        folder = self.directory / f"{index + 1:02d}-{record.name}"
        folder.mkdir(parents=True)
        save_reference(model, folder)


def summary_table(records: Sequence[PassRecord], *, times: bool = False) -> str:
    """Return a table with one line per pass: matches, declines, nodes before and after, CPU milliseconds if `times`."""
    rows = [["pass", "matches", "declined", "nodes", *(["CPU ms"] if times else [])]]
    for record in records:
        nodes = f"{record.nodes_before} → {record.nodes_after}"
        declined = str(sum(record.result.declines.values()))
        row = [record.name, str(record.result.matches), declined, nodes]
        rows.append([*row, *([f"{1000 * record.seconds:.1f}"] if times else [])])
    return _aligned(rows, texts={0})


def rule_table(records: Sequence[PassRecord]) -> str:
    """Return a table with one line per rule, and its most frequent reasons to decline below it.

    The columns are the pass, the rule, how often it was tried, applied and declined, its CPU milliseconds ("-" if rules
    were not timed) and its source line.
    """
    rules = [(record.name, rule) for record in records for rule in record.result.rules]
    if not rules:
        return "no pass of this pipeline has rules"
    rows = [["pass", "rule", "tries", "hits", "declined", "CPU ms", "defined in"]]
    for name, rule in rules:
        seconds = f"{1000 * rule.seconds:.1f}" if rule.seconds is not None else "-"
        counts = [str(count) for count in (rule.tries, rule.hits, sum(rule.declines.values()))]
        rows.append([name, rule.name, *counts, seconds, _relative(rule.source)])
    header, *lines = _aligned(rows, texts={0, 1, 6}).splitlines()
    for index, (_, rule) in enumerate(rules):
        reasons = [f"    {count} × {why.splitlines()[0]}" for why, count in rule.declines.most_common(_SHOWN_REASONS)]
        more = len(rule.declines) - len(reasons)
        lines[index] = "\n".join([lines[index], *reasons, *([f"    and {more} other reasons"] if more > 0 else [])])
    return "\n".join([header, *lines])


def _relative(source: str) -> str:
    """Return `source` relative to the working folder if it lies below it, and unchanged otherwise."""
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source


def _aligned(rows: Sequence[Sequence[str]], texts: Container[int]) -> str:
    """Align the columns of a table: those with an index in `texts` to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if column in texts else cell.rjust(width) for column, (cell, width) in columns]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
