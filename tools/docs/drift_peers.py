"""Fuse the graphs of peers' tests, compare the numbers, and write the table of what was found."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir

from passopt.ir.relative_error import operator_error
from passopt.passes import resolve, run_passes
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import random_feeds, read_model
from passopt.testing.peer_graphs import OPERATORS, PeerGraph, peer_graphs

#: The largest relative error of a fused graph; a graph that computes in 16 bits anywhere has the second one.
TOLERANCE, TOLERANCE_16 = 1e-5, 2e-3


@dataclasses.dataclass(frozen=True)
class Peer:
    """Hold what was found in one graph: the parts by kind, and the largest relative error over all inputs."""

    graph: PeerGraph
    found: Mapping[str, int]
    error: float

    @property
    def ok(self) -> bool:
        """Return whether the numbers stayed, and everything was fused for which no reason is given."""
        allowed = TOLERANCE_16 if "float16" in self.graph.text else TOLERANCE
        return self.error <= allowed and (self.found == dict(self.graph.expected)) == (not self.graph.reason)

    def row(self) -> str:
        """Return the row of the table."""
        parts = ", ".join(f"{self.found[part]}/{count} {part}" for part, count in self.graph.expected.items())
        mark = "" if self.ok else "✗ "
        return f"| {self.graph.name} | {mark}{parts} | {self.error:.0e} | {self.graph.reason} |"


def measure() -> list[Peer]:
    """Fuse every graph and compare it with the unfused one, over several lengths and masks."""
    return [_measured(graph) for graph in peer_graphs()]


def _measured(graph: PeerGraph) -> Peer:
    original = read_model(graph.text)
    changed = original.clone()
    run_passes(changed, resolve(graph.passes).passes)
    # Operators that the graph had before were fused by whoever wrote it.
    before, after = (collections.Counter(node.op_type for node in model.graph) for model in (original, changed))
    found = {part: sum(after[name] - before[name] for name in OPERATORS[part]) for part in graph.expected}
    return Peer(graph, found, _error(graph, original, changed))


def _error(graph: PeerGraph, original: onnx_ir.Model, changed: onnx_ir.Model) -> float:
    before, after, worst = Session(original), Session(changed), 0.0
    for lengths in graph.shapes:
        for given in graph.inputs(lengths):
            inputs = {**random_feeds(original, lengths), **given}
            expected, found = before.run(inputs), after.run(inputs)
            worst = max(worst, *(operator_error(reference, found[name]) for name, reference in expected.items()))
    return worst


def section(peers: Sequence[Peer]) -> str:
    """Return the section of the page."""
    rows = "\n".join(peer.row() for peer in peers)
    return f"""
## Graphs of peers' tests

onnxruntime and onnxscript test their own fusions on small graphs. These were written anew, after what such a test
describes. A cell gives fused / expected parts after the pipeline `fuse` (with opset 24 for QuickGelu, which becomes
Swish). The error is the largest one over several lengths, 1 among them, and masks that hide nothing, one end, or whole
rows. Where a part is not fused, the reason is given.

| graph | parts | error | why not |
| --- | --- | --- | --- |
{rows}

What these tests fuse beyond that has no operator in ONNX: a norm together with the sum of a skip connection, an
activation together with its bias, attention together with its projections, packed weights, and embeddings with their
norm. passopt leaves these sums and products in front of the fused operator.
"""
