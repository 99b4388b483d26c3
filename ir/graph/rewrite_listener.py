"""Let a listener see each rewrite before it happens; it is kept in the model's `meta`, which is not serialised.

The editor tells the listener which values are about to be replaced while the graph still holds the old nodes. A
listener only looks; it stops a rewrite by raising an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import onnx_ir

from passopt.ir.graph.builder import Built

LISTENER = "passopt.listener"


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
        """Look at a replacement before it happens; raise an error to stop it."""


def announce(model: onnx_ir.Model, event: Replacement) -> None:
    """Tell the model's listener about a replacement, if the model has a listener."""
    listener: Listener | None = model.meta.get(LISTENER)
    if listener is not None:
        listener.on_replace(event)


@contextlib.contextmanager
def listening(model: onnx_ir.Model, listener: Listener) -> Iterator[None]:
    """Let `listener` see the replacements that are made within the block, in place of any earlier listener."""
    earlier = model.meta.get(LISTENER)
    model.meta[LISTENER] = listener
    try:
        yield
    finally:
        model.meta[LISTENER] = earlier
