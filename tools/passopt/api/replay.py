"""Run the failing pass of a reproducer again: `passopt.replay`."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError, PassoptError, UsageError
from passopt.ir.graph.run_context import RewriteLimit
from passopt.ir.relative_error import rewrite_error
from passopt.ir.serialization.model_files import load_model
from passopt.passes.framework.records import PassRecord
from passopt.passes.pipeline.instruments import summary_table
from passopt.passes.pipeline.runner import Instrument, run_passes
from passopt.passes.pipeline.text import Resolved, resolve
from passopt.reporting.result import Result
from passopt.targets.onnxruntime.session import Session
from passopt.verification.reproducer import (
    AFTER_NAME,
    BEFORE_NAME,
    INPUTS_NAME,
    Position,
    Reproducer,
    read_reproducer,
    versions,
)
from passopt.verification.rewrites.check import NumericCheck


@dataclasses.dataclass(frozen=True, repr=False)
class ReplayResult(Result):
    """The result of running a reproducer again.

    Attributes:
        folder: The reproducer.
        still_fails: The error message if it still fails, in the same way or another; None if it runs without an error.
        same: True if it fails in the recorded pass and with the recorded class of error.
        remarks: The versions that have changed since, and the error of the stored rewrite if there is one.
        records: One record per pass, if all of them ran.
        recorded: The first line of the recorded error.
    """

    folder: Path
    still_fails: str | None
    same: bool
    remarks: tuple[str, ...]
    records: tuple[PassRecord, ...]
    recorded: str

    @property
    def ok(self) -> bool:
        """Return whether it no longer fails."""
        return self.still_fails is None

    def to_text(self) -> str:
        lines = list(self.remarks)
        if self.ok:
            lines += [
                summary_table(self.records),
                f"{self.folder}: no longer fails; it failed with:\n  {self.recorded}",
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        records = [record.to_json() for record in self.records]
        return {**dataclasses.asdict(self), "folder": str(self.folder), "ok": self.ok, "records": records}

    @property
    def verdict(self) -> str:
        """Return how it fails now, as an error message."""
        return f"{self.folder}: {'still fails' if self.same else 'fails in another way'}: {self.still_fails}"


def replay(directory: Path | str) -> ReplayResult:
    """Run the failing pass of a reproducer again, with the passes after it.

    Args:
        directory: The folder that a failing run left.

    Returns:
        Whether it still fails and how, or the records of the passes.

    Returns:
        Whether it still fails, in the same way or another, and what changed since it was recorded.

    Raises:
        ModelError: The folder holds no reproducer, or a stored rewrite that cannot be run.
        UsageError: Its pipeline names a pass that does not exist.
    """
    folder = Path(directory)
    report = read_reproducer(folder)
    pipeline = _pipeline(folder, report)
    remarks = [
        f"{name} was {report.versions[name]}, is {version}"
        for name, version in versions().items()
        if report.versions.get(name, version) != version
    ]
    if (folder / BEFORE_NAME).exists():
        remarks.append(_compare_cut(folder))
    position = Position()
    instruments: list[Instrument] = [position]
    if report.verify_each == "numeric":
        instruments.append(NumericCheck())
    recorded = report.message.partition("\n")[0]
    model = load_model(folder)
    try:
        records = run_passes(
            model,
            pipeline.passes,
            verify=report.verify_each != "off",
            instruments=instruments,
            rewrite_limit=RewriteLimit(report.rewrite_limit) if report.rewrite_limit is not None else None,
        )
    except PassoptError as error:
        same = position.index == 0 and type(error).__name__ == report.kind
        return ReplayResult(folder, str(error), same, tuple(remarks), (), recorded)
    return ReplayResult(folder, None, False, tuple(remarks), tuple(records), recorded)


def _pipeline(folder: Path, report: Reproducer) -> Resolved:
    try:
        return resolve(report.passes, complete=False)
    except UsageError as error:
        raise UsageError(f"{folder}: cannot be replayed, its pipeline is {report.passes}: {error}") from error


def _compare_cut(folder: Path) -> str:
    """Return a remark on how far the two sides of the stored rewrite differ, whatever the pass does today."""
    before, after = (Session(onnx_ir.load(folder / name), optimize=False) for name in (BEFORE_NAME, AFTER_NAME))
    try:
        with np.load(folder / INPUTS_NAME) as inputs:
            feeds = dict(inputs)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{folder / INPUTS_NAME}: is damaged: {error}. Run the pipeline again.") from error
    expected = before.run(feeds)
    try:
        found = after.run(feeds)
    except ModelError as error:
        return f"{AFTER_NAME}: {error}"
    errors = [
        rewrite_error(reference, found[name]) if reference.shape == found[name].shape else float("inf")
        for name, reference in expected.items()
    ]
    return f"{AFTER_NAME} against {BEFORE_NAME}: max|Δ|/max|reference| = {max(errors):.2e}"
