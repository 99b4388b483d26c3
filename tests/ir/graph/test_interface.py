"""What a caller sees of a model stays: one broken promise per test."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.interface import Interface
from passopt.ir.serialization.text import parse_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,3] x, float[n,3] y) => (float[n,3] p, float[n,3] q) { p = Neg(x) q = Abs(y) }"""


@pytest.fixture
def model():
    return parse_model(TEXT)


def broken(model, change):
    interface = Interface.of(model)
    interface.check(model)
    change(model.graph)
    with pytest.raises(VerifyError) as error:
        interface.check(model)
    return str(error.value)


def test_outputs_and_inputs_are_not_dropped(model):
    assert broken(model, lambda graph: graph.outputs.pop()) == "graph output 'q' is gone"
    assert broken(model, lambda graph: graph.inputs.pop(0)) == "graph input 'x' is gone"


def test_none_is_new(model):
    message = broken(model, lambda graph: graph.inputs.append(onnx_ir.Value(name="z")))
    assert message == "graph input 'z' is new"


def test_their_order_stays(model):
    message = broken(model, lambda graph: graph.outputs.append(graph.outputs.pop(0)))
    assert message == "graph outputs stand in another order: ['q', 'p'], expected ['p', 'q']"


def restated(dtype, *dims):
    def change(graph):
        graph.outputs[0].type = onnx_ir.TensorType(dtype)
        graph.outputs[0].shape = onnx_ir.Shape(dims)

    return change


@pytest.mark.parametrize(
    ("change", "became"),
    [
        (restated(onnx_ir.DataType.FLOAT16, "n", 3), "FLOAT16[n,3]"),
        (restated(onnx_ir.DataType.FLOAT, "n", 4), "FLOAT[n,4]"),
        (restated(onnx_ir.DataType.FLOAT, "m", 3), "FLOAT[m,3]"),
        (restated(onnx_ir.DataType.FLOAT, 1, 3), "FLOAT[1,3]"),
        (restated(onnx_ir.DataType.FLOAT, None, 3), "FLOAT[?,3]"),
        (restated(onnx_ir.DataType.FLOAT, "n", 3, 1), "FLOAT[n,3,1]"),
    ],
)
def test_dtypes_and_shapes_stay(model, change, became):
    assert broken(model, change) == f"graph output 'p' was FLOAT[n,3] and became {became}"


def test_what_was_not_said_may_be_said(model):
    model.graph.outputs[0].shape = onnx_ir.Shape([None, 3])
    interface = Interface.of(model)
    model.graph.outputs[0].shape = onnx_ir.Shape(["n", 3])
    interface.check(model)
    model.graph.outputs[1].shape = model.graph.outputs[1].type = None
    interface = Interface.of(model)
    restated(onnx_ir.DataType.FLOAT, "n", 3)(model.graph)
    interface.check(model)


def test_a_length_whose_name_an_exporter_made_up_may_be_told(model):
    model.graph.outputs[0].shape = onnx_ir.Shape(["unknown_7", 3])
    interface = Interface.of(model)
    model.graph.outputs[0].shape = onnx_ir.Shape(["n", 3])
    interface.check(model)


@pytest.mark.parametrize("symbol", ["n+past", "2*n", "p+q"])
def test_a_length_in_terms_of_the_inputs_stays(model, symbol):
    model.graph.inputs[1].shape = onnx_ir.Shape(["p+q", 3])
    model.graph.outputs[0].shape = onnx_ir.Shape([symbol, 3])
    message = broken(model, restated(onnx_ir.DataType.FLOAT, "m", 3))
    assert message == f"graph output 'p' was FLOAT[{symbol},3] and became FLOAT[m,3]"
