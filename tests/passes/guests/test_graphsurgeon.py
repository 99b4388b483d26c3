"""Passes over a graphsurgeon Graph: weights stay lazy, nothing that graphsurgeon drops is lost, errors are said."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir
import pytest

from passopt.ir.errors import CheckError, PassError, VerifyError
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE
from passopt.ir.serialization.model_files import load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Slice, Source, Transpose
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.guests import graphsurgeon_pass
from passopt.passes.guests.graphsurgeon import lazy_constant, lazy_weight
from passopt.passes.pipeline.runner import run_passes
from passopt.testing.checking import check
from passopt.verification.rewrites.check import NumericCheck

HEADER = '<ir_version: 10, opset_import: ["" : 24]>\n'
PACKED = (
    HEADER
    + """g (float[batch,40] x) => (float[batch,6] y)
<float[40,10] "l.w" = random, float[6] bias = {1, 2, 3, 4, 5, 6}, int64[2] sizes = {6, 4}> {
    [product] p = MatMul(x, "l.w")
    [parts] a, b = Split<axis = 1>(p, sizes)
    [gate] s = Sigmoid(a)
    [swish] w = Mul(a, s)
    [sum] y = Add(w, bias)
}"""
)


@pytest.fixture
def on_disk(tmp_path):
    """The packed model with its weight in a file, so that a read can be told from a reference."""
    model = read_model(PACKED)
    save_materialized(model, tmp_path)
    return load_model(tmp_path)


def run(model, function, **options):
    return graphsurgeon_pass(name="guest")(function)(**options).run(model)


def test_a_pass_that_does_nothing_changes_nothing(on_disk):
    text, graph = print_model(on_disk), on_disk.graph
    result = run(on_disk, lambda graph: None)
    assert (result.modified, result.matches) == (False, 0)
    assert on_disk.graph is graph
    assert print_model(on_disk) == text


@graphsurgeon_pass(name="gs-fuse-swish")
def fuse_swish(graph: gs.Graph, *, limit: int = 10) -> None:
    """Let targets with a fused activation use it.

    Before: ``y = Mul(x, Sigmoid(x))``
    After:  ``y = Swish(x)``
    """
    for node in list(graph.nodes):
        if node.op == "Mul" and node.inputs[1].inputs and node.i(1).op == "Sigmoid" and limit:
            graph.layer(op="Swish", inputs=[node.inputs[0]], outputs=[node.outputs[0]])
            node.outputs.clear()
            limit -= 1
    graph.cleanup().toposort()


def test_a_fusion_passes_every_check_of_a_pass(check_pass):
    check_pass(fuse_swish(), PACKED, tolerance=1e-5)


def test_a_new_node_says_what_it_was_made_of_and_others_keep_what_they_had():
    model = read_model(PACKED)
    for index, node in enumerate(model.graph):
        node.metadata_props.update({MODULE: f"model.layers.{index}", SOURCE: f"m.py:{index}", "mine": node.name})
        node.doc_string = f"doc of {node.name}"
    model.graph.metadata_props["graph"] = "kept"
    model.graph.doc_string = "about the graph"
    model.graph.inputs[0].doc_string = "about x"
    model.graph.node("product").outputs[0].metadata_props["value"] = "kept"
    model.metadata_props["model"] = "kept"
    result = fuse_swish().run(model)
    assert result.matches == 2  # Mul became Swish, Sigmoid went
    nodes = {node.op_type: node for node in model.graph}
    assert list(nodes) == ["MatMul", "Split", "Swish", "Add"]
    assert dict(nodes["Swish"].metadata_props) == {
        MADE_BY: "gs-fuse-swish",
        MADE_FROM: "swish,gate",
        MODULE: "model.layers",
        SOURCE: "m.py:2-3",
    }
    assert nodes["Swish"].name
    for kind, name in (("MatMul", "product"), ("Split", "parts"), ("Add", "sum")):
        assert nodes[kind].metadata_props["mine"] == nodes[kind].name == name
        assert nodes[kind].doc_string == f"doc of {name}"
        assert MADE_BY not in nodes[kind].metadata_props
    assert model.graph.metadata_props["graph"] == model.metadata_props["model"] == "kept"
    assert (model.graph.doc_string, model.graph.inputs[0].doc_string) == ("about the graph", "about x")
    assert nodes["MatMul"].outputs[0].metadata_props["value"] == "kept"


def test_options_come_from_keyword_parameters():
    model = read_model(PACKED)
    assert not fuse_swish(limit=0).run(model).modified
    assert fuse_swish(limit=1).run(model).modified


def test_weights_cross_without_being_read(on_disk, monkeypatch):
    monkeypatch.setattr(Evaluator, "read", lambda *_: pytest.fail("a weight was read"))
    before = expression_of(on_disk.graph.initializers["l.w"])
    assert isinstance(before, Source)
    assert fuse_swish().run(on_disk).modified
    assert expression_of(on_disk.graph.initializers["l.w"]) is before


def constant_of(graph, name):
    return next(tensor for tensor in graph.tensors().values() if tensor.name == name)


def touch_and_rename(graph):
    weight = constant_of(graph, "l.w")
    assert weight.values.shape == (40, 10)
    weight.name = "renamed"


def test_a_weight_that_was_looked_at_is_still_the_reference(on_disk):
    before = expression_of(on_disk.graph.initializers["l.w"])
    assert run(on_disk, touch_and_rename).modified
    assert expression_of(on_disk.graph.initializers["renamed"]) == before


@pytest.mark.parametrize(
    ("take", "expected"),
    [
        (lambda w: w[:, :6], lambda e: e.slice(1, 0, 6)),
        (lambda w: w[1:30], lambda e: e.slice(0, 1, 30)),
        (lambda w: w[1:, 4:], lambda e: e.slice(0, 1, 40).slice(1, 4, 10)),
        (lambda w: w.T, lambda e: e.transpose()),
        (lambda w: w[2:, 1:5].T, lambda e: e.slice(1, 1, 5).slice(0, 2, 40).transpose((1, 0))),
        (lambda w: w[3:], lambda e: e.slice(0, 3, 40)),
        (lambda w: w[:, 9:], lambda e: e.slice(1, 9, 10)),
    ],
)
def test_views_of_a_weight_stay_lazy(take, expected, monkeypatch):
    """Large enough not to be a small constant, whatever is taken."""
    monkeypatch.setattr("passopt.passes.guests.graphsurgeon.SMALL_BYTES", 0)
    model = read_model(PACKED)
    weight = expression_of(model.graph.initializers["l.w"])

    def add(graph):
        part = gs.Constant("part", take(constant_of(graph, "l.w").values))
        out = graph.layer(op="Identity", inputs=[part], outputs=["part.out"])[0]
        graph.outputs.append(out.to_variable(np.float32, part.shape))

    run(model, add)
    found = expression_of(model.graph.initializers["part"])
    assert isinstance(found, (Slice, Transpose))
    with Evaluator() as evaluator:
        array = evaluator.array(weight)
        assert np.array_equal(evaluator.array(found), take(array))
        assert np.array_equal(evaluator.array(expected(weight)), take(array))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w + 1,
        lambda w: w[:, ::2],
        lambda w: w[::-1],
        lambda w: w.reshape(10, 40),
        lambda w: w.copy(),
        lambda w: w.view(np.int32).copy().view(np.float32),
        lambda w: np.broadcast_to(w[:1], (40, 10)),
    ],
)
def test_new_numbers_are_literals(change, monkeypatch):
    monkeypatch.setattr("passopt.passes.guests.graphsurgeon.SMALL_BYTES", 0)
    model = read_model(PACKED)
    with Evaluator() as evaluator:
        array = evaluator.array(expression_of(model.graph.initializers["l.w"]))

    def add(graph):
        part = gs.Constant("part", change(constant_of(graph, "l.w").values))
        graph.outputs.append(graph.layer(op="Identity", inputs=[part], outputs=["o"])[0].to_variable(part.dtype))

    run(model, add)
    found = expression_of(model.graph.initializers["part"])
    assert isinstance(found, Literal)
    with Evaluator() as evaluator:
        assert np.array_equal(evaluator.array(found), change(array))


def test_numbers_of_a_weight_are_read_only():
    def spoil(graph):
        constant_of(graph, "l.w").values[0, 0] = 7

    with pytest.raises(ValueError, match="read-only"):
        run(read_model(PACKED), spoil)


def test_a_small_new_constant_stays_inside_the_model():
    def scale(graph):
        y = graph.outputs[0]
        y.inputs[0].inputs[1] = gs.Constant("bias.2", constant_of(graph, "bias").values * 2)

    model = read_model(PACKED)
    run(model, scale)
    assert not isinstance(model.graph.initializers["bias.2"].const_value, LazyWeight)
    assert model.graph.initializers["bias.2"].const_value.numpy().tolist() == [2, 4, 6, 8, 10, 12]


@graphsurgeon_pass(name="gs-split")
def split_lazily(graph):
    """Cut a packed weight without reading it.

    Before: ``a, b = Split(MatMul(x, w), sizes)``
    After:  ``a = MatMul(x, w.a); b = MatMul(x, w.b)``
    """
    for split in [node for node in graph.nodes if node.op == "Split" and node.i(0).op == "MatMul"]:
        product, sizes = split.i(0), split.inputs[1].values.tolist()
        weight = product.inputs[1]
        for part, output in zip(lazy_weight(weight).split(sizes, 1), list(split.outputs), strict=True):
            own = lazy_constant(f"{weight.name}.{output.name}", part)
            graph.layer(op="MatMul", inputs=[product.inputs[0], own], outputs=[output])
        split.outputs.clear()
    graph.cleanup().toposort()


def test_lazy_edits_read_nothing(on_disk, monkeypatch):
    split = split_lazily()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "read", lambda *_: pytest.fail("a weight was read"))
        assert split.run(on_disk).modified
    found = expression_of(on_disk.graph.initializers["l.w.a"])
    assert isinstance(found, Slice)
    assert isinstance(found.operand, Source)
    check(split, PACKED)


def test_a_lazy_weight_of_a_small_constant_is_a_literal():
    def look(graph):
        assert lazy_weight(constant_of(graph, "bias")) == Literal.of(np.arange(1, 7, dtype=np.float32))

    run(read_model(PACKED), look)


def test_what_is_returned_is_the_graph_from_then_on():
    def copied(graph):
        other = graph.copy()
        other.outputs = [tensor for tensor in other.tensors().values() if tensor.name == "w"]
        return other.cleanup()

    model = read_model(PACKED)
    run(model, copied)
    assert [value.name for value in model.graph.outputs] == ["w"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Split", "Sigmoid", "Mul"]


@pytest.mark.parametrize("declared", [True, False])
def test_other_outputs_must_be_declared(declared):
    def cut(graph):
        graph.outputs[0].name = "renamed"

    item = graphsurgeon_pass(name="guest", changes_interface=declared)(cut)()
    if declared:
        assert run_passes(read_model(PACKED), [item])[0].result.modified
        return
    with pytest.raises(VerifyError, match="guest"):
        run_passes(read_model(PACKED), [item])


def test_a_wrong_guest_is_caught_by_its_numbers():
    def spoil(graph):
        for node in graph.nodes:
            node.op = "Tanh" if node.op == "Sigmoid" else node.op

    item = graphsurgeon_pass(name="guest")(spoil)()
    with pytest.raises(CheckError, match="guest"):
        run_passes(read_model(PACKED), [item], instruments=[NumericCheck()])


def test_another_result_is_an_error():
    with pytest.raises(PassError, match="guest: returned int, expected a graphsurgeon Graph or None"):
        run(read_model(PACKED), lambda graph: 3)


def test_nodes_out_of_order_are_put_in_order():
    def append(graph):
        graph.layer(op="Relu", inputs=[graph.inputs[0]], outputs=["r"])
        graph.nodes[0].inputs[0] = graph.nodes[-1].outputs[0]

    model = read_model(PACKED)
    run(model, append)
    assert [node.op_type for node in model.graph][:2] == ["Relu", "MatMul"]
    assert all(node.name for node in model.graph)


def test_types_and_shapes_of_new_values_are_filled_in():
    model = read_model(PACKED)
    fuse_swish().run(model)
    (swish,) = [node for node in model.graph if node.op_type == "Swish"]
    assert (swish.outputs[0].dtype, list(swish.outputs[0].shape)) == (onnx_ir.DataType.FLOAT, ["batch", 6])


def test_opset_imports_functions_and_unused_weights_stay():
    text = (
        '<ir_version: 10, opset_import: ["" : 24, "own" : 3]>\n'
        "g (float[2,3] x) => (float[2,3] y) <float[2,3] unused = random>"
        "{ a = own.f(x)  s = Sigmoid(a)  y = Mul(a, s) }\n"
        '<domain: "own", opset_import: ["" : 24]> f (x) => (y) { y = Abs(x) }'
    )
    model = read_model(text)
    function = next(iter(model.functions.values()))
    function.metadata_props["mine"] = "kept"
    fuse_swish().run(model)
    assert [node.op_type for node in model.graph] == ["f", "Swish"]
    assert model.graph.opset_imports["own"] == 3
    assert next(iter(model.functions.values())) is function
    assert isinstance(model.graph.initializers["unused"].const_value, LazyWeight)


def test_an_optional_input_is_still_optional():
    model = read_model(PACKED)
    bias = model.graph.initializers["bias"]
    model.graph.inputs.append(bias)
    fuse_swish().run(model)
    assert [value.name for value in model.graph.inputs] == ["x", "bias"]
    found = model.graph.inputs[1]
    assert model.graph.initializers["bias"] is found
    assert found.const_value.numpy().tolist() == [1, 2, 3, 4, 5, 6]
    assert [node.op_type for node in model.graph] == ["MatMul", "Split", "Swish", "Add"]


def test_weights_inside_a_body_cross_too():
    text = HEADER + (
        "g (float[2,3] x, bool c) => (float[2,4] y) <float[3,4] w = random> {"
        "  y = If(c)<then_branch = t () => (float[2,4] a) { a = MatMul(x, w) },"
        "            else_branch = e () => (float[2,4] b) { m = MatMul(x, w)  b = Neg(m) }> }"
    )
    model = read_model(text)
    weight = expression_of(model.graph.initializers["w"])

    def renamed(graph):
        graph.inputs[0].name = "z"

    run(model, renamed)
    assert expression_of(model.graph.initializers["w"]) is weight
    assert [value.name for value in model.graph.inputs] == ["z", "c"]


def test_an_attribute_that_would_be_dropped_is_refused():
    model = read_model(PACKED)
    kind = onnx_ir.Attr("type", onnx_ir.AttributeType.TYPE_PROTO, onnx_ir.TypeAndShape(onnx_ir.TensorType(1), None))
    model.graph.node("sum").attributes["type"] = kind
    with pytest.raises(PassError, match="guest: Add 'sum' has attribute type of type TYPE_PROTO.*would drop"):
        run(model, lambda graph: None)


def test_a_shard_has_no_numbers_to_look_at():
    model = read_model(PACKED)
    value = model.graph.initializers["l.w"]
    value.const_value = LazyWeight(expression_of(value).shard(1, 2), "l.w")
    with pytest.raises(PassError, match="'l.w' differs between ranks.*run this pass before shard"):
        run(model, lambda graph: constant_of(graph, "l.w").values)


def test_printing_goes_to_stderr(capsys):
    run(read_model(PACKED), lambda graph: print("from the guest"))  # noqa: T201
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "from the guest\n")
