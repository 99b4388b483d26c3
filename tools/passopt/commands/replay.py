"""`passopt replay`: run the pass of a reproducer again."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.errors import CheckError, ModelError, PassoptError, UsageError
from passopt.ir.serialization.model_files import load_model
from passopt.passes.framework.rewrite_limit import RewriteLimit, set_rewrite_limit
from passopt.passes.pipeline.instruments import summary_table
from passopt.passes.pipeline.runner import Instrument, run_passes
from passopt.passes.pipeline.text import Resolved, resolve
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
from passopt.verification.rewrites.compare_sides import relative_error


def replay(options: argparse.Namespace) -> int:
    """Exit 0 if the pipeline runs through now, 1 if it fails in this way or another."""
    folder = Path(options.directory)
    report = read_reproducer(folder)
    pipeline = _pipeline(folder, report)
    for name, version in versions().items():
        if report.versions.get(name, version) != version:
            print(f"{name} was {report.versions[name]}, is {version}")
    if (folder / BEFORE_NAME).exists():
        print(_compare_cut(folder))
    position = Position()
    instruments: list[Instrument] = [position]
    if report.verify_each == "numeric":
        instruments.append(NumericCheck())
    model = load_model(folder)
    if report.rewrite_limit is not None:
        set_rewrite_limit(model, RewriteLimit(report.rewrite_limit))
    try:
        records = run_passes(model, pipeline.passes, verify=report.verify_each != "off", instruments=instruments)
    except PassoptError as error:
        same = position.index == 0 and type(error).__name__ == report.kind
        raise CheckError(f"{folder}: {'still fails' if same else 'fails in another way'}: {error}") from error
    print(summary_table(records))
    print(f"{folder}: no longer fails; it failed with:\n  {report.message.partition(chr(10))[0]}")
    return 0


def _pipeline(folder: Path, report: Reproducer) -> Resolved:
    try:
        return resolve(report.passes, complete=False)
    except UsageError as error:
        raise UsageError(f"{folder}: cannot be replayed, its pipeline is {report.passes}: {error}") from error


def _compare_cut(folder: Path) -> str:
    """How far the stored rewrite is off, whatever the pass does today."""
    before, after = (Session(onnx_ir.load(folder / name), optimize=False) for name in (BEFORE_NAME, AFTER_NAME))
    with np.load(folder / INPUTS_NAME) as inputs:
        feeds = dict(inputs)
    expected = before.run(feeds)
    try:
        found = after.run(feeds)
    except ModelError as error:
        return f"{AFTER_NAME}: {error}"
    errors = [
        relative_error(reference, found[name]) if reference.shape == found[name].shape else float("inf")
        for name, reference in expected.items()
    ]
    return f"{AFTER_NAME} against {BEFORE_NAME}: max|Δ|/max|reference| = {max(errors):.2e}"
