"""Write and read reproducers: folders with a failing pass and its input model, which `passopt replay` runs again.

A folder holds model.onnx and weights.plan.json (no weight is copied), and reproducer.json with the pipeline from the
failing pass on, the options, the error and the versions. For a numeric violation it also holds before.onnx and
after.onnx, of a few nodes each, and inputs.npz to run them on.
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
from passopt.ir.json_text import read_json
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
    """The contents of reproducer.json.

    `passes` is the pipeline from the failing pass on, `kind` the class of the error. `rewrite_limit` is the number of
    rewrites that `--rewrite-limit` left for these passes; None for no limit.
    """

    passes: str
    verify_each: str
    rewrite_limit: int | None
    kind: str
    message: str
    versions: Mapping[str, str]

    @property
    def failing(self) -> str:
        """Return the name of the pass that failed."""
        return self.passes.partition(",")[0].partition("{")[0]


class Position(Instrument):
    """Remember the index of the pass that is running; `index` is None before the first pass."""

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
    """Write a reproducer to the folder `directory`, either whole or not at all.

    Args:
        directory: The folder to write.
        model: The model on which `passes[0]` failed.
        passes: The pipeline from the failing pass on.
        error: The error of that pass; a Violation adds the models before and after the rewrite, and their inputs.
        verify_each: The value of `--verify-each` of the run.
        rewrite_limit: The number of rewrites that were left for these passes; None for no limit.

    Raises:
        UsageError: If the folder cannot be written.
        ModelError: If the model cannot be written.
    """
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
    """Read the reproducer.json of a folder.

    Raises:
        ModelError: If the file cannot be read or is not what passopt writes.
    """
    path = directory / REPORT_NAME
    try:
        body = read_json(path)
        found = Reproducer(**{field.name: body[field.name] for field in dataclasses.fields(Reproducer)})
        _check_types(found)
        return found
    except OSError as error:
        raise ModelError(f"{directory}: is no reproducer: {REPORT_NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not what passopt writes: {error!r}") from error


def _check_types(found: Reproducer) -> None:
    """Raise TypeError if a field is of another type than passopt writes."""
    texts = (found.passes, found.verify_each, found.kind, found.message)
    limit = found.rewrite_limit
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.versions, dict):
        raise TypeError("passes, verify_each, kind and message must be texts, and versions an object")
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise TypeError(f"rewrite_limit is {limit!r}, expected a number of rewrites or null")


def versions() -> dict[str, str]:
    """Return the versions of passopt, Python and the libraries that influence numeric results, by name."""
    found = {"passopt": __version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def free_name(path: Path) -> Path:
    """Return `path`, or the first of `path.2`, `path.3` and so on that does not exist yet."""
    found, count = path, 1
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}.{count}")
    return found


def _write_cut(folder: Path, violation: Violation) -> None:
    """Write the single rewrite: the model on either side, and the inputs of the draw on which the two differ most.

    Weights are among those inputs. Of a violation that only the whole graph shows, there are the inputs alone.
    """
    comparison = violation.comparison
    if comparison is not None:
        for side, name in ((comparison.before, BEFORE_NAME), (comparison.after, AFTER_NAME)):
            onnx_ir.save(side.model, folder / name)
    with (folder / INPUTS_NAME).open("wb") as file:
        np.savez(file, **violation.inputs())
