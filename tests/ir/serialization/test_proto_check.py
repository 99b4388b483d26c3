"""Model files whose tensors, opsets or names cannot be right are refused where they are read."""

from __future__ import annotations

import os

import onnx
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization.model_files import load_model
from passopt.ir.serialization.proto_check import check_proto

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[3,n] x, bool c) => (float[3,n] y) <float[3,1] w = {1, 2, 3}> {
    k = Constant <value = float[2] {1, 2}> ()
    y = If (c) <then_branch = yes () => (float[3,n] t) { t = Mul(x, w) },
                else_branch = no () => (float[3,n] e) { e = Identity(x) }>
}
<domain: "own", opset_import: ["" : 21]>
twice (a) => (b) { b = Add(a, a) }"""


@pytest.fixture
def proto() -> onnx.ModelProto:
    found = onnx.parser.parse_model(TEXT)
    found.graph.initializer.append(onnx.helper.make_tensor("q", onnx.TensorProto.INT4, [3], [1, 2, 3]))
    return found


def test_what_is_right_passes(proto):
    check_proto(proto)
    for kind in (kind for kind in onnx.TensorProto.DataType.values() if kind):
        tensor = proto.graph.initializer.add(name=f"t{kind}")
        values = [b"a", b"b", b"c"] if kind == onnx.TensorProto.STRING else [1, 0, 1]
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, [3], values))
    check_proto(proto)


def body(proto):
    return proto.graph.node[1].attribute[0].g


def external(proto, **entries):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def set_to(place, name, value):
    return lambda proto: setattr(place(proto), name, value)


FIRST = "initializer 'w'"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: p.graph.initializer[0].float_data.append(4),
            f"{FIRST} is FLOAT .3, 1.: expected 3 numbers in float_d",
        ),
        (lambda p: p.graph.initializer[0].dims.append(0), f"{FIRST} is FLOAT .3, 1, 0.: expected 0 .*, found 3"),
        (lambda p: p.graph.initializer[0].dims.append(-1), rf"{FIRST} has shape \[3, 1, -1\]"),
        (
            set_to(lambda p: p.graph.initializer[0], "raw_data", b"12345"),
            f"{FIRST} .*expected 12 bytes of raw_data, found 5",
        ),
        (
            set_to(lambda p: p.graph.initializer[0], "data_type", 99),
            f"{FIRST} has dtype number 99, which does not exist",
        ),
        (set_to(lambda p: p.graph.initializer[0], "data_type", 0), f"{FIRST} has dtype number 0"),
        (set_to(lambda p: p.graph.initializer[0], "data_type", 11), f"{FIRST} is DOUBLE .* numbers in double_data"),
        (lambda p: p.graph.initializer[1].int32_data.append(1), "'q' is INT4 .3.: expected 2 numbers in int32_data"),
        (
            lambda p: p.graph.node[0].attribute[0].t.dims.append(3),
            "Constant that makes '.*', attribute 'value' is FLOAT .2, 3.",
        ),
        (lambda p: external(p), f"{FIRST} is external data of no file"),
        (lambda p: external(p, location="w", offset="-8"), f"{FIRST} has external data with offset '-8'"),
        (lambda p: external(p, location="w", length="many"), f"{FIRST} has external data with length 'many'"),
        (set_to(lambda p: p.opset_import[0], "version", 0), "the model imports opset 0 of domain ''"),
        (set_to(lambda p: p.opset_import[0], "version", 1 << 40), "the model imports opset 1099511627776"),
        (set_to(lambda p: p.functions[0].opset_import[0], "version", -1), "function 'twice' imports opset -1"),
        (lambda p: p.graph.node[1].input.append("z"), "If that makes '.*' reads 'z', which nothing makes"),
        (
            lambda p: body(p).node[0].input.append("z"),
            "If that makes '.*', then_branch: Mul that makes '.*' reads 'z', which nothing makes",
        ),
        (
            lambda p: p.functions[0].node[0].input.append("x"),
            "function 'twice', Add that makes '.*' reads 'x', which nothing",
        ),
        (set_to(lambda p: p.graph.output[0], "name", "z"), "the output 'z' is made by nothing"),
        (lambda p: p.graph.node[0].ClearField("op_type"), "has no operator"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(proto, tmp_path, damage, message):
    damage(proto)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=f"^{tmp_path}/model.onnx: .*{message}") as found:
        load_model(tmp_path)
    assert "write it again" in str(found.value)


def test_a_pipe_is_no_model_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"model\.onnx: no model, but a folder, a pipe or a device"):
        load_model(tmp_path)


def test_a_circle_of_links_is_no_model(tmp_path):
    (tmp_path / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(ModelError, match="no such model"):
        load_model(tmp_path)
