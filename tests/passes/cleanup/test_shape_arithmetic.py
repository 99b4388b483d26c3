"""Random graphs that compute with lengths: what passes believe of shapes holds for all lengths, 0 and 1 among them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from passopt.ir.serialization.model_files import file_weights, load_model, model_bytes
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve

_spec = importlib.util.spec_from_file_location("shape_graphs", Path(__file__).with_name("shape_graphs.py"))
shape_graphs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shape_graphs)

CLEAN_UP = "fold-constants,canonicalize,fold-constants,cse"


def session(data):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def outputs(runner, lengths):
    """Outputs for these lengths, or None if the graph does not run on them."""
    try:
        return runner.run(None, shape_graphs.feeds(lengths))
    except Exception:
        return None


def differences(seed, passes, folder):
    """The runs in which passes changed what the graph of a seed computes, and how many runs there were."""
    proto = shape_graphs.Graph(seed).model()
    try:
        original = session(proto.SerializeToString())
    except Exception:
        return [], 0  # a random target may be none at all
    expected = {lengths: outputs(original, lengths) for lengths in shape_graphs.LENGTHS}
    expected = {lengths: found for lengths, found in expected.items() if found is not None}
    if not expected:
        return [], 0
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    model = load_model(path)
    run_passes(model, resolve(passes).passes)
    changed, wrong = session(model_bytes(model, file_weights(model))), []
    for lengths, reference in expected.items():
        found = outputs(changed, lengths)
        if found is None or not all(np.array_equal(*pair) for pair in zip(reference, found, strict=True)):
            wrong.append((seed, lengths))
    return wrong, len(expected)


def check_seeds(seeds, passes, folder):
    results = [differences(seed, passes, folder) for seed in seeds]
    assert sum(runs for _, runs in results) > len(seeds)
    assert [place for wrong, _ in results for place in wrong] == []


def test_clean_up_keeps_what_graphs_compute(tmp_path):
    check_seeds(range(60), CLEAN_UP, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["canonicalize", "fold-constants", CLEAN_UP])
def test_more_graphs(passes, tmp_path):
    check_seeds(range(60, 400), passes, tmp_path)
