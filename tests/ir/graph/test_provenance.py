"""Provenance: a node made of several has their names, the module that holds them all, and the span of their lines."""

from __future__ import annotations

import onnx_ir
import pytest

from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE, absorb_provenance, called, set_provenance
from passopt.ir.serialization.model_files import load_model, save_reference
from passopt.ir.serialization.text_files import read_model
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve

ATTENTION = "model.layers.0.self_attn"


def node(name, module=None, source=None, **more):
    made = onnx_ir.node("Relu", [onnx_ir.Value(name="x")], name=name)
    made.metadata_props.update({key: value for key, value in ((MODULE, module), (SOURCE, source)) if value})
    made.metadata_props.update(more)
    return made


def made_of(*origins, author="fuse"):
    new = node("new")
    set_provenance(new, author, origins)
    return dict(new.metadata_props)


def test_names_modules_and_lines_of_several_origins():
    found = made_of(
        node("scores", ATTENTION, "modeling.py:140"),
        node("query", f"{ATTENTION}.W_pack", "modeling.py:131"),
        node("rotary", f"{ATTENTION}.rotary_emb", "rotary.py:7"),
    )
    assert found == {
        MADE_BY: "fuse",
        MADE_FROM: "scores,query,rotary",
        MODULE: ATTENTION,
        SOURCE: "modeling.py:131-140,rotary.py:7",
    }


def test_what_was_made_keeps_the_first_names_and_every_pass_once():
    one = node("one", "a.b", "m.py:3")
    set_provenance(one, "first", [node("x", "a.b", "m.py:2"), node("y", "a.b", "m.py:9")])
    again = node("again")
    set_provenance(again, "second", [one, node("z", "a.c", "m.py:5-20")])
    set_provenance(again, "first", [again])
    assert dict(again.metadata_props) == {
        MADE_BY: "first,second",
        MADE_FROM: "x,y,z",
        MODULE: "a",
        SOURCE: "m.py:2-20",
    }


@pytest.mark.parametrize(
    ("modules", "common"),
    [
        (["model.layers.1.mlp", "model.layers.11.mlp"], "model.layers"),
        (["lm_head", "model.norm"], "lm_head"),
        (["model.layers.1", "model.layers.1.mlp"], "model.layers.1"),
    ],
)
def test_the_module_is_the_innermost_that_holds_them_all(modules, common):
    assert made_of(*(node(module, module) for module in modules))[MODULE] == common


def test_origins_without_metadata_say_their_names_only():
    assert made_of(node("x"), node(None)) == {MADE_BY: "fuse", MADE_FROM: "x,?"}
    assert made_of() == {MADE_BY: "fuse"}


def test_a_node_that_stands_for_an_equal_one_says_so():
    kept, removed = node("kept", "a.b", "m.py:3"), node("removed", "a.c", "m.py:4")
    assert MADE_FROM not in kept.metadata_props
    absorb_provenance(kept, removed, "cse")
    assert kept.metadata_props[MADE_FROM] == "kept,removed"
    assert kept.metadata_props[MADE_BY] == "cse"


def test_it_survives_merging_passes_and_the_file(tmp_path):
    model = read_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch,6] x) => (float[batch,2,3] y, float[batch,3,2] z) <int64[2] t = {2, 3}, int64[2] u = {3, 2}> {
            [first] b = Shape<start = 0, end = 1>(x)
            [second] c = Shape<start = 0, end = 1>(x)
            [cat1] s = Concat<axis = 0>(b, t)
            [cat2] r = Concat<axis = 0>(c, u)
            [view1] y = Reshape(x, s)
            [view2] z = Reshape(x, r)
        }"""
    )
    for index, item in enumerate(model.graph):
        item.metadata_props.update({MODULE: f"model.layers.{index}", SOURCE: f"m.py:{10 + index}"})
    run_passes(model, resolve("fold-constants,dead-code").passes)
    save_reference(model, tmp_path)
    shape, *others = load_model(tmp_path).graph
    assert dict(shape.metadata_props) == {
        MADE_BY: "fold-constants",
        MADE_FROM: "first,second",
        MODULE: "model.layers",
        SOURCE: "m.py:10-11",
    }
    assert all(SOURCE in item.metadata_props for item in others)


def test_a_node_without_a_name_is_called_by_what_it_makes():
    made = onnx_ir.Value(name="y")
    assert called(onnx_ir.Node("", "Gelu", [], outputs=[made], name="act")) == "Gelu 'act'"
    nameless = onnx_ir.Node("", "Gelu", [], outputs=[onnx_ir.Value(name="z")])
    nameless.name = None
    assert called(nameless) == "Gelu that makes 'z'"


def test_a_node_is_called_by_its_name_or_by_what_it_makes():
    node = onnx_ir.Node("", "Relu", [None], name="act")
    node.outputs[0].name = "y"
    assert called(node) == "Relu 'act'"
    node.name = ""
    assert called(node) == "Relu that makes 'y'"
    node.outputs[0].name = None
    assert called(node) == "Relu without a name"
