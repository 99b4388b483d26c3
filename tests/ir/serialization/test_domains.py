"""The domain `ai.onnx` is the default domain: in the model, in functions, in bodies, in text and in files."""

from __future__ import annotations

import onnx
import onnx_ir
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model, model_bytes
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes import resolve, run_passes

MODEL = """<ir_version: 8, opset_import: ["ai.onnx" : 17, "local" : 1]>
g (float[2,3] x, bool c) => (float[2,3] y) {
    h = local.twice (x)
    y = If (c) <then_branch = a () => (float[2,3] t) { t = Neg(h) },
                else_branch = b () => (float[2,3] e) { e = Exp(h) }>
}
<domain: "local", opset_import: ["ai.onnx" : 17]>
twice (x) => (y) { y = Add(x, x) }"""


def imported(proto):
    return [entry.domain for item in (proto, *proto.functions) for entry in item.opset_import]


def proto_of_alias():
    """The parser keeps the alias of imports; here nodes name it too, as onnxruntime's test models do."""
    proto = onnx.parser.parse_model(MODEL)
    assert "ai.onnx" in imported(proto)
    for node in (*proto.graph.node, *proto.functions[0].node):
        node.domain = node.domain or "ai.onnx"
    return proto


def test_files_are_read_under_the_one_name(tmp_path):
    onnx.save(proto_of_alias(), str(tmp_path / "model.onnx"))
    model = load_model(tmp_path / "model.onnx")
    run_passes(model, resolve("legalize{opset=18},cse").passes)
    written = onnx.load_from_string(model_bytes(model, {}))
    assert sorted(imported(written)) == ["", "", "local"]
    assert {node.domain for node in (*written.graph.node, *written.functions[0].node)} == {"", "local"}
    onnx.checker.check_model(written)


def test_text_is_read_under_the_one_name():
    assert print_model(parse_model(MODEL)) == print_model(parse_model(MODEL.replace("ai.onnx", "")))


def test_a_model_made_in_memory_runs_too():
    model = onnx_ir.from_proto(proto_of_alias())
    run_passes(model, resolve("dead-code").passes)
    assert model.graph.opset_imports == {"": 17, "local": 1}


def test_both_names_with_one_version_are_one():
    model = parse_model(MODEL.replace('"ai.onnx" : 17, "local"', '"" : 17, "ai.onnx" : 17, "local"'))
    assert model.graph.opset_imports == {"": 17, "local": 1}


def test_refuses_both_names_with_two_versions(tmp_path):
    proto = onnx.parser.parse_model(MODEL.replace('"ai.onnx" : 17, "local"', '"" : 16, "ai.onnx" : 17, "local"'))
    onnx.save(proto, str(tmp_path / "model.onnx"))
    with pytest.raises(
        ModelError, match=r"model.onnx: 'g' imports opset 16 of the domain '' and opset 17 of 'ai.onnx'"
    ):
        load_model(tmp_path / "model.onnx")
