"""Count the rewrites of a run and stop them after N, for `--rewrite-limit N`.

By trying different limits a user finds the one rewrite that breaks a model, as in a binary search. One applied rule
counts as one rewrite, and so does one whole-graph pass that changed anything. Whatever the limit stops leaves the graph
as it was, so the result is a valid model for every N.
"""

from __future__ import annotations

import dataclasses

import onnx_ir

_KEY = "passopt.rewrite_limit"


@dataclasses.dataclass
class RewriteLimit:
    """The number of rewrites that a run may make, the number it has made, and a description of the latest one."""

    limit: int
    used: int = 0
    last: str = ""

    @property
    def reached(self) -> bool:
        """Return True if no further rewrite is allowed."""
        return self.used >= self.limit

    def take(self, what: str) -> None:
        """Count one rewrite, which is described by `what` and is about to happen or has just happened."""
        self.used += 1
        self.last = what

    def __str__(self) -> str:
        last = f"; the last was {self.last}" if self.last else ""
        return f"rewrite limit {self.limit}: {self.used} applied{last}"


def set_rewrite_limit(model: onnx_ir.Model, limit: RewriteLimit) -> None:
    """Make every pass that runs on `model` respect `limit`, which is not saved with the model."""
    model.meta[_KEY] = limit


def rewrite_limit(model: onnx_ir.Model) -> RewriteLimit | None:
    """Return the rewrite limit that was set for `model`, or None."""
    found = model.meta.get(_KEY)
    return found if isinstance(found, RewriteLimit) else None
