"""Reproducers: a failing pass with the model as it came in, in a folder that `passopt replay` runs again.

model.onnx + weights.plan.json (no weight is copied), reproducer.json (pipeline from that pass on, options, error,
versions); for a numeric violation also before.onnx and after.onnx, a few nodes each, with inputs.npz to run them on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from passopt.ir.atomic_folders import staged_directory
from passopt.ir.errors import ModelError, PassoptError
from passopt.ir.serialization.model_files import save_reference
from passopt.ir.version import __version__
from passopt.passes.framework.base import Pass
from passopt.passes.pipeline.runner import Instrument
from passopt.passes.pipeline.text import describe
from passopt.verification.rewrites.check import Violation

REPORT_NAME = "reproducer.json"
BEFORE_NAME, AFTER_NAME, INPUTS_NAME = "before.onnx", "after.onnx", "inputs.npz"

_DISTRIBUTIONS = ("onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True)
class Reproducer:
    """What reproducer.json says: `passes` is the pipeline from the failing pass on, `kind` the class of the error.

    `rewrite_limit` is what `--rewrite-limit` left for these passes.
    """

    passes: str
    verify_each: str
    rewrite_limit: int | None
    kind: str
    message: str
    versions: Mapping[str, str]

    @property
    def failing(self) -> str:
        """The name of the pass that failed."""
        return self.passes.partition(",")[0].partition("{")[0]


class Position(Instrument):
    """Knows which pass is running; `index` is None before the first one."""

    def __init__(self) -> None:
        self.index: int | None = None

    def before_pass(self, index: int, item: Pass, model: onnx_ir.Model) -> None:
        self.index = index


def write_reproducer(
    directory: Path,
    model: onnx_ir.Model,
    passes: Sequence[Pass],
    error: PassoptError,
    verify_each: str,
    rewrite_limit: int | None = None,
) -> None:
    """Write the whole folder or nothing. `model` is what `passes[0]` failed on. Raises UsageError, ModelError."""
    report = Reproducer(
        passes=",".join(describe(item) for item in passes),
        verify_each=verify_each,
        rewrite_limit=rewrite_limit,
        kind=type(error).__name__,
        message=str(error),
        versions=versions(),
    )
    with staged_directory(directory) as staged:
        save_reference(model, staged)
        body = {**dataclasses.asdict(report), "command": f"passopt replay {directory}"}
        (staged / REPORT_NAME).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        if isinstance(error, Violation):
            _write_cut(staged, error)


def read_reproducer(directory: Path) -> Reproducer:
    """Raises ModelError if the folder holds no reproducer."""
    path = directory / REPORT_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return Reproducer(**{field.name: body[field.name] for field in dataclasses.fields(Reproducer)})
    except OSError as error:
        raise ModelError(f"{directory}: is no reproducer: {REPORT_NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not what passopt writes: {error!r}") from error


def versions() -> dict[str, str]:
    """Of passopt and all that decides about numbers."""
    found = {"passopt": __version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def free_name(path: Path) -> Path:
    """`path`, or `path.2`, `path.3` …, whichever does not exist."""
    found, count = path, 1
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}.{count}")
    return found


def _write_cut(folder: Path, violation: Violation) -> None:
    """The rewrite alone: both sides, and the inputs of the draw on which they differ most, weights among them."""
    comparison = violation.comparison
    for side, name in ((comparison.before, BEFORE_NAME), (comparison.after, AFTER_NAME)):
        onnx_ir.save(side.model, folder / name)
    inputs = comparison.inputs(violation.outcome.draw, real=violation.real)
    with (folder / INPUTS_NAME).open("wb") as file:
        np.savez(file, **inputs)  # type: ignore[arg-type]
