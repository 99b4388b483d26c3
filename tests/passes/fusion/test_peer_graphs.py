"""The graphs of peers' tests: everything that has a standard form is fused, and the numbers stay."""

from __future__ import annotations

import collections

import pytest

from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checking import compare_numbers, read_model
from passopt.testing.peer_graphs import OPERATORS, peer_graphs

GRAPHS = peer_graphs()


def test_the_names_are_unique():
    assert len({graph.name for graph in GRAPHS}) == len(GRAPHS)


@pytest.mark.parametrize("graph", GRAPHS, ids=[graph.name for graph in GRAPHS])
def test_everything_is_fused(graph):
    model = read_model(graph.text)
    changed = model.clone()
    run_passes(changed, resolve(graph.passes).passes)
    before, after = (collections.Counter(node.op_type for node in one.graph) for one in (model, changed))
    found = {part: sum(after[name] - before[name] for name in OPERATORS[part]) for part in graph.expected}
    assert (found == dict(graph.expected)) == (not graph.reason), f"{found} of {dict(graph.expected)}"
    for lengths in graph.shapes:
        for inputs in graph.inputs(lengths):
            compare_numbers(model, changed, 2e-3 if "float16" in graph.text else 1e-5, inputs, lengths)
