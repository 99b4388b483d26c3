"""Types of values in bodies, beside the bytes of large constants, which ONNX's inference is not shown."""

import onnx_ir
import pytest

from passopt.ir.serialization.inference import complete_all_types, forget_types
from passopt.ir.weights.lazy_weight import SMALL_BYTES
from passopt.passes.opset.legalize import Legalize
from passopt.testing.checking import check, read_model

LENGTH = SMALL_BYTES // 4 + 1
NUMBERS = ", ".join(str(number % 7) for number in range(LENGTH))
TEXT = f"""<ir_version: 8, opset_import: ["" : 16]> g (bool c, float[1] x) => (float[?] y) {{
    y = If (c) <then_branch = t () => (float[?] p) {{
                    w = Constant <value: tensor = float[{LENGTH}] {{{NUMBERS}}}> () p = Add(w, x) }},
                else_branch = e () => (float[?] q) {{ q = Neg(x) }}> }}"""


def constant(model):
    return next(node for node in model.graph.all_nodes() if node.op_type == "Constant").outputs[0]


def test_a_large_constant_of_a_body_has_its_own_type_and_shape():
    model = read_model(TEXT)
    known = complete_all_types(model)
    assert (constant(model).dtype, list(constant(model).shape)) == (onnx_ir.DataType.FLOAT, [LENGTH])
    forget_types(known)
    assert constant(model).type is None


def test_a_body_with_a_large_constant_is_legalized_to_a_valid_model():
    model, _ = check(Legalize(opset=18), TEXT)
    assert constant(model).dtype == onnx_ir.DataType.FLOAT


def test_an_axis_that_a_slice_of_opset_10_cuts_has_another_length_in_a_body_too():
    text = """<ir_version: 8, opset_import: ["" : 10]> g (float[n,k] x, bool c) => (float[?,?] y)
        <int64[1] one = {1}, int64[1] two = {2}, int64 three = {3}> {
        z = Slice(x, one, two, one)
        y = Loop(three, c, x) <body = l (int64 i, bool d, float[?,?] v) => (bool e, float[?,?] w) {
            e = Identity(d) a = Slice(x, one, two, one) w = Add(v, a) }> }"""
    model = read_model(text)
    complete_all_types(model)
    shapes = {value.name: value.shape for node in model.graph.all_nodes() for value in node.outputs}
    assert [dim.value for dim in shapes["z"].dims] == ["n", None]
    assert "k" not in [dim.value for dim in shapes["a"].dims]


@pytest.mark.parametrize("opset", [8, 11])
def test_the_shape_of_one_branch_in_a_body_is_not_that_of_an_if(opset):
    inner = """If(c) <then_branch = t2 () => (float[] p2) { p2 = Reshape(x, s) },
                       else_branch = e2 () => (float[] q2) { k = Constant<value = float[1,1] {1}>() q2 = Relu(k) }>"""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[n,k] x, int64[m] s, bool c) => (float[] y) {{
        y = If(c) <then_branch = t () => (float[] p) {{ a = {inner} p = Neg(a) }},
                   else_branch = e () => (float[] q) {{ q = Neg(x) }}> }}"""
    model = read_model(text)
    complete_all_types(model)
    found = {value.name: value for node in model.graph.all_nodes() for value in node.outputs}
    assert (found["a"].dtype, found["a"].shape) == (onnx_ir.DataType.FLOAT, None)
