"""Models on disk: round trips in both forms, what is refused, and that loading reads no weight."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.errors import ModelError
from passopt.ir.serialization import model_files
from passopt.ir.serialization.model_files import (
    MODEL_NAME,
    WEIGHTS_NAME,
    load_model,
    model_path,
    save_materialized,
    save_reference,
)
from passopt.ir.serialization.text import parse_model, print_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of, is_checkpoint_weight, small_constant
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.plan_file import PLAN_NAME, read_plan

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,30] x) => (float[batch,20] y) <float[2] small = {1.5, -2}, float[30,20] w = {%s}> {
    p = MatMul(x, w)
    s = ReduceSum<keepdims=0>(small)
    y = Add(p, s)
}"""
ARRAY = np.arange(600, dtype=np.float32).reshape(30, 20)


@pytest.fixture
def model():
    """`small` is a constant inside model.onnx; `w` has 2400 bytes, and `codes` and `slopes` are expressions."""
    parsed = parse_model(TEXT % ",".join(str(float(number)) for number in ARRAY.reshape(-1)))
    for name, expression in (
        ("codes", Literal.of(ARRAY).quantize(1)[0]),
        ("slopes", Literal.of(np.float32([1, 2, 3, 4])).shard(0, 2)),
    ):
        weight = LazyWeight(expression, name)
        value = onnx_ir.Value(name=name, shape=weight.shape, type=onnx_ir.TensorType(weight.dtype), const_value=weight)
        parsed.graph.register_initializer(value)
    return parsed


def save(model, folder, rank=0):
    folder.mkdir()
    return save_materialized(model, folder, rank)


def numbers(model, rank=0):
    with Evaluator(rank) as evaluator:
        return {name: evaluator.array(expression_of(value)) for name, value in model.graph.initializers.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_materialized_models_come_back(tmp_path, model):
    digests = save(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert digests.keys() == {"w"}
    assert equal(numbers(loaded), numbers(model))
    assert [node.op_type for node in loaded.graph] == ["MatMul", "ReduceSum", "Add"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MODEL_NAME, WEIGHTS_NAME]


def test_materialized_models_are_read_by_stock_tools(tmp_path, model):
    save(model, tmp_path / "out")
    onnx.checker.check_model(str(tmp_path / "out" / MODEL_NAME))
    stock = onnx.load(tmp_path / "out" / MODEL_NAME)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stock.graph.initializer}
    assert equal(arrays, numbers(model))


def test_small_rank_constants_are_inline_and_differ_by_rank(tmp_path, model):
    for rank in (0, 1):
        save(model, tmp_path / str(rank), rank)
        loaded = load_model(tmp_path / str(rank))
        slopes = loaded.graph.initializers["slopes"]
        assert not is_checkpoint_weight(slopes)
        assert small_constant(slopes).tolist() == [1 + 2 * rank, 2 + 2 * rank]
    sizes = {(tmp_path / rank / MODEL_NAME).stat().st_size for rank in ("0", "1")}
    assert len(sizes) == 1


def test_references_come_back_with_their_expressions(tmp_path, model):
    save(model, tmp_path / "first")
    first = load_model(tmp_path / "first")
    weight = first.graph.initializers["w"]
    weight.const_value = LazyWeight(expression_of(weight).shard(1, 2), "w")
    weight.shape = weight.const_value.shape
    (tmp_path / "second").mkdir()
    save_reference(first, tmp_path / "second")
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [MODEL_NAME, PLAN_NAME]
    second = load_model(tmp_path / "second")
    assert print_model(second) == print_model(first)
    for rank in (0, 1):
        assert equal(numbers(second, rank), numbers(first, rank))


@pytest.mark.parametrize(
    ("given", "opset", "written"),
    [(3, 9, 10), (9, 21, 10), (10, 21, 10), (12, 21, 10), (14, 21, 10), (10, 23, 11), (14, 23, 11), (10, 25, 13)],
)
def test_the_ir_version_is_what_the_opset_needs(tmp_path, model, given, opset, written):
    """Whatever the model came with: runtimes refuse files of a later version than theirs."""
    model.ir_version = given
    model.graph.opset_imports[""] = opset
    save(model, tmp_path / "out")
    (tmp_path / "reference").mkdir()
    save_reference(model, tmp_path / "reference")
    for folder in ("out", "reference"):
        assert onnx.load(tmp_path / folder / MODEL_NAME, load_external_data=False).ir_version == written
    assert model.ir_version == given


def test_an_opset_beyond_the_newest_ir_version_is_written_with_it(tmp_path, model, monkeypatch):
    monkeypatch.setattr(onnx.helper, "find_min_ir_version_for", lambda *_, **__: 14)
    save(model, tmp_path / "out")
    assert onnx.load(tmp_path / "out" / MODEL_NAME, load_external_data=False).ir_version == 13


def test_graph_outputs_without_a_shape_are_completed(tmp_path, model):
    model.graph.outputs[0].shape = None
    save(model, tmp_path / "out")
    assert str(load_model(tmp_path / "out").graph.outputs[0].shape) == "[batch,20]"


def test_saving_leaves_the_model_as_it_was(tmp_path, model):
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    save(model, tmp_path / "out")
    (tmp_path / "reference").mkdir()
    save_reference(model, tmp_path / "reference")
    assert all(value.const_value is before[name] for name, value in model.graph.initializers.items())


def test_loading_reads_no_weight(tmp_path, model, monkeypatch):
    save(model, tmp_path / "out")
    (tmp_path / "reference").mkdir()
    save_reference(load_model(tmp_path / "out"), tmp_path / "reference")
    monkeypatch.setattr(Evaluator, "_pread", lambda *_: pytest.fail("a weight was read"))
    for folder in ("out", "reference"):
        loaded = load_model(tmp_path / folder)
        assert is_checkpoint_weight(loaded.graph.initializers["w"])
        print_model(loaded)


def test_weights_that_depend_on_the_rank_have_no_numbers_of_their_own(model):
    with pytest.raises(ModelError, match="'slopes' differs between ranks"):
        model.graph.initializers["slopes"].const_value.numpy()


def test_a_weight_prints_without_being_read(model):
    assert repr(model.graph.initializers["codes"].const_value) == "LazyWeight(codes: INT8[30, 20])"


def stock(folder, location, data=True):
    """A model with external data at `location`, written by onnx itself."""
    folder.mkdir(exist_ok=True)
    tensor = onnx.numpy_helper.from_array(ARRAY, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(ARRAY.nbytes))):
        tensor.external_data.add(key=key, value=value)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 30])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 20])
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [tensor]))
    (folder / MODEL_NAME).write_bytes(proto.SerializeToString())
    if data:
        (folder / "w.data").write_bytes(ARRAY.tobytes())
    return folder


def test_external_data_of_other_tools_is_read(tmp_path):
    assert np.array_equal(numbers(load_model(stock(tmp_path / "m", "w.data")))["w"], ARRAY)


@pytest.mark.parametrize("location", ["../w.data", "sub/../w.data", "/etc/hostname"])
def test_data_outside_of_the_folder_is_refused(tmp_path, location):
    folder = stock(tmp_path / "m", location)
    (tmp_path / "w.data").write_bytes(ARRAY.tobytes())
    with pytest.raises(ModelError, match="weight 'w': data at .*, outside of the model's folder; refused"):
        load_model(folder)


def test_data_behind_links_is_refused(tmp_path):
    folder = stock(tmp_path / "m", "w.data")
    shutil.move(folder / "w.data", tmp_path / "w.data")
    os.symlink(tmp_path / "w.data", folder / "w.data")
    with pytest.raises(ModelError, match="behind the link .*w.data; refused"):
        load_model(folder)
    folder = stock(tmp_path / "n", "sub/w.data")
    os.symlink(tmp_path, folder / "sub")
    with pytest.raises(ModelError, match="behind the link .*sub; refused"):
        load_model(folder)


def test_missing_and_truncated_data_are_named(tmp_path):
    folder = stock(tmp_path / "m", "w.data")
    (folder / "w.data").write_bytes(ARRAY.tobytes()[:-4])
    with pytest.raises(ModelError, match="truncated: tensor 'w' ends at byte 2400, the file at 2396"):
        load_model(folder)
    (folder / "w.data").unlink()
    with pytest.raises(ModelError, match=r"w\.data: external data is missing"):
        load_model(folder)
    (folder / "w.data").mkdir()
    with pytest.raises(ModelError, match=r"w\.data: cannot be read"):
        load_model(folder)


def test_a_length_that_does_not_fit_the_shape_is_refused(tmp_path):
    folder = stock(tmp_path / "m", "w.data")
    proto = onnx.load(folder / MODEL_NAME, load_external_data=False)
    proto.graph.initializer[0].external_data[2].value = "2396"
    (folder / MODEL_NAME).write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"2396 bytes of data, shape \[30, 20\] needs 2400"):
        load_model(folder)


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 9, b"\x08\x0a", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"]
)
@pytest.mark.parametrize("name", ["model.onnx", "model.json", "model.txt"])
def test_what_is_no_model_is_refused(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model") as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_a_model_cut_off_anywhere_is_refused(tmp_path):
    data = (stock(tmp_path / "m", "w.data") / MODEL_NAME).read_bytes()
    for length in range(len(data)):
        (tmp_path / "m" / MODEL_NAME).write_bytes(data[:length])
        with pytest.raises(ModelError):
            load_model(tmp_path / "m")


def test_paths_without_a_model_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="no such model. Make one with: passopt export"):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / MODEL_NAME).touch()
    with pytest.raises(ModelError, match="holds one model per rank; name one of them, e.g. .*rank0"):
        model_path(tmp_path)


@pytest.fixture
def reference(tmp_path, model):
    """A folder whose weights are a plan."""
    save(model, tmp_path / "out")
    folder = tmp_path / "reference"
    folder.mkdir()
    save_reference(load_model(tmp_path / "out"), folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.pop("w"), "has no weight 'w', which model.onnx needs"),
        (
            lambda plan: plan.update(w=plan["w"].slice(0, 0, 3)),
            r"'w' has shape \[3, 20\], model.onnx expects \[30, 20\]",
        ),
        (
            lambda plan: plan.update(w=plan["w"].cast(onnx_ir.DataType.FLOAT16)),
            "'w' is FLOAT16, model.onnx expects FLOAT",
        ),
    ],
)
def test_a_plan_that_does_not_fit_its_model_is_refused(reference, change, message):
    plan = dict(read_plan(reference / PLAN_NAME))
    change(plan)
    model_files.write_plan(reference / PLAN_NAME, plan)
    with pytest.raises(ModelError, match=message):
        load_model(reference)


def test_a_missing_plan_is_named(reference):
    (reference / PLAN_NAME).unlink()
    with pytest.raises(ModelError, match=r"weights\.plan\.json: cannot be read"):
        load_model(reference)
