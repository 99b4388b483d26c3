"""onnx-ir passes: in place or functional, their word on `modified` not believed, provenance written."""

from __future__ import annotations

import onnx_ir
import onnx_ir.passes
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.functions import local_function
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.passes.cleanup.inline_functions import inline_functions
from passopt.passes.guests import ir_pass
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) <float[2,3] w = random> {
    [relu] r = Relu(x)
    [sum] y = Add(r, w)
}"""


class ReluToAbs(onnx_ir.passes.InPlacePass):
    """Says the opposite of what it did."""

    def call(self, model):
        for node in list(model.graph):
            if node.op_type == "Relu":
                new = onnx_ir.node("Abs", [node.inputs[0]])
                model.graph.insert_before(node, new)
                node.outputs[0].replace_all_uses_with(new.outputs[0])
                name = node.outputs[0].name
                model.graph.remove(node)
                new.outputs[0].name = name
                return onnx_ir.passes.PassResult(model, modified=False)
        return onnx_ir.passes.PassResult(model, modified=True)


class Functional(onnx_ir.passes.FunctionalPass):
    def call(self, model):
        copy = model.clone()
        ReluToAbs()(copy)
        copy.metadata_props["by"] = "functional"
        return onnx_ir.passes.PassResult(copy, modified=True)


class Refusing(ReluToAbs):
    def requires(self, model):
        raise onnx_ir.passes.PreconditionError("needs a Gelu")


@pytest.mark.parametrize("kind", [ReluToAbs, Functional])
def test_in_place_or_functional_the_model_is_the_result(kind):
    model = read_model(TEXT)
    model.meta["listener"] = "kept"
    model.graph.node("relu").metadata_props[MODULE] = "model.act"
    weight = model.graph.initializers["w"].const_value
    guest = ir_pass("guest", kind)()
    result = guest.run(model)
    assert (result.modified, result.matches) == (True, 1)
    first = model.graph[0]
    assert [node.op_type for node in model.graph] == ["Abs", "Add"]
    assert dict(first.metadata_props) == {MADE_BY: "guest", MADE_FROM: "relu", MODULE: "model.act"}
    assert model.graph.initializers["w"].const_value is weight
    assert model.meta["listener"] == "kept"
    assert model.metadata_props.get("by") == ("functional" if kind is Functional else None)
    text = print_model(model)
    assert not guest.run(model).modified
    assert print_model(model) == text


def test_its_own_conditions_are_an_error_of_the_pass():
    with pytest.raises(PassError, match="guest: .*needs a Gelu"):
        ir_pass("guest", Refusing)().run(read_model(TEXT))


def test_something_else_than_a_pass_is_refused():
    with pytest.raises(PassError, match="guest: made a int, expected an onnx_ir.passes.PassBase"):
        ir_pass("guest", lambda: 3)().run(read_model(TEXT))


FUNCTION = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[2,3] x) => (float[2,3] y) { [call] r = own.twice(x)  y = Relu(r) }
<domain: "own", opset_import: ["" : 21]> twice (a) => (b) { s = Add(a, a)  b = Neg(s) }
<domain: "own", opset_import: ["" : 21]> unused (a) => (b) { b = Neg(a) }"""


def test_inlined_functions_give_the_same_numbers(check_pass):
    model, result = check_pass(inline_functions(), FUNCTION)
    assert result.matches == 2
    assert [node.op_type for node in model.graph] == ["Add", "Neg", "Relu"]
    assert list(model.functions) == [("own", "unused", "")]  # dead-code drops that one


def test_inlined_nodes_stand_for_the_call():
    model = read_model(FUNCTION)
    model.graph.node("call").metadata_props[MODULE] = "model.layers.0"
    inline_functions().run(model)
    for node in list(model.graph)[:2]:
        assert dict(node.metadata_props) == {
            MADE_BY: "inline-functions",
            MADE_FROM: "call",
            MODULE: "model.layers.0",
        }


def test_a_graph_without_calls_stays():
    assert not inline_functions().run(read_model(TEXT)).modified


def test_the_attention_function_of_passopt_can_be_inlined():
    function = local_function("AlibiAttentionNoCache", 23)
    names = [value.name for value in function.inputs]
    types = {"query": "2,3,5,4", "key": "2,3,7,4", "value": "2,3,7,4", "slopes": "3,1,1", "positions": "1,7"}
    declared = ", ".join(f"float[{types.get(name, '1,1,5,7')}] {name}" for name in names)
    model = read_model(
        '<ir_version: 10, opset_import: ["" : 23, "passopt" : 1]>\n'
        f"g ({declared}) => (float[2,3,5,4] y) {{ y = passopt.AlibiAttentionNoCache<scale = 0.5>({', '.join(names)}) }}"
    )
    model.functions[function.identifier()] = function
    assert inline_functions().run(model).modified
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}


def test_a_function_of_another_opset_is_refused_with_the_next_step():
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[2,3] x) => (float[2,3] y) { y = local.f(x) }
        <domain: "local", opset_import: ["" : 18]> f (a) => (b) { b = Relu(a) }"""
    model = read_model(text)
    with pytest.raises(PassError, match="local::f.*version 21 in the model but version 18.*Run legalize first"):
        run_passes(model, resolve("inline-functions").passes)
    model = read_model(text)
    run_passes(model, resolve("legalize,inline-functions").passes)
    assert [node.op_type for node in model.graph] == ["Relu"]
