"""Carry along with a model what belongs to one run of passes: who listens, how far it may go, what was inferred.

The context lies in the model's non-serialised `meta`, under one key, so that a pass needs no argument for it. A clone
of the model starts with an empty one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import onnx_ir

from passopt.ir.graph.builder import Built, TypesMemo

_KEY = "passopt.run"


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A rewrite that is about to happen: the uses of each old value in `replaced` will read the new one.

    `rule` is the name of the pass, followed by the rule's location if it has one. `matched` are the nodes by which the
    old values were recognised; the nodes of `built` are not in the graph yet.
    """

    rule: str
    replaced: Mapping[onnx_ir.Value, onnx_ir.Value]
    built: Built
    matched: tuple[onnx_ir.Node, ...]


class Listener(Protocol):
    """Sees every replacement that editors of a model make, before the graph changes."""

    def on_replace(self, event: Replacement) -> None:
        """Look at a replacement before it happens, while the graph holds the old nodes; raise an error to stop it."""


@dataclasses.dataclass
class RewriteLimit:
    """The number of rewrites that a run may make, to find the one that breaks a model by halving.

    A rewrite of a rule counts as one, and so does a whole-graph pass that changes anything. What the limit stops is
    left as it was, so every prefix of a run is a model.

    Attributes:
        limit: The number of rewrites that may be made.
        used: The number that were made.
        last: What the last of them was, for people.
    """

    limit: int
    used: int = 0
    last: str = ""

    @property
    def reached(self) -> bool:
        """Return True if no rewrite is left."""
        return self.used >= self.limit

    def take(self, what: str) -> None:
        """Count one rewrite, which is about to happen or has just happened.

        Args:
            what: The rewrite, for people.
        """
        self.used += 1
        self.last = what

    def __str__(self) -> str:
        last = f"; the last was {self.last}" if self.last else ""
        return f"rewrite limit {self.limit}: {self.used} applied{last}"


@dataclasses.dataclass
class RunContext:
    """What one run of passes over one model shares.

    Attributes:
        listener: Sees each replacement before it happens.
        rewrite_limit: Stops the run after so many rewrites; None for no limit.
        times_rules: True while rules take their own CPU time, which slows them a little.
        types: What type inference found, by operator, attributes and inputs: every layer asks the same.
    """

    listener: Listener | None = None
    rewrite_limit: RewriteLimit | None = None
    times_rules: bool = False
    types: TypesMemo = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx_ir.Model) -> RunContext:
        """Return the context of the run that `model` is in; an empty one is made at the first request."""
        found = model.meta.get(_KEY)
        if not isinstance(found, cls):
            found = model.meta[_KEY] = cls()
        return found

    def announce(self, event: Replacement) -> None:
        """Tell the listener of a replacement, if there is one."""
        if self.listener is not None:
            self.listener.on_replace(event)


@contextlib.contextmanager
def listening(model: onnx_ir.Model, listener: Listener) -> Iterator[None]:
    """Let `listener` see the replacements that are made in the block."""
    context = RunContext.of(model)
    earlier, context.listener = context.listener, listener
    try:
        yield
    finally:
        context.listener = earlier
