"""What passopt knows of onnxruntime's own operators is what onnxruntime's schemas say."""

from __future__ import annotations

import onnx
import onnx_ir
import onnxruntime.capi.onnxruntime_pybind11_state as runtime
import pytest

from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.operators import _DTYPES, _RUNTIME_OPS
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model

SCHEMAS = {(schema.domain, schema.name): schema for schema in getattr(runtime, "get_all_operator_schema", lambda: ())()}


@pytest.mark.skipif(not SCHEMAS, reason="this build of onnxruntime does not show its schemas")
@pytest.mark.parametrize("name", sorted(_DTYPES))
def test_dtypes_are_those_of_the_schema(name):
    schema = SCHEMAS["" if name in _RUNTIME_OPS else "com.microsoft", name]
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    for output, source in zip(schema.outputs, _DTYPES[name], strict=False):
        if isinstance(source, onnx_ir.DataType):
            assert allowed[output.typeStr] == {f"tensor({source.name.lower()})"}
        elif source is not None:
            assert output.typeStr == schema.inputs[source].typeStr


def test_operators_are_onnxruntimes_until_they_are_standard():
    for name, opset in _RUNTIME_OPS.items():
        standard = [
            s.since_version for s in onnx.defs.get_all_schemas_with_history() if (s.domain, s.name) == ("", name)
        ]
        assert min(standard, default=1 << 30) == opset


TEXT = """<ir_version: 8, opset_import: ["" : %d]> g (float[n,3] x, float[3] w) => (float[n,3] y) {
    a = %s(x, w) y = Relu(a) }"""


@pytest.mark.parametrize(("name", "opset"), [("SimplifiedLayerNormalization", 23), ("LayerNormalization", 16)])
def test_runtime_operators_of_the_default_domain_are_accepted_and_typed(name, opset):
    model = parse_model(TEXT % (opset, name))
    complete_types(model)
    verify_model(model)
    value = model.graph[0].outputs[0]
    assert (value.dtype, str(value.shape)) == (onnx_ir.DataType.FLOAT, "[n,3]")
