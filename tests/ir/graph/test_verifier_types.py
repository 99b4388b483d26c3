"""The verifier inside the bodies of If and Loop, and on the dtypes that a graph states."""

from __future__ import annotations

import time

import onnx_ir
import pytest

from passopt.ir.errors import VerifyError
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import parse_model, print_model

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
BRANCHES = """g (float[2] x, bool b) => (float[2] y) {
    [outer] n = Neg(x)
    [choice] y = If(b) <
        then_branch = t () => (float[2] u) { [inner] u = Neg(n) },
        else_branch = e () => (float[2] v) {
            [nested] v = If(b) <
                then_branch = tt () => (float[2] p) { [deep] p = Exp(n) },
                else_branch = ee () => (float[2] q) { [other] q = Relu(x) }>
        }>
}"""


def named(model, name):
    return next(node for node in model.graph.all_nodes() if node.name == name)


def rejected(model):
    with pytest.raises(VerifyError) as error:
        verify_model(model)
    return str(error.value)


@pytest.fixture
def branches():
    return parse_model(HEADER + BRANCHES)


def test_bodies_see_the_values_around_them(branches):
    verify_model(branches)


def test_bodies_of_loops_have_inputs_of_their_own():
    verify_model(
        parse_model(
            HEADER
            + """g (float[2] x, int64 n, bool c) => (float[2] y) {
                y = Loop(n, c, x) <body = l (int64 i, bool go, float[2] s) => (bool on, float[2] t) {
                    on = Identity(go)
                    t = Add(s, x)
                }>
            }"""
        )
    )


def test_nothing_inside_a_body_points_at_a_removed_node(branches):
    branches.graph.remove(named(branches, "outer"))
    assert rejected(branches).startswith(
        "Neg 'inner': input 0 'n' is produced by Neg 'outer', which is not in the graph"
    )


def test_deeper_bodies_are_verified_too(branches):
    named(branches, "deep").replace_input_with(0, onnx_ir.Value(name="ghost"))
    assert "Exp 'deep': input 0 'ghost' is neither" in rejected(branches)
    branches = parse_model(HEADER + BRANCHES)
    named(branches, "other").op_type = "Rellu"
    assert "Rellu 'other': no such operator in opset 21" in rejected(branches)


def test_a_body_reads_only_what_stands_before_it(branches):
    outer = named(branches, "outer")
    branches.graph.remove(outer)
    branches.graph.append(outer)
    assert "input 0 'n' is used before its producer Neg 'outer'" in rejected(branches)


def test_a_body_does_not_see_into_another(branches):
    named(branches, "inner").replace_input_with(0, named(branches, "deep").outputs[0])
    assert "Neg 'inner': input 0 'p' is produced by Exp 'deep', which is not in the graph" in rejected(branches)


TYPED = """g (float[2] x) => (float[2] y, float16[2] z) <int64[1] one = {1}> {
    [round] i = Cast<to=7>(x)
    [sum] j = Add(i, one)
    [back] f = Cast<to=1>(j)
    [end] y = Relu(f)
    [half] z = Cast<to=10>(f)
}"""


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("end", "INT64", "Relu 'end': graph output 'y' is declared INT64, the operator gives FLOAT"),
        ("half", "FLOAT", "Cast 'half': graph output 'z' is declared FLOAT, the operator gives FLOAT16"),
        ("round", "INT32", "Cast 'round': output 'i' is declared INT32, the operator gives INT64"),
    ],
)
def test_stated_dtypes_are_those_that_the_operator_gives(name, stated, message):
    model = parse_model(HEADER + TYPED)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or onnx_ir.TensorType(
                onnx_ir.DataType[{"i": "INT64", "j": "INT64"}.get(value.name, "FLOAT")]
            )
    verify_model(model)
    named(model, name).outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType[stated])
    assert rejected(model).startswith(message)


def test_types_that_nobody_states_are_left_so():
    model = parse_model(HEADER + TYPED)
    before = [(value.type, value.shape) for node in model.graph for value in node.outputs]
    text = print_model(model)
    verify_model(model)
    assert [(value.type, value.shape) for node in model.graph for value in node.outputs] == before
    assert print_model(model) == text


def test_parameters_of_functions_are_no_dtypes():
    verify_model(
        parse_model(
            """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
            g (float[2] x) => (float16[2] y) { y = local.cast<kind = 10>(x) }
            <opset_import: ["" : 21], domain: "local">
            cast <kind> (p) => (q) { q = Cast<to : int = @kind>(p) }"""
        )
    )


def test_it_is_cheap_enough_to_run_after_every_pass():
    """4,000 nodes, of which every tenth is a cast and eighty give graph outputs."""
    outputs = ", ".join(f'float[2] "present.{index}"' for index in range(80))
    nodes = ["v0 = Relu(x)"]
    for index in range(4000):
        nodes.append(f"v{index + 1} = {'Cast<to=1>' if index % 10 == 0 else 'Neg'}(v{index})")
        if index % 50 == 0:
            nodes.append(f'"present.{index // 50}" = Exp(v{index})')
    model = parse_model(HEADER + f"g (float[2] x) => ({outputs}) {{ {' '.join(nodes)} }}")
    times = []
    for _ in range(3):
        start = time.process_time()
        verify_model(model)
        times.append(time.process_time() - start)
    assert min(times) < 0.5, f"{times} s; expected about 0.05"
