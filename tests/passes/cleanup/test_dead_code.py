"""dead-code: what no output depends on goes; everything else stays."""

from __future__ import annotations

from passopt.passes.cleanup.dead_code import RemoveDeadCode
from passopt.testing.checking import check

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def left(text, header=HEADER):
    """(operators, initializers, result) after every check of `check`."""
    model, result = check(RemoveDeadCode(), header + text)
    return [node.op_type for node in model.graph], sorted(model.graph.initializers), result


def test_a_chain_that_nobody_reads_goes_with_its_weights(check_pass):
    check_pass(
        RemoveDeadCode(),
        HEADER
        + """
        g (float[2,3] x) => (float[2,3] y) <float[3,4] w = random, float[3] b = {1, 2, 3},
         float[5] unused = {1, 2, 3, 4, 5}> {
            a = MatMul(x, w)
            d = Exp(a)
            s = Add(x, b)
            y = Relu(s)
            z = Neg(y)
        }""",
        matches=3,
    )


def test_shared_values_stay():
    operators, weights, result = left(
        "g (float[3] x) => (float[3] y) <float[3] b = {1, 2, 3}> { a = Add(x, b) d = Exp(a) e = Add(d, b) y = Relu(a) }"
    )
    assert (operators, weights, result.matches) == (["Add", "Relu"], ["b"], 2)


def test_a_node_with_one_used_output_stays():
    operators, _, result = left(
        "g (float[5] x) => (float[2] y) <int64[2] s = {2, 3}> { a, b = Split<axis=0>(x, s) y = Relu(a) }"
    )
    assert operators == ["Split", "Relu"]
    assert not result.modified


def test_outputs_stay_even_if_they_are_constants_or_unread():
    operators, weights, result = left(
        "g (float[3] x) => (float[3] y, float[3] b, float[3] a) <float[3] b = {1, 2, 3}> { y = Relu(x) a = Exp(x) }"
    )
    assert (operators, weights, result.modified) == (["Relu", "Exp"], ["b"], False)


def test_what_a_subgraph_reads_stays():
    operators, weights, result = left(
        """g (bool c, float[3] x) => (float[3] y) <float[3] b = {1, 2, 3}> {
            a = Exp(x)
            y = If (c) <then_branch = p () => (float[3] t) { t = Add(a, b) },
                            else_branch = q () => (float[3] e) { e = Identity(x) }>
        }"""
    )
    assert (operators, weights, result.modified) == (["Exp", "If"], ["b"], False)


def test_inputs_that_nobody_reads_stay():
    model, _ = check(RemoveDeadCode(), HEADER + "g (float[3] x, float[3] z) => (float[3] y) { a = Neg(z) y = Relu(x) }")
    assert [value.name for value in model.graph.inputs] == ["x", "z"]


FUNCTIONS = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[3] x) => (float[3] y) { y = local.outer(x) }
<opset_import: ["" : 21, "local" : 1], domain: "local"> outer (a) => (b) { b = local.inner(a) }
<opset_import: ["" : 21], domain: "local"> inner (a) => (b) { b = Relu(a) }
"""


def test_functions_that_are_called_stay_also_through_others():
    model, result = check(RemoveDeadCode(), FUNCTIONS)
    assert sorted(name for _, name, _ in model.functions) == ["inner", "outer"]
    assert not result.modified


def test_functions_that_nobody_calls_go():
    model, result = check(RemoveDeadCode(), FUNCTIONS.replace("y = local.outer(x)", "y = local.inner(x)"))
    assert [name for _, name, _ in model.functions] == ["inner"]
    assert result.modified


def test_functions_that_only_dead_nodes_call_go():
    model, _ = check(RemoveDeadCode(), FUNCTIONS.replace("y = local.outer(x)", "y = Neg(x) z = local.outer(x)"))
    assert not model.functions
