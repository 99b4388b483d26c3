"""`--rewrite-limit N`: how many rewrites a run may still make, to find the one that breaks a model by halving.

A rewrite of a rule counts as one, and so does a whole-graph pass that changes anything. What the limit stops is left as
it was, so every prefix of a run is a model.
"""

from __future__ import annotations

import dataclasses

import onnx_ir

_KEY = "passopt.rewrite_limit"


@dataclasses.dataclass
class RewriteLimit:
    """The budget of one run, and the rewrite that used the last of it."""

    limit: int
    used: int = 0
    last: str = ""

    @property
    def reached(self) -> bool:
        return self.used >= self.limit

    def take(self, what: str) -> None:
        """Count the rewrite `what`, which is about to happen or has happened."""
        self.used += 1
        self.last = what

    def __str__(self) -> str:
        last = f"; the last was {self.last}" if self.last else ""
        return f"rewrite limit {self.limit}: {self.used} applied{last}"


def set_rewrite_limit(model: onnx_ir.Model, limit: RewriteLimit) -> None:
    """Let every pass that runs on `model` respect `limit`. It is not written with the model."""
    model.meta[_KEY] = limit


def rewrite_limit(model: onnx_ir.Model) -> RewriteLimit | None:
    """The limit of the run that `model` is in, if any."""
    found = model.meta.get(_KEY)
    return found if isinstance(found, RewriteLimit) else None
