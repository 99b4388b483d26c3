"""Nodes that a builder makes have types and shapes at once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.builder import Builder
from passopt.ir.graph.completion import complete_types
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, small_constant
from passopt.ir.weights.literals import Literal
from passopt.testing.checking import read_model


def value(*shape, dtype=DataType.FLOAT, name="x"):
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape))


@pytest.fixture
def op():
    taken = set()

    def unique(name):
        while name in taken:
            name += "'"
        taken.add(name)
        return name

    return Builder(21, unique, "layer.0")


def test_dtype_and_shape_follow_from_the_inputs(op):
    product = op.MatMul(value("batch", 3, 5), value(5, 7, name="w"))
    assert (product.dtype, str(product.shape)) == (DataType.FLOAT, "[batch,3,7]")
    turned = op.Transpose(product, perm=[2, 0, 1])
    assert str(turned.shape) == "[7,batch,3]"
    assert op.Cast(turned, to=DataType.FLOAT16.value).dtype == DataType.FLOAT16
    assert [node.op_type for node in op.built.nodes] == ["MatMul", "Transpose", "Cast"]


def test_shapes_follow_from_constant_inputs(op):
    assert str(op.Reshape(value(6, 5), [10, 3]).shape) == "[10,3]"
    assert str(op.Unsqueeze(value(6, 5), [1]).shape) == "[6,1,5]"
    assert str(op.Slice(value(6, 5), [1], [4], [0]).shape) == "[3,5]"


def test_several_outputs(op):
    parts = op.Split(value(6, 5), [4, 2], axis=0, outputs=2)
    assert [str(part.shape) for part in parts] == ["[4,5]", "[2,5]"]
    assert len({part.name for part in parts}) == 2


def test_names_come_from_the_hint_and_are_unique(op):
    one, two = op.Relu(value(3)), op.Relu(value(3))
    assert (one.name, two.name) == ("layer.0.relu", "layer.0.relu'")
    assert one.producer().name == "layer.0/Relu"
    assert op.initializer("w", np.zeros(2)).name == "w"
    assert op.initializer("w", np.zeros(2)).name == "w'"


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_float_takes_the_dtype_of_the_value_beside_it(op, kind):
    result = op.Mul(0.5, value(3, dtype=DataType.from_numpy(np.dtype(kind))))
    constant = small_constant(result.producer().inputs[0])
    assert (constant.dtype, constant.shape, float(constant)) == (np.dtype(kind), (), 0.5)
    assert result.dtype == DataType.from_numpy(np.dtype(kind))


def test_a_float_beside_nothing_of_a_known_dtype_is_refused(op):
    with pytest.raises(VerifyError, match=r"Mul: the dtype of the number 0\.5 is unknown; pass an array"):
        op.Mul(onnx_ir.Value(name="x"), 0.5)


def test_integers_and_lists_are_int64_and_arrays_are_kept(op):
    node = op.Slice(value(6, 5), [1], [4], [0]).producer()
    assert all(small_constant(item).dtype == np.int64 for item in node.inputs[1:])
    kept = op.Add(value(3), np.float32([1, 2, 3])).producer().inputs[1]
    assert small_constant(kept).tolist() == [1, 2, 3]


def test_equal_constants_are_one_initializer(op):
    one, two = op.Add(value(3), 2.0).producer(), op.Mul(value(3), 2.0).producer()
    assert one.inputs[1] is two.inputs[1]
    assert op.Mul(value(3, dtype=DataType.FLOAT16), 2.0).producer().inputs[1] is not one.inputs[1]
    assert len(op.built.initializers) == 2


def test_an_absent_input_stays_absent(op):
    node = op.Clip(value(3), None, 2.0).producer()
    assert node.inputs[1] is None
    assert node.outputs[0].dtype == DataType.FLOAT


def test_an_expression_becomes_a_lazy_weight(op):
    weight = op.initializer("w", Literal.of(np.zeros((2, 3), np.float16)).transpose())
    assert isinstance(weight.const_value, LazyWeight)
    assert (weight.dtype, tuple(weight.shape.dims)) == (DataType.FLOAT16, (3, 2))


def test_what_does_not_fit_is_refused_with_its_inputs(op):
    with pytest.raises(VerifyError, match=r"MatMul 'layer.0/MatMul' does not fit its inputs .*x: FLOAT \[2,3\]"):
        op.MatMul(value(2, 3), value(4, 5, name="w"))
    with pytest.raises(VerifyError, match="Rellu 'layer.0/Rellu': no such operator in opset 21"):
        op.Rellu(value(3))
    with pytest.raises(AttributeError, match="relu"):
        op.relu(value(3))


def test_collectives_have_shapes(op):
    reduced = op.AllReduce(value("batch", 5, dtype=DataType.FLOAT16), domain="com.microsoft")
    assert (reduced.dtype, str(reduced.shape)) == (DataType.FLOAT16, "[batch,5]")
    gathered = op.AllGather(value("batch", 5), domain="com.microsoft", axis=-1, group_size=3)
    assert str(gathered.shape) == "[batch,15]"
    symbolic = op.AllGather(value("batch", 5), domain="com.microsoft", axis=0, group_size=3)
    assert symbolic.shape[1] == 5
    assert symbolic.shape[0].value is None


def test_the_memo_gives_what_inference_gives_and_tells_inputs_apart():
    memo = {}
    for shape, target in (([2, 6], [3, 4]), ([2, 6], [4, 3]), ([2, 6], [4, 3]), (["n", 6], [0, 6])):
        for types in (memo, None):
            b = Builder(21, lambda name: name, types=types)
            x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16))
            result = b.Reshape(x, target)
            assert result.dtype == onnx_ir.DataType.FLOAT16
            expected = target if target[0] else ["n", 6]
            assert [dim if isinstance(dim, int) else dim.value for dim in result.shape.dims] == expected
    assert len(memo) == 3


def test_the_memo_tells_attributes_apart():
    memo = {}
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([2, 3, 5]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    b = Builder(21, lambda name: name, types=memo)
    assert list(b.Transpose(x, perm=[0, 2, 1]).shape) == [2, 5, 3]
    assert list(b.Transpose(x, perm=[2, 1, 0]).shape) == [5, 3, 2]
    assert b.Cast(x, to=10).dtype == onnx_ir.DataType.FLOAT16
    assert b.Cast(x, to=11).dtype == onnx_ir.DataType.DOUBLE


def test_shapes_from_the_memo_are_not_shared():
    b = Builder(21, lambda name: name, types={})
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([2, 3]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    first, second = b.Neg(x), b.Neg(x)
    first.shape[0] = 7
    assert list(second.shape) == [2, 3]


def test_operators_of_other_domains_are_like_a_value_that_is_named(op):
    x = value("batch", 3)
    unknown = op.Gate(x, domain="com.acme", limit=3.0)
    assert (unknown.dtype, unknown.shape) == (None, None)
    with pytest.raises(VerifyError, match="Mul: the dtype of the number 0.5 is unknown"):
        op.Mul(unknown, 0.5)
    gate, count = op.Gate(x, domain="com.acme", outputs=2, like=x)
    assert (count.dtype, str(count.shape)) == (DataType.FLOAT, "[batch,3]")
    assert op.Mul(gate, 0.5).dtype == DataType.FLOAT
    assert op.built.nodes[0].domain == "com.acme"


def test_onnxruntimes_own_operators_have_the_dtypes_that_are_known(op):
    normed = op.SkipLayerNormalization(value(2, 3), value(2, 3), value(3), domain="com.microsoft")
    assert (normed.dtype, str(normed.shape)) == (DataType.FLOAT, "[2,3]")


def test_absent_inputs_at_the_end_are_left_out(op):
    normed = op.LayerNormalization(value(2, 3), value(3), None)
    assert len(normed.producer().inputs) == 2
    clipped = op.Clip(value(2, 3), None, 1.0)
    assert clipped.producer().inputs[1] is None


def test_collectives_that_state_too_little_have_no_shape(op):
    gathered = op.AllGather(value(2, 3), domain="com.microsoft")
    assert (gathered.dtype, gathered.shape) == (DataType.FLOAT, None)


@pytest.mark.parametrize("kind", [onnx_ir.SequenceType, onnx_ir.OptionalType])
def test_a_sequence_is_no_tensor_of_its_elements(op, kind):
    """Its dtype and shape are those of its elements, so what reads it is inferred from its whole type."""
    items = onnx_ir.Value(name="s", type=kind(onnx_ir.TensorType(DataType.FLOAT)), shape=onnx_ir.Shape(["n", 2]))
    copy = op.Identity(items)
    assert not isinstance(copy.type, onnx_ir.TensorType)
    if kind is onnx_ir.SequenceType:
        assert op.SequenceLength(items).dtype == DataType.INT64
        assert op.SequenceAt(items, np.int64(0)).dtype == DataType.FLOAT
    else:
        assert op.node("OptionalHasElement", items).dtype == DataType.BOOL


@pytest.mark.parametrize("opset", [8, 10, 11, 23])
def test_the_shape_of_one_branch_is_not_that_of_an_if(opset):
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[n,3] x, bool c) => (float[] y) {{
        z = If(c) <then_branch = t () => (float[] p) {{ p = Relu(x) }},
                   else_branch = e () => (float[] q) {{ k = Constant<value = float[1,1,1] {{1}}>() q = Relu(k) }}>
        y = Neg(z) }}"""
    model = read_model(text)
    complete_types(model)
    assert model.graph[0].outputs[0].shape is None


@pytest.mark.parametrize("opset", [12, 15, 16, 23])
@pytest.mark.parametrize("name", ["GreaterOrEqual", "LessOrEqual"])
def test_comparisons_have_shapes_in_all_opsets(name, opset):
    model = read_model(f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[n,3] x, float[3] k) => (bool[] y) {{
        z = {name}(x, k) y = Not(z) }}""")
    complete_types(model)
    assert str(model.graph[0].outputs[0].shape) == "[n,3]"
