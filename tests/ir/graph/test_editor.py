"""The editor: names, places, provenance, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.editor import Editor, discard
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[3,5] x, float[3,5] z) => (float[3,5] y, float[3,5] w) <float[5] b = {1, 2, 3, 4, 5},
 float[5] c = {5, 4, 3, 2, 1}> {
    [one] a = Add(x, b)
    [two] r = Relu(a)
    [three] s = Mul(r, c)
    [four] y = Neg(s)
    [five] w = Sub(r, z)
}"""


@pytest.fixture
def model():
    parsed = parse_model(TEXT)
    complete_types(parsed)
    return parsed


@pytest.fixture
def editor(model):
    return Editor(model, "mine")


def node(model, name):
    return next(item for item in model.graph if item.name == name)


def operators(model):
    verify_model(model)
    return [item.op_type for item in model.graph]


def test_names_are_unique_among_values_nodes_and_subgraphs():
    model = parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (bool c, float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
            [n] y = If (c) <then_branch = a () => (float[2] t) <float[2] inner = {3, 4}> { t = Add(x, inner) },
                            else_branch = b () => (float[2] e) { e = Add(x, k) }>
        }"""
    )
    editor = Editor(model, "mine")
    for taken in ("c", "x", "y", "k", "n", "t", "e", "inner"):
        assert editor.unique(taken) == f"{taken}.2"
    assert [editor.unique("new") for _ in range(3)] == ["new", "new.2", "new.3"]


def test_a_made_up_suffix_that_is_taken_is_passed_over(editor, model):
    model.graph[0].outputs[0].name = "v.2"
    editor = Editor(model, "mine")
    assert [editor.unique("v") for _ in range(2)] == ["v", "v.3"]


def replace(editor, old, build):
    """Replace the value of a node by what `build(op, old)` makes."""
    op = editor.builder(old.name)
    new = build(op, old)
    editor.replace({old: new}, op.built, [old.producer()])
    return new


def test_the_new_value_takes_the_name_and_the_place_of_the_old_one(editor, model):
    old = node(model, "two").outputs[0]
    new = replace(editor, old, lambda op, _: op.Max(node(model, "one").outputs[0], 0.0))
    assert new.name == "r"
    assert operators(model) == ["Add", "Max", "Mul", "Neg", "Sub"]


def test_a_graph_output_keeps_its_name_and_its_place(editor, model):
    replace(editor, model.graph.outputs[0], lambda op, old: op.Mul(old.producer().inputs[0], -1.0))
    assert [value.name for value in model.graph.outputs] == ["y", "w"]
    assert operators(model) == ["Add", "Relu", "Mul", "Mul", "Sub"]


@pytest.mark.parametrize("new", ["x", "b2", "r"])
def test_a_graph_output_replaced_by_something_that_has_a_name(editor, model, new):
    """An input, an initializer and a value of another node keep their own names."""

    def build(op, _):
        if new == "x":
            return model.graph.inputs[0]
        return op.initializer("b2", np.ones((3, 5), "float32")) if new == "b2" else node(model, "two").outputs[0]

    replace(editor, model.graph.outputs[0], build)
    assert [value.name for value in model.graph.outputs] == ["y", "w"]
    assert "Identity" in operators(model)


def test_what_died_is_removed_with_its_weights(editor, model):
    replace(editor, model.graph.outputs[0], lambda op, _: op.Neg(model.graph.inputs[0]))
    assert operators(model) == ["Add", "Relu", "Neg", "Sub"]
    assert list(model.graph.initializers) == ["b"]


def test_weights_that_nobody_reads_in_the_end_are_not_added(editor, model):
    op = editor.builder("new")
    op.literal(np.ones(3, "float32"))
    new = op.Neg(model.graph.inputs[0])
    editor.replace({model.graph.outputs[0]: new}, op.built, [])
    assert list(model.graph.initializers) == ["b"]


def test_provenance_says_who_made_a_node_of_what(editor, model):
    two = node(model, "two")
    two.metadata_props[MODULE] = "model.layers.0"
    first = replace(editor, two.outputs[0], lambda op, _: op.Max(node(model, "one").outputs[0], 0.0))
    later = Editor(model, "other")
    second = replace(later, first, lambda op, _: op.Abs(node(model, "one").outputs[0]))
    found = second.producer().metadata_props
    assert found[MADE_BY] == "mine,other"
    assert found[MADE_FROM] == "two"
    assert found[MODULE] == "model.layers.0"


def test_another_dtype_or_shape_is_refused(editor, model):
    old = node(model, "two").outputs[0]
    with pytest.raises(VerifyError, match=r"mine: would replace 'r' \(FLOAT\) by .* \(FLOAT16\); .* keep the dtype"):
        replace(editor, old, lambda op, _: op.Cast(old.producer().inputs[0], to=10))
    with pytest.raises(VerifyError, match=r"'r' of shape \[3,5\] by .* of shape \[5,3\]; .* keep the shape"):
        replace(editor, old, lambda op, _: op.Transpose(old.producer().inputs[0]))
    with pytest.raises(VerifyError, match=r"of shape \[15\]"):
        replace(editor, old, lambda op, _: op.Reshape(old.producer().inputs[0], [15]))


def test_what_the_new_value_does_not_say_is_taken_from_the_old_one(editor, model):
    old = node(model, "two").outputs[0]
    model.graph.opset_imports["elsewhere"] = 1
    new = replace(editor, old, lambda op, _: op.Mystery(old.producer().inputs[0], domain="elsewhere"))
    assert (new.dtype, str(new.shape)) == (onnx_ir.DataType.FLOAT, "[3,5]")


def test_a_new_domain_is_imported(editor, model):
    old = node(model, "two").outputs[0]
    replace(editor, old, lambda op, _: op.AllReduce(old.producer().inputs[0], domain="com.microsoft"))
    assert model.graph.opset_imports["com.microsoft"] == 1
    verify_model(model)


def test_several_roots_go_after_the_last_value_they_need(editor, model):
    """`s` comes before `w`; the node for both needs `z2`, which is made in between."""
    extra = editor.builder("z2")
    late = extra.Exp(model.graph.inputs[1])
    editor.insert(extra.built, node(model, "four"))
    op = editor.builder("both")
    total = op.Add(node(model, "two").outputs[0], late)
    roots = [node(model, "three").outputs[0], model.graph.outputs[1]]
    editor.replace({roots[0]: total, roots[1]: op.Abs(total)}, op.built, [])
    assert operators(model) == ["Add", "Relu", "Exp", "Add", "Abs", "Neg"]
    assert [value.name for value in model.graph.outputs] == ["y", "w"]


def test_one_value_for_two_outputs_gets_an_identity(editor, model):
    op = editor.builder("both")
    new = op.Abs(node(model, "two").outputs[0])
    editor.replace({model.graph.outputs[0]: new, model.graph.outputs[1]: new}, op.built, [])
    assert [value.name for value in model.graph.outputs] == ["y", "w"]
    assert sorted(operators(model)) == ["Abs", "Add", "Identity", "Relu"]


def test_following_nodes_are_read_instead(editor, model):
    value = node(model, "two").outputs[0]
    op = editor.builder("r")
    result = op.Exp(value)
    editor.follow(value, result, op.built, "raw")
    assert (result.name, value.name) == ("r", "r.raw")
    assert operators(model) == ["Add", "Relu", "Exp", "Mul", "Neg", "Sub"]
    assert {user.op_type for user in result.consumers()} == {"Mul", "Sub"}


def test_following_an_output_for_the_caller_only(editor, model):
    value = model.graph.outputs[0]
    reader = editor.builder("reader")
    reader.Tanh(value)
    editor.insert(reader.built, None)
    op = editor.builder("y")
    result = op.Exp(value)
    editor.follow(value, result, op.built, "raw", outputs_only=True)
    assert model.graph.outputs[0] is result
    assert (result.name, value.name) == ("y", "y.raw")
    assert {user.op_type for user in value.consumers()} == {"Exp", "Tanh"}
    assert operators(model)[-1] == "Tanh"


def test_only_outputs_of_nodes_can_be_followed(editor, model):
    op = editor.builder("x")
    result = op.Exp(model.graph.inputs[0])
    with pytest.raises(VerifyError, match="mine: 'x' is not the output of a node"):
        editor.follow(model.graph.inputs[0], result, op.built, "raw")


def test_removal_stops_at_what_is_still_read(editor, model):
    assert editor.remove_dead([node(model, "two")]) == 0
    model.graph.outputs.pop(0)
    assert editor.remove_dead([node(model, "four")]) == 2
    assert operators(model) == ["Add", "Relu", "Sub"]
    assert list(model.graph.initializers) == ["b"]


def test_initializers_that_someone_sees_are_not_removed(editor, model):
    used = model.graph.initializers["b"]
    assert not editor.remove_unused_initializer(used)
    free = onnx_ir.Value(name="free", const_value=used.const_value)
    assert not editor.remove_unused_initializer(free)
    model.graph.register_initializer(free)
    assert editor.remove_unused_initializer(free)
    assert "free" not in model.graph.initializers


def test_discarded_nodes_do_not_count_as_users(editor, model):
    value = node(model, "two").outputs[0]
    before = len(value.uses())
    op = editor.builder("r")
    op.Exp(op.Neg(value))
    assert len(value.uses()) == before + 1
    discard(op.built)
    assert len(value.uses()) == before


def test_a_graph_output_keeps_the_shape_that_the_model_states():
    model = parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[past,5] x, float[seq,5] z) => (float["past + seq",5] y) { [one] y = Concat<axis=0>(x, z) }"""
    )
    editor = Editor(model, "mine")
    builder = editor.builder("new")
    joined = builder.Concat(*model.graph.inputs, axis=0)
    joined.shape = onnx_ir.Shape(["past+seq", 5])
    editor.replace({model.graph.outputs[0]: joined}, builder.built, [node(model, "one")])
    assert str(model.graph.outputs[0].shape) == "[past + seq,5]"


def test_a_shared_node_goes_with_the_last_of_its_readers():
    """Both arms of a diamond die, in any order; what the weights of both are read by goes with them."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[3,5] x) => (float[3,5] y) <float[5] b = {1, 2, 3, 4, 5}> {
        r = Add(x, b)
        p = Neg(r)
        q = Mul(r, b)
        d = Sub(p, q)
        y = Neg(x)
    }"""
    for order in ("pq", "qp"):
        model = parse_model(text)
        nodes = {node.outputs[0].name: node for node in model.graph}
        assert Editor(model, "mine").remove_dead([nodes["d"]]) == 4
        assert [node.op_type for node in model.graph] == ["Neg"]
        assert not model.graph.initializers
        model = parse_model(text)
        nodes = {node.outputs[0].name: node for node in model.graph}
        editor = Editor(model, "mine")
        assert editor.remove_dead([nodes[name] for name in order]) == 0
        assert len(model.graph) == 5


def test_only_what_reads_the_new_nodes_moves_behind_them(editor, model):
    """The second root needs a late operand; a bystander between keeps its place."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[3,5] x, float[3,5] z) => (float[3,5] u, float[3,5] v, float[3,5] w) {
        a = Relu(x)
        first = Neg(a)
        early = Abs(first)
        u = Exp(early)
        v = Exp(z)
        late = Tanh(z)
        w = Mul(a, late)
    }"""
    model = parse_model(text)
    complete_types(model)
    nodes = {node.outputs[0].name: node for node in model.graph}
    editor = Editor(model, "mine")
    builder = editor.builder("made")
    joined = builder.Mul(nodes["late"].outputs[0], nodes["a"].outputs[0])
    replaced = {nodes["first"].outputs[0]: builder.Neg(joined), nodes["w"].outputs[0]: joined}
    editor.replace(replaced, builder.built, [nodes["first"], nodes["w"]])
    verify_model(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Exp", "Tanh", "Mul", "Neg", "Abs", "Exp"]
