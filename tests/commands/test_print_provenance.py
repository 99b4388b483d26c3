"""`print --provenance`, and that no pass loses where a node comes from."""

from __future__ import annotations

import json

import onnx_ir
import pytest

from passopt.api.provenance import provenance_text, rows_of
from passopt.cli import main
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE
from passopt.ir.serialization.model_files import load_model, save_reference
from passopt.ir.serialization.text_files import read_model
from passopt.passes.framework.catalog import catalog
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.decoders import DecoderSpec, tiny_decoder


def decoder(**spec):
    """Two layers whose every node has a module and a source line."""
    model = tiny_decoder(DecoderSpec(heads=6, **spec))
    mask = next(value for node in model.graph for value in node.outputs if value.name == "scores_bias")
    mask.shape = onnx_ir.Shape(["batch", 6, "seq", "past+seq"])
    for index, node in enumerate(model.graph):
        node.metadata_props.update({MODULE: f"model.part{index}", SOURCE: f"modeling.py:{100 + index}"})
    return model


#: What needs another graph than this decoder to do anything, or refuses this one, is tested on its own.
PASSES = sorted({*catalog(), *PIPELINES} - {"rotate", "rotate-residual", "smooth"})
#: What runs before a pass so that it has something to do.
BEFORE = {"int8-cache": "fuse", "quantize-cache": "fuse"}
#: The groups of these fill the inputs of all linears.
GROUPS = {"int4", "quantize-groups"}


@pytest.mark.parametrize("name", PASSES)
def test_every_node_still_says_where_it_comes_from(name, tmp_path):
    model = decoder(head_dim=16, hidden=32, intermediate=64) if name in GROUPS else decoder()
    steps = [BEFORE.get(name, ""), f"{name}{{group=32}}" if name in GROUPS else name]
    run_passes(model, resolve(",".join(filter(None, steps))).passes, verify=False)
    save_reference(model, tmp_path)
    for node in load_model(tmp_path).graph:
        assert SOURCE in node.metadata_props, f"{name} lost the source of {node.name}"
        assert MODULE in node.metadata_props, f"{name} lost the module of {node.name}"
        if MADE_BY in node.metadata_props:
            assert node.metadata_props[MADE_FROM], f"{name} does not say what {node.name} is made of"


LAYERS = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) {
    [shape] n = Shape(x)
    [a0] a = Relu(x)
    [b0] b = Neg(a)
    [c0] c = Abs(b)
    [a1] d = Relu(c)
    [b1] e = Neg(d)
    [c1] f = Abs(e)
    [head] y = Sqrt(f)
}"""


@pytest.fixture
def layered():
    model = read_model(LAYERS)
    for layer in (0, 1):
        for letter, line in (("a", 7), ("b", 8), ("c", 9)):
            place = {MODULE: f"model.layers.{layer}.mlp", SOURCE: f"modeling.py:{line}"}
            model.graph.node(f"{letter}{layer}").metadata_props.update(place)
        model.graph.node(f"b{layer}").metadata_props.update({MADE_BY: "fuse,cast", MADE_FROM: f"n1.{layer},n2.{layer}"})
    model.graph.node("head").metadata_props.update({MADE_BY: "fuse", MADE_FROM: "p,q,r,s,t", MODULE: "lm_head"})
    return model


def test_the_table_groups_by_layer_and_shows_equal_layers_once(layered):
    assert provenance_text(rows_of(layered)) == "\n".join(
        [
            "8 nodes, 3 made or changed by passes",
            "",
            "  node   operator  passes       original nodes  module  source",
            "",
            "(no module is known)",
            "  shape  Shape     -            -",
            "",
            "model.layers.0 … 1   × 2, equal but for names",
            "  a0     Relu      -            -               mlp     modeling.py:7",
            "  b0     Neg       fuse → cast  n1.0, n2.0      mlp     modeling.py:8",
            "  c0     Abs       -            -               mlp     modeling.py:9",
            "",
            "lm_head",
            "  head   Sqrt      fuse         p, q, r +2",
        ]
    )


@pytest.mark.parametrize(
    ("key", "text"),
    [(MADE_BY, "fuse"), (MADE_FROM, "n1.1,n2.1,n3.1"), (SOURCE, "modeling.py:80"), (MODULE, "model.layers.1.attn")],
)
def test_layers_that_differ_both_stand(layered, key, text):
    layered.graph.node("b1").metadata_props[key] = text
    shown = provenance_text(rows_of(layered))
    assert "model.layers.0\n" in shown
    assert "model.layers.1\n" in shown
    assert "×" not in shown


def test_untouched_neighbours_share_a_line_unless_all_are_asked_for(layered):
    del layered.graph.node("b0").metadata_props[MADE_BY]
    folded = provenance_text(rows_of(layered))
    assert "  a0 … c0  3 operators  -            -               mlp     modeling.py:7-9" in folded
    every = provenance_text(rows_of(layered), fold=False)
    assert all(f"\n  {name} " in every for name in ("a0", "b0", "c0", "a1", "b1", "c1"))


def test_the_command_prints_either_form(layered, tmp_path, capsys):
    save_reference(layered, tmp_path)
    assert main(["print", str(tmp_path), "--provenance"]) == 0
    assert "model.layers.0 … 1" in capsys.readouterr().out
    assert main(["print", str(tmp_path), "--provenance", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8
    assert rows[5] == {
        "node": "b1",
        "op_type": "Neg",
        "passes": ["fuse", "cast"],
        "origins": ["n1.1", "n2.1"],
        "module": "model.layers.1.mlp",
        "source": "modeling.py:8",
        "layer": "model.layers.1",
    }
    assert rows[0]["origins"] == ["shape"]


def test_json_is_for_provenance(layered, tmp_path, capsys):
    save_reference(layered, tmp_path)
    assert main(["print", str(tmp_path), "--json"]) == 2
    assert "--json is for print --provenance" in capsys.readouterr().err
