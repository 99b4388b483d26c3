"""One broken graph per invariant; the message shows the place among the ten nodes before and after it."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.expressions import Source
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.source_file import SourceFile

TEXT = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[3] x) => (float[3] y, float[3] z) <float[3] w = {1, 2, 3}> {
    [one] a = Add(x, w)
    [two] b = local.twice(a)
    [three] y = Sub(b, a)
    [four] z = Relu(y)
}
<opset_import: ["" : 21], domain: "local">
twice (p) => (q) {
    [inner] r = Add(p, p)
    [last] q = Identity(r)
}"""


@pytest.fixture
def model():
    return parse_model(TEXT)


def value(name):
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape([3]))


def node(model, name):
    return next(item for item in model.graph if item.name == name)


def rejected(model):
    with pytest.raises(VerifyError) as error:
        verify_model(model)
    return str(error.value)


def test_a_whole_model_passes(model):
    verify_model(model)


def test_names_are_unique(model):
    node(model, "three").outputs[0].name = "a"
    assert rejected(model).startswith("output of Sub 'three' 'a': the name is defined twice")


def test_an_initializer_and_a_value_share_no_name(model):
    node(model, "one").outputs[0].name = "w"
    assert "'w': the name is defined twice" in rejected(model)


def test_used_values_have_names(model):
    node(model, "one").outputs[0].name = None
    assert "output of Add 'one' has no name" in rejected(model)


def test_inputs_come_from_somewhere(model):
    node(model, "three").replace_input_with(1, value("ghost"))
    expected = "Sub 'three': input 1 'ghost' is neither a graph input, an initializer nor the output of a node"
    assert rejected(model).startswith(expected)


def test_an_initializer_that_is_not_registered_is_dangling(model):
    del model.graph.initializers["w"]
    assert "Add 'one': input 1 'w' is neither" in rejected(model)


def test_nodes_stand_after_what_they_read(model):
    moved = node(model, "one")
    model.graph.remove(moved)
    model.graph.append(moved)
    assert "local:twice" not in rejected(model)
    assert "twice 'two': input 0 'a' is used before its producer Add 'one'" in rejected(model)


def test_nothing_points_at_a_removed_node(model):
    model.graph.remove(node(model, "one"))
    assert "twice 'two': input 0 'a' is produced by Add 'one', which is not in the graph" in rejected(model)


def test_graph_outputs_are_produced(model):
    model.graph.outputs[1] = value("ghost")
    assert "graph output 'ghost' is not produced by any node of the graph" in rejected(model)


def test_graph_inputs_and_outputs_have_types(model):
    model.graph.outputs[1].type = None
    assert "graph output 'z' has no type" in rejected(model)
    model = parse_model(TEXT)
    model.graph.inputs[0].type = None
    assert "graph input 'x' has no type" in rejected(model)


def test_operators_exist(model):
    node(model, "four").op_type = "Rellu"
    assert "Rellu 'four': no such operator in opset 21" in rejected(model)


def test_domains_are_imported(model):
    node(model, "four").domain = "elsewhere"
    assert "Relu 'four': domain 'elsewhere' has no opset import" in rejected(model)


def test_the_number_of_inputs_fits_the_operator(model):
    three = node(model, "three")
    three.resize_inputs(3)
    assert "Sub 'three': has 3 inputs, the operator takes 2 to 2" in rejected(model)


def test_attributes_are_known(model):
    node(model, "four").attributes["axis"] = onnx_ir.AttrInt64("axis", 1)
    assert "Relu 'four': unknown attributes ['axis'] in opset 21" in rejected(model)


def test_initializers_are_registered_under_their_own_name(model):
    weight = model.graph.initializers["w"]
    dict.__setitem__(model.graph.initializers.data, "v", weight) if isinstance(
        model.graph.initializers.data, dict
    ) else None
    assert "initializer 'v' is registered under another name than its own, 'w'" in rejected(model)


def test_initializers_have_data_of_their_dtype_and_shape(model):
    weight = model.graph.initializers["w"]
    weight.shape = onnx_ir.Shape([4])
    assert "initializer 'w' is declared [4], its data has shape [3]" in rejected(model)
    weight.shape, weight.type = onnx_ir.Shape([3]), onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
    assert "initializer 'w' is declared FLOAT16, its data is FLOAT" in rejected(model)
    weight.const_value = None
    assert "initializer 'w' has no data" in rejected(model)


def test_raw_external_data_is_refused(model):
    shape = onnx_ir.Shape([3])
    tensor = onnx_ir.ExternalTensor("w.data", 0, 12, onnx_ir.DataType.FLOAT, shape=shape, name="w")
    model.graph.initializers["w"].const_value = tensor
    assert "'w' is raw external data; load models with passopt.ir.load_model" in rejected(model)


def test_files_of_weights_exist(model, tmp_path):
    file = SourceFile(str(tmp_path / "gone"), 12, 0, "")
    weight = LazyWeight(Source(onnx_ir.DataType.FLOAT, (3,), "w", file, 0), "w")
    model.graph.initializers["w"].const_value = weight
    assert f"initializer 'w' needs external data {tmp_path / 'gone'}, which does not exist" in rejected(model)
    (tmp_path / "gone").write_bytes(np.zeros(3, np.float32).tobytes())
    verify_model(model)


def test_local_functions_are_verified_too(model):
    (function,) = model.functions.values()
    last = next(item for item in function if item.name == "last")
    last.replace_input_with(0, value("ghost"))
    assert "Identity 'last': input 0 'ghost' is neither" in rejected(model)


def test_local_functions_have_opsets_of_their_own(model):
    del model.graph.opset_imports["local"]
    verify_model(model)
    (function,) = model.functions.values()
    function.opset_imports[""] = 5
    next(item for item in function if item.name == "last").op_type = "Gelu"
    assert "Gelu 'last': no such operator in opset 5" in rejected(model)


def test_the_message_shows_ten_nodes_before_and_after():
    chain = " ".join(f"v{index + 1} = Neg(v{index})" for index in range(30))
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[3] v0) => (float[3] v30) {{ {chain} }}'
    model = parse_model(text)
    model.graph[15].replace_input_with(0, value("ghost"))
    first, *lines = rejected(model).splitlines()
    assert "'ghost'" in first
    shown = [int(re.search(r"\d+", line)[0]) for line in lines]
    assert shown == list(range(5, 26))
    assert [line for line in lines if line.startswith("  -->")] == ["  -->    15  v16 = Neg(ghost)"]
