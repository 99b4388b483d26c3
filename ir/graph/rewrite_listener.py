"""Who wants to see each rewrite before it happens: a listener in the model's non-serialised `meta`.

The editor tells it what is to be replaced by what while the graph still holds the old nodes. A listener only looks; it
stops a rewrite by raising.
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
    """Uses of each old value are about to read the new one. `rule` is a pass name, with the rule's place if it has one.

    `matched` are the nodes that the old values were recognised by; `built` is not in the graph yet.
    """

    rule: str
    replaced: Mapping[onnx_ir.Value, onnx_ir.Value]
    built: Built
    matched: tuple[onnx_ir.Node, ...]


class Listener(Protocol):
    """Sees every replacement of a model's editors, before the graph changes."""

    def on_replace(self, event: Replacement) -> None: ...


def announce(model: onnx_ir.Model, event: Replacement) -> None:
    """Tell the model's listener, if it has one."""
    listener: Listener | None = model.meta.get(LISTENER)
    if listener is not None:
        listener.on_replace(event)


@contextlib.contextmanager
def listening(model: onnx_ir.Model, listener: Listener) -> Iterator[None]:
    """`listener` sees the replacements that are made in the block."""
    earlier = model.meta.get(LISTENER)
    model.meta[LISTENER] = listener
    try:
        yield
    finally:
        model.meta[LISTENER] = earlier
