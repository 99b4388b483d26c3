"""A bf16 graph's fp32 twin: no bf16 left, the original untouched, weights still lazy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal

TEXT = """
<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
main (bfloat16[2,3] x, bool c) => (bfloat16[2,3] y) {
    wide = Cast <to = 1> (x)
    narrow = Cast <to = 16> (wide)
    one = Constant <value = bfloat16[1] {1}> ()
    sum = Add (narrow, one)
    chosen = If (c) <
        then_branch = a () => (bfloat16[2,3] t) { t = Mul (sum, w) },
        else_branch = b () => (bfloat16[2,3] e) { e = Identity (sum) }
    >
    y = local.twice (chosen)
}
<opset_import: ["" : 21], domain: "local">
twice (a) => (b) {
    half = Cast <to = 16> (a)
    b = Add (half, half)
}
"""


def dtypes(model: onnx_ir.Model) -> set[DataType | None]:
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    values = {value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
    values |= {output for graph in graphs for node in graph for output in node.outputs}
    constants = {value.const_value.dtype for value in values if value.const_value is not None}
    attributes = [attribute for graph in graphs for node in graph for attribute in node.attributes.values()]
    constants |= {attribute.as_tensor().dtype for attribute in attributes if attribute.name == "value"}
    casts = {DataType(attribute.as_int()) for attribute in attributes if attribute.name == "to"}
    return {value.dtype for value in values} | constants | casts


def test_no_bf16_is_left_and_the_original_keeps_its_own() -> None:
    model = onnx_ir.from_onnx_text(TEXT)
    numbers = np.array([[1, 2, 3], [4, 5, 6.5]], ml_dtypes.bfloat16)
    weight = LazyWeight(Literal.of(numbers), "w")
    value = onnx_ir.Value(name="w", type=onnx_ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
    model.graph.register_initializer(value)
    for branch in model.graph.subgraphs():
        for node in branch:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == "w":
                    node.replace_input_with(index, value)
    before = dtypes(model)

    twin = fp32_twin(model)

    assert DataType.BFLOAT16 not in dtypes(twin)
    assert DataType.BFLOAT16 in before
    assert dtypes(model) == before
    widened = twin.graph.initializers["w"].const_value
    assert isinstance(widened, LazyWeight)
    assert np.array_equal(widened.numpy(), numbers.astype(np.float32))
