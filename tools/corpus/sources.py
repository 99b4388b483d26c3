"""Gather the cases of all sources: ONNX's backend models, the graphs of peers' tests, and files of packages."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from cases import Case, backend_cases
from passopt.ir.serialization.model_files import MODEL_NAME, save_materialized
from passopt.testing.checking import random_feeds, read_model
from passopt.testing.peer_graphs import PeerGraph, peer_graphs
from wheels import wheel_cases


def all_cases() -> list[Case]:
    """Return all cases that can be had here, in a fixed order."""
    return [*backend_cases(), *peer_cases(), *wheel_cases()]


def peer_cases() -> list[Case]:
    """Return the graphs that the tests of onnxruntime and onnxscript fuse, rebuilt by generators of our own."""
    return [_peer_case(graph) for graph in peer_graphs()]


def _peer_case(graph: PeerGraph) -> Case:
    model = read_model(graph.text)
    lengths = graph.shapes[0]
    feeds = {**random_feeds(model, lengths), **next(iter(graph.inputs(lengths)))}
    with tempfile.TemporaryDirectory() as folder:
        save_materialized(model, Path(folder))
        proto = onnx.load(Path(folder) / MODEL_NAME)
    return Case(f"peer/{graph.name}", proto, feeds)
