"""freeze-defaults: inputs with a default become constants, others stay inputs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from passopt.ir.serialization.model_files import load_model
from passopt.passes.cleanup.freeze_defaults import FreezeDefaults
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import check

WEIGHT = np.random.default_rng(2).standard_normal((24, 20)).astype(np.float32)


def old_model(tmp_path, inputs=("x", "w")):
    shapes = {"x": ["n", 24], "w": ["rows", 20]}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 20])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8), path)
    return load_model(path)


def test_a_default_becomes_a_constant_which_other_passes_see(tmp_path):
    model = old_model(tmp_path)
    assert not QuantizeWeights().run(model).matches
    frozen, _ = check(FreezeDefaults(), model, matches=1, feeds={"w": WEIGHT}, lengths={"n": 3})
    assert [value.name for value in frozen.graph.inputs] == ["x"]
    assert list(frozen.graph.initializers["w"].shape) == [24, 20]
    assert QuantizeWeights().run(frozen).matches == 1


def test_inputs_without_a_default_stay(tmp_path):
    model, _ = check(FreezeDefaults(), old_model(tmp_path, ("x",)), matches=0)
    assert [value.name for value in model.graph.inputs] == ["x"]
