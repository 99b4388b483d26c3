"""Hold the findings of a verification: one row per scenario and output, printed as the worst row of each scenario.

Errors are relative: max|difference| / max|reference| over the positions that hold tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.relative_error import relative_error
from passopt.reporting.result import Result
from passopt.verification.scenarios import Observation, Scenario

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TOP_1 = "top-1"
PERPLEXITY = "perplexity"
#: The scenario of the rows that judge a lossy model by its predictions.
PREDICTIONS = "predictions"


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared output of one scenario.

    `error` is a relative error; for top-1 it is the share of positions that disagree, for the perplexity |ratio − 1|.
    A row that is not `judged` is shown only: what decides for a lossy model are its predictions. Even so, a value that
    is not finite, or of another shape, is wrong.
    """

    comparison: str
    scenario: str
    output: str
    error: float
    tolerance: float
    note: str = ""
    judged: bool = True

    @property
    def ok(self) -> bool:
        """Return whether the error is within the tolerance, or finite if it is not judged."""
        return self.error <= self.tolerance if self.judged else math.isfinite(self.error)

    @property
    def badness(self) -> tuple[bool, float]:
        """Return a key that sorts rows from best to worst."""
        return not self.ok, self.error / self.tolerance if self.tolerance else self.error


@dataclasses.dataclass(frozen=True, repr=False)
class VerifyReport(Result):
    """The rows of all comparisons, and notes that say what was compared and how.

    Attributes:
        rows: One per scenario and output: the relative error, its tolerance, and a note.
        notes: What was compared, and how.
        lossy: What a lossy model is judged by, such as "int8"; "" for models that should agree.
        costliest: The place at which a lossy model that is worse than declared loses most; "" if there is none.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    lossy: str = ""
    costliest: str = ""

    @property
    def ok(self) -> bool:
        """Return whether there are rows and every row is within its tolerance."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        """Return the row that exceeds its tolerance most, or comes nearest to it."""
        return max(self.rows, key=lambda row: row.badness)

    def to_json(self) -> dict[str, object]:
        rows = [
            {**dataclasses.asdict(row), "error": row.error if math.isfinite(row.error) else None, "ok": row.ok}
            for row in self.rows
        ]
        body = {"ok": self.ok, "verdict": self.verdict, "notes": list(self.notes), "rows": rows}
        return {**body, "costliest": self.costliest} if self.lossy else body

    @property
    def verdict(self) -> str:
        """Return the verdict in words."""
        failed = sum(not row.ok for row in self.rows)
        if not self.lossy:
            return "ok" if self.ok else f"FAILED: {failed} of {len(self.rows)} checks beyond tolerance"
        if self.ok:
            return f"ok: lossy as declared ({self.lossy})"
        place = f"; costs most: {self.costliest}" if self.costliest else ""
        return f"FAILED: worse than declared ({self.lossy}), {failed} of {len(self.rows)} checks{place}"

    def to_text(self) -> str:
        """Return the notes, then a table per comparison with one line per scenario that shows its worst output."""
        lines = list(self.notes)
        for comparison in dict.fromkeys(row.comparison for row in self.rows):
            lines += ["", f"{comparison}:", *_table([row for row in self.rows if row.comparison == comparison])]
        return "\n".join([*lines, "", self.verdict]).lstrip("\n")


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [("scenario", "worst output", "error", "tolerance", "", "")]
    for scenario in dict.fromkeys(row.scenario for row in rows):
        own = [row for row in rows if row.scenario == scenario]
        if scenario == PREDICTIONS:
            cells += [_cells(row, [row.note]) for row in own]
            continue
        worst = max(own, key=lambda row: row.badness)
        cells.append(_cells(worst, list(dict.fromkeys(row.note for row in (worst, *own) if row.note))))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(line, widths)), line[5]]).rstrip()
        for line in cells
    ]


def _cells(row: Row, notes: Sequence[str]) -> tuple[str, str, str, str, str, str]:
    verdict = ("ok" if row.ok else "FAILED") if row.judged or not row.ok else "-"
    tolerance = f"{row.tolerance:.1e}" if row.judged else "-"
    return row.scenario, row.output, f"{row.error:.2e}", tolerance, verdict, ", ".join(notes)


def compare(
    comparison: str, scenario: Scenario, reference: Observation, candidate: Observation, tolerance: float
) -> list[Row]:
    """Return one row for the logits, one for each cache output and one for the top-1 agreement of a scenario.

    The top-1 row is left out if the error of the logits is infinite.
    """
    pairs = [_aligned(*both) for both in zip(reference.logits, candidate.logits, strict=True)]
    valid = [step.valid[:, -pair[0].shape[1] :] for step, pair in zip(scenario.steps, pairs, strict=True)]
    error = max(relative_error(one, other, where) for (one, other), where in zip(pairs, valid, strict=True))
    rows = [Row(comparison, scenario.name, "logits", error, tolerance, _shapes(pairs))]
    rows += _compare_cache(comparison, scenario, reference, candidate, tolerance)
    if error < math.inf:
        rows.append(_top_1(comparison, scenario, pairs, valid, tolerance))
    return rows


def _compare_cache(
    comparison: str, scenario: Scenario, reference: Observation, candidate: Observation, tolerance: float
) -> list[Row]:
    where = scenario.steps[-1].attention_mask > 0
    rows = []
    for name, one in reference.present.items():
        other = candidate.present.get(name)
        if other is None:
            rows.append(Row(comparison, scenario.name, name, math.inf, tolerance, "the candidate has no such output"))
            continue
        # [b, heads, kv, head_dim] → [b, kv, heads, head_dim], so that the mask selects leading axes.
        turned = [np.moveaxis(array, 2, 1) for array in (one, other)]
        error = relative_error(turned[0], turned[1], where)
        rows.append(Row(comparison, scenario.name, name, error, tolerance, _shapes([(one, other)])))
    return rows


def _aligned(reference: Array, candidate: Array) -> tuple[Array, Array]:
    """Return both logits, with only the reference's last position if the candidate gives the last position only."""
    if candidate.shape[1] == 1 != reference.shape[1]:
        return reference[:, -1:], candidate
    return reference, candidate


def _shapes(pairs: Sequence[tuple[Array, Array]]) -> str:
    for one, other in pairs:
        if one.shape != other.shape:
            return f"shape {list(other.shape)}, expected {list(one.shape)}"
    return ""


def _top_1(
    comparison: str,
    scenario: Scenario,
    pairs: Sequence[tuple[Array, Array]],
    valid: Sequence[Array],
    tolerance: float,
) -> Row:
    """Return the row for the share of positions at which the most likely token differs.

    Only those positions count at which the best and the second-best logit differ by more than twice the tolerated
    error, because the error may move both of them.
    """
    qualified, wrong, total = 0, 0, 0
    for (reference, candidate), where in zip(pairs, valid, strict=True):
        one, other = reference[where].astype(np.float32), candidate[where].astype(np.float32)
        if one.shape[-1] < 2:
            continue
        second, best = np.partition(one, -2, axis=-1)[:, -2:].T
        clear = best - second > 2 * tolerance * np.abs(one).max()
        total += len(one)
        qualified += int(clear.sum())
        wrong += int((one.argmax(axis=-1) != other.argmax(axis=-1))[clear].sum())
    note = f"top-1 {qualified - wrong}/{qualified} of {total} positions"
    return Row(comparison, scenario.name, TOP_1, wrong / qualified if qualified else 0.0, 0.0, note)


def compare_perplexity(comparison: str, one: float | None, other: float | None, tolerance: float) -> list[Row]:
    """Return a row for |candidate / reference − 1|, or no row if one of the two has no perplexity."""
    if one is None or other is None:
        return []
    error = abs(other / one - 1) if math.isfinite(one) and math.isfinite(other) else math.inf
    note = f"perplexity {one:.4f} → {other:.4f}"
    return [Row(comparison, "text", PERPLEXITY, error, tolerance, note)]
