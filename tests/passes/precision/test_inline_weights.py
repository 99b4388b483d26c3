"""quantize-weights on self-contained models, and on weights that several linears share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from passopt.ir.serialization.model_files import WEIGHTS_NAME, load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.lazy_weight import is_checkpoint_weight
from passopt.passes.cleanup.dead_code import RemoveDeadCode
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import check

ARRAY = np.random.default_rng(5).standard_normal((24, 20)).astype(np.float32)


def model_of(nodes, initializers=(), rows=24, columns=20, output="y"):
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", columns])],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def node(op_type, inputs, output, **attributes):
    return helper.make_node(op_type, inputs, [output], **attributes)


def constant(name, array):
    return node("Constant", [], name, value=numpy_helper.from_array(array))


PRODUCT = node("MatMul", ["x", "w"], "y")
RAW = numpy_helper.from_array(ARRAY, "w")
LISTED = helper.make_tensor("w", TensorProto.FLOAT, ARRAY.shape, ARRAY.reshape(-1))
HALF = ARRAY.astype(np.float16)
TURNED = numpy_helper.from_array(np.ascontiguousarray(ARRAY.T), "t")
FORMS = {
    "raw data": ([PRODUCT], [RAW]),
    "listed floats": ([PRODUCT], [LISTED]),
    "Constant": ([constant("w", ARRAY), PRODUCT], []),
    "Identity": ([node("Identity", ["v"], "w"), PRODUCT], [numpy_helper.from_array(ARRAY, "v")]),
    "Cast": (
        [node("Cast", ["v"], "w", to=TensorProto.FLOAT), PRODUCT],
        [numpy_helper.from_array(ARRAY.astype(np.float64), "v")],
    ),
    "Transpose": ([node("Transpose", ["t"], "w", perm=[1, 0]), PRODUCT], [TURNED]),
    "Transpose of a Constant": ([constant("t", ARRAY.T.copy()), node("Transpose", ["t"], "w"), PRODUCT], []),
    "Identity of a Transpose": ([node("Transpose", ["t"], "s"), node("Identity", ["s"], "w"), PRODUCT], [TURNED]),
    "Gemm": ([node("Gemm", ["x", "w"], "y")], [RAW]),
    "Gemm of a Transpose": ([node("Gemm", ["x", "t"], "y", transB=1)], [TURNED]),
}


def saved(model, path, **options):
    onnx.save(model, path, **options)
    return load_model(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("external", [False, True])
def test_every_form_of_a_weight_gives_the_same_codes(form, external, tmp_path):
    nodes, initializers = FORMS[form]
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0, "convert_attribute": True}
    model = saved(model_of(nodes, initializers), tmp_path / "model.onnx", **(options if external else {}))
    changed, _ = check(QuantizeWeights(), model, matches=1)
    data = {name.rpartition(".")[2]: value.const_value.numpy() for name, value in changed.graph.initializers.items()}
    assert set(data) == {"codes", "scales"}
    scales = np.abs(ARRAY).max(axis=0) / np.float32(127)
    assert np.array_equal(data["scales"], scales)
    assert np.array_equal(data["codes"], np.rint(ARRAY / scales).astype(np.int8).T)


@pytest.mark.parametrize("form", ["raw data", "Constant", "Identity", "Cast"])
def test_a_weight_that_stays_is_not_changed(form, tmp_path):
    """Another operator reads the weight too: the graph keeps its text, and the weight its place."""
    nodes, initializers = FORMS[form]
    more = [node("ReduceMax", ["w"], "m", keepdims=0), node("Add", ["y", "m"], "z")]
    model = saved(model_of([*nodes, *more], initializers, output="z"), tmp_path / "model.onnx")
    before = print_model(model)
    result = QuantizeWeights().run(model)
    assert (result.modified, list(result.declines)) == (False, ["w is used by other operators than linears"])
    assert print_model(model) == before
    assert not any(map(is_checkpoint_weight, model.graph.initializers.values()))


def test_a_weight_that_the_caller_may_replace_stays(tmp_path):
    model = model_of([PRODUCT], [RAW])
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ARRAY.shape))
    result = QuantizeWeights().run(saved(model, tmp_path / "model.onnx"))
    assert not result.modified


SQUARE = np.random.default_rng(6).standard_normal((24, 24)).astype(np.float32)


def products(names):
    """A chain of MatMuls by these weights."""
    values = ["x", *(f"h{index}" for index in range(len(names) - 1)), "y"]
    return [node("MatMul", [values[index], name], values[index + 1]) for index, name in enumerate(names)]


SHARED = {
    "one initializer": (products(["w"] * 4), [numpy_helper.from_array(SQUARE, "w")]),
    "equal initializers": (products(["w", "v"] * 2), [numpy_helper.from_array(SQUARE, name) for name in "wv"]),
    "one Constant": ([constant("w", SQUARE), *products(["w"] * 4)], []),
    "Identities of one": (
        [node("Identity", ["w"], "a"), node("Identity", ["w"], "b"), *products(["a", "b", "w", "a"])],
        [numpy_helper.from_array(SQUARE, "w")],
    ),
    "Transposes of one": (
        [node("Transpose", ["w"], "a"), node("Transpose", ["w"], "b"), *products(["a", "b", "a", "b"])],
        [numpy_helper.from_array(SQUARE, "w")],
    ),
}


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("external", [False, True])
def test_a_shared_weight_is_stored_once(form, external, tmp_path):
    if external and form == "equal initializers":
        pytest.skip("equal bytes at two places of a file are not known to be equal, since weights are not read")
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0, "convert_attribute": True}
    nodes, initializers = SHARED[form]
    model = saved(model_of(nodes, initializers, columns=24), tmp_path / "model.onnx", **(options if external else {}))
    changed, _ = check(QuantizeWeights(), model, tolerance=5e-2)
    assert sorted(value.dtype.name for value in changed.graph.initializers.values()) == ["FLOAT", "INT8"]
    save_materialized(changed, tmp_path)
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 24 * 24 + 512
    QuantizeActivations().run(changed)
    RemoveDeadCode().run(changed)
    codes = [v for v in changed.graph.initializers.values() if v.dtype == onnx_ir.DataType.INT8]
    assert len(codes) == 1


def test_embedding_and_head_share_their_codes(tmp_path):
    table = numpy_helper.from_array(ARRAY, "table")
    nodes = [
        node("Gather", ["table", "input_ids"], "h"),
        node("Transpose", ["table"], "t", perm=[1, 0]),
        node("MatMul", ["h", "t"], "logits"),
    ]
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 24])],
        [table],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = saved(proto, tmp_path / "model.onnx")
    changed, _ = check(QuantizeWeights(embedding=True, head=True), model, matches=2, tolerance=5e-2)
    shapes = sorted(
        tuple(v.shape.numpy()) for v in changed.graph.initializers.values() if len(v.shape) and v.dtype != 7
    )
    assert shapes == [(24,), (24, 20)]
