"""Decompositions in bodies of If, Loop and Scan, which read values and constants from around them, and in functions."""

from __future__ import annotations

import numpy as np
import pytest

from passopt.ir.errors import PassError
from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib
from passopt.passes.decomposition.decompose_activations import DecomposeActivations
from passopt.passes.decomposition.decompose_attention import DecomposeAttention
from passopt.passes.decomposition.decompose_rms_norm import DecomposeRmsNorm
from passopt.passes.decomposition.decompose_rotary import DecomposeRotary
from passopt.passes.opset.legalize import Legalize
from passopt.testing.checking import check, compare_numbers, read_model
from passopt.verification.rewrites.check import NumericCheck

HEADER = '<ir_version: 10, opset_import: ["" : %d, "com.microsoft" : 1]>\n'
#: What is computed of x, the other inputs, the pass, and the operators that must be gone.
NODES = {
    "gelu": ("{} = Gelu({})", "", DecomposeActivations(), "Gelu"),
    "tanh gelu": ('{} = Gelu<approximate = "tanh">({})', "", DecomposeActivations(), "Gelu"),
    "norm": ("{} = RMSNormalization({}, w)", ", float[4] w", DecomposeRmsNorm(), "RMSNormalization"),
    "rotary": (
        "{} = RotaryEmbedding({}, cs, sn, p)",
        ", float[9,2] cs, float[9,2] sn, int64[b,s] p",
        DecomposeRotary(),
        "RotaryEmbedding",
    ),
    "attention": (
        "{} = Attention({}, k, v, m)",
        ", float[b,2,t,4] k, float[b,2,t,4] v, float[s,t] m",
        DecomposeAttention(),
        "Attention",
    ),
    "skip norm": (
        "{} = com.microsoft.SkipLayerNormalization({}, z, w)",
        ", float[b,2,s,4] z, float[4] w",
        DecomposeContrib(),
        "SkipLayerNormalization",
    ),
}
BODIES = {
    "if": """y = If(flag) <then_branch = t () => (float[?,?,?,?] p1) { h = Neg(x) CALL(p1, h) },
                            else_branch = f () => (float[?,?,?,?] p2) { CALL(p2, x) }>""",
    "nested": """n = Neg(x)
        y = If(flag) <then_branch = t () => (float[?,?,?,?] p1) {
                p1 = If(flag) <then_branch = t2 () => (float[?,?,?,?] q1) { CALL(q0, n) q1 = Neg(q0) },
                               else_branch = f2 () => (float[?,?,?,?] q2) { q2 = Identity(n) }> },
            else_branch = f () => (float[?,?,?,?] p2) { CALL(p2, x) }>""",
    "loop": """y = Loop(three, yes, x) <body = l (int64 i, bool c, float[b,2,s,4] a) => (bool d, float[b,2,s,4] r) {
                d = Identity(c) CALL(r0, a) r = Add(r0, x) }>""",
    "scan": """o = Unsqueeze(x, zero)
        l = Scan<num_scan_inputs = 1, body = l (float[b,2,s,4] a) => (float[b,2,s,4] r) { CALL(r, a) }>(o)
        y = Squeeze(l, zero)""",
}


def graph(kind, body):
    call, inputs, _, _ = NODES[kind]
    text = BODIES[body]
    while "CALL(" in text:
        before, _, rest = text.partition("CALL(")
        arguments, _, after = rest.partition(")")
        text = before + call.format(*arguments.split(", ")) + after
    if kind == "skip norm":  # its kernel takes no four axes
        text, inputs = (item.replace("[b,2,s,4]", "[b,s,4]").replace("[?,?,?,?]", "[?,?,?]") for item in (text, inputs))
    constants = "<int64[1] zero = {0}, int64 three = {3}, bool yes = {1}>"
    shape, anything = ("b,s,4", "?,?,?") if kind == "skip norm" else ("b,2,s,4", "?,?,?,?")
    return f"{HEADER % 23} g (float[{shape}] x, bool flag{inputs}) => (float[{anything}] y) {constants} {{ {text} }}"


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", NODES)
def test_in_a_body(kind, body, flag):
    if not flag and body in {"loop", "scan"}:
        pytest.skip("has no branches")
    _, _, item, gone = NODES[kind]
    for lengths in ({"b": 2, "s": 3, "t": 5}, {"b": 1, "s": 1, "t": 2}):
        feeds = {"flag": np.array(flag)}
        if kind == "rotary":
            feeds["p"] = np.arange(lengths["b"] * lengths["s"]).reshape(lengths["b"], lengths["s"])
        model, result = check(item, graph(kind, body), feeds=feeds, lengths=lengths)
        assert result.matches >= 1
        assert gone not in [node.op_type for node in model.graph.all_nodes()]


def test_the_result_goes_to_an_older_opset():
    original = read_model(graph("gelu", "nested"))
    model = original.clone()
    DecomposeActivations().run(model)
    Legalize(opset=18).run(model)
    compare_numbers(original, model, 1e-5, {"flag": np.array(True)}, {})


def test_names_are_new_in_all_graphs():
    text = graph("gelu", "if").replace("h = Neg(x)", '"p2.erf" = Neg(x) h = Neg("p2.erf")')
    model, _ = check(DecomposeActivations(), text, matches=2)
    names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
    assert len(names) == len(set(names))


def test_nothing_around_a_body_is_removed():
    """The value that only the node in the body read stays where it is made; dead-code removes it if nobody reads it."""
    text = f"""{HEADER % 23} g (float[n,4] x, float[4] w, bool flag) => (float[?,?] y, float[4] k) {{
        k = Neg(w)
        y = If(flag) <then_branch = t () => (float[?,?] p) {{ p = RMSNormalization(x, k) }},
                      else_branch = f () => (float[?,?] q) {{ q = Identity(x) }}> }}"""
    check(DecomposeRmsNorm(), text, matches=1, feeds={"flag": np.array(True)})


def test_what_no_pass_touches_is_written_as_it_was_read():
    """The types that ONNX finds for values in bodies are not left behind where the pass declines."""
    text = f"""{HEADER % 23} g (float[n,4] x, bool flag) => (float[?,?] y) {{
        y = If(flag) <then_branch = t () => (float[?,?] p) {{
                n = Neg(x) p, s = com.microsoft.SkipSimplifiedLayerNormalization<unknown = 1>(n, n, n) }},
            else_branch = f () => (float[?,?] q) {{ q = Identity(x) }}> }}"""
    model = read_model(text)
    result = DecomposeContrib().run(model)
    assert not result.modified
    assert ["attribute unknown" in reason for reason in result.declines] == [True]
    assert all(node.outputs[0].type is None for node in model.graph.all_nodes() if node.op_type == "Neg")


FUNCTION = """<ir_version: 10, opset_import: ["" : 23, "local" : 1]>
    g (float[n,4] x) => (float[?,?] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 23]> f (a) => (b) { b = Gelu(a) }"""


def test_what_stands_in_a_function_is_told():
    model = read_model(FUNCTION)
    result = DecomposeActivations().run(model)
    assert not result.modified
    assert list(result.declines) == ["Gelu that makes 'b' is in the function f; run inline-functions first"]


def test_legalize_names_the_passes_that_help_a_function():
    with pytest.raises(
        PassError, match="Gelu that makes .b. in the function f .* Run inline-functions,decompose-activations first"
    ):
        Legalize(opset=18).run(read_model(FUNCTION))


def test_an_operator_of_onnxruntime_in_a_function_is_told():
    text = FUNCTION.replace('["" : 23]> f', '["" : 23, "com.microsoft" : 1]> f').replace("Gelu", "com.microsoft.Gelu")
    result = DecomposeContrib().run(read_model(text))
    assert any("is in the function f; run inline-functions first" in reason for reason in result.declines)


def test_numeric_verification_runs_through_bodies():
    from passopt.passes.pipeline.runner import run_passes

    check_of_numbers = NumericCheck()
    run_passes(read_model(graph("gelu", "nested")), [DecomposeActivations()], instruments=[check_of_numbers])
    assert check_of_numbers.summaries[0].whole > 0


def test_what_nobody_reads_goes_since_legalize_would_refuse_it():
    text = f"""{HEADER % 23} g (float[n,4] x, bool flag) => (float[?,?] y) {{
        unread = Gelu(x)
        y = If(flag) <then_branch = t () => (float[?,?] p) {{ n = Neg(x) idle = Gelu(n) p = Exp(x) }},
                      else_branch = f () => (float[?,?] q) {{ q = Identity(x) }}> }}"""
    model, _ = check(DecomposeActivations(), text, matches=3, feeds={"flag": np.array(True)})
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "Exp", "Identity"]
    Legalize(opset=18).run(model)
