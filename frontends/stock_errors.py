"""Turn any error of a model's own code, or of torch on its behalf, into one message that gives the reason in full."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.errors import ModelError, PassoptError


class Unsupported(Exception):
    """Says what a class does that export does not support."""


@contextlib.contextmanager
def stock_errors(checkpoint: Checkpoint, subject: str) -> Iterator[None]:
    """Let errors within the block become a ModelError: the checkpoint, `subject` (what cannot be done), the reason.

    Errors of passopt itself pass through, and so does the user's interrupt. Whatever else is raised is the code's own,
    also what would end Python or stop a generator.
    """
    try:
        yield
    except PassoptError:
        raise
    except BaseException as error:  # torch and the stock code may raise anything, and call sys.exit().
        if type(error) is KeyboardInterrupt:
            raise
        text = f"{checkpoint.directory}: {subject}: {reason(error, checkpoint.directory)}"
        raise ModelError(f"{text}{_older_library(checkpoint)}") from error


def _older_library(checkpoint: Checkpoint) -> str:
    """Return a sentence about the version of transformers if the checkpoint was made for one of before."""
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return ""
    made_for = str(checkpoint.config.get("transformers_version", ""))
    if not made_for or made_for.partition(".")[0] == installed.partition(".")[0]:
        return ""
    return f" The checkpoint was made for transformers {made_for}; {installed} is installed."


def reason(error: BaseException, root: Path) -> str:
    """Return an error's type and whole message, the line of the checkpoint's code that led to it, and its causes."""
    kind = "" if isinstance(error, Unsupported) else f"{type(error).__name__}: "
    parts = [f"{kind}{error}".rstrip(": \n")]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == root]
    if frames:
        parts.append(f"(at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("_passopt"):
        parts.append(f"The code needs the package {error.name.partition('.')[0]}, which is not installed: install it.")
    if error.__cause__ is not None and str(error.__cause__) not in str(error):
        parts.append(f"Caused by {reason(error.__cause__, root)}")
    return " ".join(parts)
