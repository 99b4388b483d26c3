"""What a graph says of its own sizes."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest

from passopt.ir.graph.decoder import positions_of

#: Tables that are wider than they are long: their length is what counts.
GRAPHS = {
    "learned positions": ("float[5,9] table", "y = Gather (table, position_ids)", 5),
    "rotary tables by position": ("float[6,8] c, float[6,8] s", "y = RotaryEmbedding (x, c, s, position_ids)", 6),
    "rotary tables by name": ("float[1,1,7,16] rotary.cos", "y = Mul (x, x)", 7),
    "no table": ("float[3] c", "y = Neg (x)", None),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_positions_are_the_length_of_the_tables(name: str):
    inputs, body, expected = GRAPHS[name]
    names = [item.split() for item in inputs.split(", ")]
    values = ", ".join(f'{kind} "{label}"' for kind, label in names)
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[b,2,s,16] x, int64[b,s] position_ids, {values}) => (float[b,2,s,16] y) {{ {body} }}"""
    model = onnx_ir.serde.deserialize_model(onnx.parser.parse_model(text))
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        value.const_value = onnx_ir.LazyTensor(lambda: None, onnx_ir.DataType.FLOAT, value.shape, name=value.name)
        model.graph.register_initializer(value)
    assert positions_of(model) == expected
