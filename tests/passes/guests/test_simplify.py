"""simplify: onnxsim without the weights; numbers, contract, quantisation and metadata stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.errors import PassError
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM, MODULE, SOURCE
from passopt.ir.serialization.text import print_model
from passopt.ir.serialization.text_files import read_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.passes.cleanup.simplify import Simplify
from passopt.passes.guests import simplifier
from passopt.passes.guests.onnxsim_process import OnnxsimError
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, compare_numbers
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
CLUTTER = (
    HEADER
    + """g (float[batch,6] x) => (float[batch,2,5] y)
<float[3,5] w = random, int64[1] three = {3}, int64[1] m = {-1}, float eps = {0.5}, float[5] b = {1, 2, 3, 4, 5}> {
    [shape] n = Shape<start = 0, end = 1>(x)
    [doubled] two = Add(m, three)
    [target] t = Concat<axis = 0>(n, two, three)
    [view] v = Reshape(x, t)
    [there] a = Transpose<perm = [0, 2, 1]>(v)
    [back] c = Transpose<perm = [0, 2, 1]>(a)
    [nothing] i = Identity(c)
    [product] p = MatMul(i, w)
    [wide] e = Add(b, eps)
    [sum] y = Add(p, e)
}"""
)


def operators(model):
    return [node.op_type for node in model.graph]


def test_clutter_goes_and_the_numbers_stay(check_pass):
    model, result = check_pass(Simplify(), CLUTTER)
    assert operators(model) == ["Shape", "Concat", "Reshape", "MatMul", "Add"]
    assert list(model.graph.initializers) == ["w", "three", "two", "e"]
    assert result.matches > 0
    assert isinstance(model.graph.initializers["w"].const_value, LazyWeight)


def test_survivors_keep_their_metadata():
    model = read_model(CLUTTER)
    for index, node in enumerate(model.graph):
        node.metadata_props.update({MODULE: f"model.layers.{index}", SOURCE: f"m.py:{index}"})
        node.doc_string = node.name
    Simplify().run(model)
    kept = {node.name: node for node in model.graph}
    assert kept["product"].doc_string == "product"
    assert kept["product"].metadata_props[MODULE] == "model.layers.7"
    assert kept["product"].metadata_props[MADE_BY] == "simplify"  # it reads the Reshape now
    assert dict(kept["sum"].metadata_props) == {MODULE: "model.layers.9", SOURCE: "m.py:9"}
    assert all(SOURCE in node.metadata_props for node in model.graph)


def test_what_onnxsim_makes_says_so_and_is_named_after_its_place():
    text = (
        HEADER
        + """g (float[2,3,4] x) => (float[4,2,3] y) {
        [one] r = Transpose<perm = [1, 2, 0]>(x)
        [other] s = Transpose<perm = [1, 2, 0]>(r)
        [end] y = Relu(s)
    }"""
    )
    model, _ = check(Simplify(), text)
    assert operators(model) == ["Transpose", "Relu"]
    found = model.graph[0].metadata_props
    assert (found[MADE_BY], found[MADE_FROM]) == ("simplify", "other,one")
    names = [*(value.name for node in model.graph for value in node.outputs), *model.graph.initializers]
    assert not [name for name in names if name.startswith("_v_")]


def test_no_weight_is_read(monkeypatch):
    model = read_model(CLUTTER)
    before = expression_of(model.graph.initializers["w"])
    monkeypatch.setattr(Evaluator, "read", lambda *_: pytest.fail("a weight was read"))
    assert Simplify().run(model).modified
    assert expression_of(model.graph.initializers["w"]) is before


def test_onnxsim_sees_no_weight(monkeypatch):
    seen = []
    original = simplifier.simplified

    def spy(proto, **options):
        seen.append({tensor.name for tensor in proto.graph.initializer})
        return original(proto, **options)

    monkeypatch.setattr(simplifier, "simplified", spy)
    Simplify().run(read_model(CLUTTER))
    assert seen[0] == {"three", "m", "eps", "b"}
    assert not any("w" in names for names in seen)


def test_a_dequantisation_is_never_folded():
    """Not of a weight, and not of constants so small that they cross to onnxsim."""
    text = (
        HEADER
        + """g (float[batch,3] x) => (float[batch,3] y)
    <int8[3] codes = {1, 2, 3}, float scale = {0.5}, float[3,3] w = random, int64[1] m = {-1}> {
        d = DequantizeLinear(codes, scale)
        i = Identity(x)
        p = MatMul(i, w)
        y = Add(p, d)
    }"""
    )
    model, _ = check(Simplify(), text)
    assert operators(model) == ["DequantizeLinear", "MatMul", "Add"]
    assert model.graph.initializers["codes"].const_value.numpy().tolist() == [1, 2, 3]


def test_a_product_stays_a_matmul():
    """As Gemm, neither shard nor quantize-weights nor fusions would know it."""
    text = (
        HEADER
        + """g (float[2,3] x) => (float[2,5] y) <float[5,3] w = random, float[5] b = {1, 2, 3, 4, 5}> {
        i = Identity(x)
        t = Transpose<perm = [1, 0]>(w)
        p = MatMul(i, t)
        y = Add(p, b)
    }"""
    )
    model, _ = check(Simplify(), text)
    assert operators(model) == ["Transpose", "MatMul", "Add"]


def test_a_clean_graph_stays_as_it_is():
    model = read_model(HEADER + "g (float[2,3] x) => (float[2,5] y) <float[3,5] w = random> { y = MatMul(x, w) }")
    graph = model.graph
    assert not Simplify().run(model).modified
    assert model.graph is graph


def test_shared_values_and_inner_outputs_stay():
    text = (
        HEADER
        + """g (float[2,3] x) => (float[3,2] t, float[2,3] y, float[2,3] z) {
        t = Transpose<perm = [1, 0]>(x)
        b = Transpose<perm = [1, 0]>(t)
        y = Relu(b)
        z = Abs(b)
    }"""
    )
    model, _ = check(Simplify(), text)
    assert [value.name for value in model.graph.outputs] == ["t", "y", "z"]
    assert operators(model) == ["Transpose", "Relu", "Abs"]


def test_an_input_with_a_default_is_no_constant():
    model = read_model(CLUTTER)
    model.graph.inputs.append(model.graph.initializers["eps"])
    Simplify().run(model)
    assert [value.name for value in model.graph.inputs] == ["x", "eps"]
    assert model.graph.initializers["eps"] is model.graph.inputs[1]
    assert "e" not in model.graph.initializers
    assert operators(model).count("Add") == 2


def test_an_unused_input_stays():
    model = read_model(CLUTTER.replace("float[batch,6] x)", "float[batch,6] x, int64[batch] lost)"))
    Simplify().run(model)
    assert [value.name for value in model.graph.inputs] == ["x", "lost"]


def test_a_weight_inside_a_body_and_its_twin_elsewhere():
    text = HEADER + (
        "g (float[2,3] x, bool c) => (float[2,4] y) <float[3,4] w = random> { i = Identity(x)"
        "  y = If(c)<then_branch = t () => (float[2,4] a) { a = MatMul(i, w) },"
        "            else_branch = e () => (float[2,4] b) { m = MatMul(i, w)  b = Neg(m) }> }"
    )
    model = read_model(text)
    check(Simplify(), model)


def test_branches_that_call_their_values_the_same_keep_their_nodes_apart():
    text = HEADER + (
        "g (float[2,3] x, bool c) => (float[2,3] y) {"
        "  y = If(c)<then_branch = t () => (float[2,3] a) { [n0] m = Neg(x)  [n1] i = Identity(m)  [n2] a = Abs(i) },"
        "            else_branch = e () => (float[2,3] b) { [n3] m = Exp(x)  [n4] b = Abs(m) }> }"
    )
    model = read_model(text)
    check(Simplify(), model)
    Simplify().run(model)
    assert sorted(node.name for node in model.graph.all_nodes() if node.op_type in {"Neg", "Exp"}) == ["n0", "n3"]
    before = print_model(model)
    assert not Simplify().run(model).modified
    assert print_model(model) == before


@pytest.mark.parametrize("pipeline", ["", "int8", "tp{degree=2}"])
def test_a_decoder_keeps_its_contract_and_numbers(pipeline):
    model = tiny_decoder(DecoderSpec(heads=6))
    mask = next(value for node in model.graph for value in node.outputs if value.name == "scores_bias")
    mask.shape = onnx_ir.Shape(["batch", 6, "seq", "past+seq"])
    original = model.clone()
    if pipeline:
        run_passes(model, resolve(pipeline).passes)
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    metadata = dict(model.metadata_props)
    if pipeline == "int8":
        original = model.clone()
    changed = model.clone()
    Simplify().run(changed)
    compare_numbers(original, changed, 1e-5, {}, {})
    assert not Simplify().run(changed).modified
    assert [value.name for value in (*changed.graph.inputs, *changed.graph.outputs)] == names
    assert dict(changed.metadata_props) == metadata


def test_the_largest_constant_that_folding_makes_is_an_option():
    text = (
        HEADER
        + """g (float[40] x) => (float[40] y) <float one = {1.5}, int64[1] n = {40}> {
        e = Expand(one, n)
        s = Mul(e, e)
        y = Add(x, s)
    }"""
    )
    few, many = read_model(text), read_model(text)
    Simplify(limit=100).run(few)
    Simplify(limit=1000).run(many)
    assert len(many.graph) == 1
    assert len(few.graph) > 1


def _failing(proto, **_):
    raise OnnxsimError("ZeroDivisionError: no number")


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (lambda proto, **_: (proto, False), "onnxsim says that its own result is not valid"),
        (_failing, "onnxsim failed with ZeroDivisionError: no number. Leave out"),
        (
            lambda proto, **_: (_renamed(proto), True),
            r"onnxsim changed the inputs and outputs from .*'y'.* to .*'other'",
        ),
    ],
)
def test_what_onnxsim_does_wrong_is_said_and_changes_nothing(monkeypatch, fake, message):
    model = read_model(CLUTTER)
    text = print_model(model)
    monkeypatch.setattr(simplifier, "simplified", fake)
    with pytest.raises(PassError, match=f"simplify: {message}"):
        Simplify().run(model)
    assert print_model(model) == text


def _renamed(proto):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output[0].name = "other"
    copy.graph.node[-1].output[0] = "other"
    return copy


def test_half_precision_weights_of_a_large_model_are_references_only():
    """A weight of 2 GB that does not exist: only its type crosses."""
    from passopt.ir.weights.expressions import Source
    from passopt.ir.weights.source_file import SourceFile

    model = read_model(CLUTTER.replace("float[3,5] w", "float[3,5] w"))
    value = model.graph.initializers["w"]
    file = SourceFile("/nowhere/w.safetensors", 1 << 40, 0, "")
    value.const_value = LazyWeight(Source(onnx_ir.DataType.FLOAT, (3, 5), "w", file, 1 << 35), "w")
    assert Simplify().run(model).modified


BODY = (
    HEADER
    + """g (bool c, float[2,3] x) => (float[2,3] y) {
    a = Transpose<perm = [1, 0]>(x)
    b = Transpose<perm = [1, 0]>(a)
    y = If (c) <then_branch = t () => (float[2,3] p) { q = Exp(b) p = Identity(q) },
                else_branch = e () => (float[2,3] r) { s = Neg(b) r = Identity(s) }>
}"""
)


def test_no_two_nodes_get_one_name_and_old_ones_keep_theirs():
    model = read_model(BODY)
    names = {value.name: node.name for node in model.graph.all_nodes() for value in node.outputs}
    Simplify().run(model)
    after = [(value.name, node.name) for node in model.graph.all_nodes() for value in node.outputs]
    given = [name for _, name in after if name]
    assert len(given) == len(set(given))
    assert all(names[value] == name for value, name in after if value in names)


def test_another_order_of_the_same_nodes_is_no_change(monkeypatch):
    def reverse(proto, **_):
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        proto.graph.node.extend([*nodes[1::-1], *nodes[2:]])
        return proto, True

    monkeypatch.setattr(simplifier, "simplified", reverse)
    model = read_model(HEADER + "g (float[2,3] x) => (float[2,3] y) { a = Exp(x) b = Neg(x) y = Add(a, b) }")
    assert not Simplify().run(model).modified
    assert [node.op_type for node in model.graph] == ["Exp", "Neg", "Add"]


def test_a_computed_length_of_a_target_stays_computed():
    """Check that no -1 is written for it: where the target holds a 0, too, onnxruntime refuses the model."""
    text = """g (float[a,b] x, float[a,2] z) => (float[?,?] y) <int64[1] zero = {0}> {
        n = Shape<start = 0, end = 1>(z) t = Concat<axis = 0>(n, zero) r = Reshape(x, t) y = Neg(r) }"""
    model, _ = check(Simplify(), HEADER + text)
    assert "Concat" in operators(model)


RANDOM_BODIES = {
    "like": "a = RandomUniformLike(x) b = RandomUniformLike(x)",
    "normal": "a = RandomNormal<shape = [2, 3]>() b = RandomNormal<shape = [2, 3]>()",
    "training": "a = Dropout(x, half, on) b = Dropout(x, half, on)",
    "function": "a = local.f(x) b = local.f(x)",
    "function of functions": "a = local.g(x) b = local.g(x)",
}


@pytest.mark.parametrize("kind", RANDOM_BODIES)
def test_two_random_values_stay_two(kind):
    text = f"""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        m (float[2,3] x) => (float[2,3] y) <float half = {{0.5}}, bool on = {{1}}> {{
            i = Identity(x) {RANDOM_BODIES[kind].replace("(x", "(i")} y = Sub(a, b) }}
        <domain: "local", opset_import: ["" : 21]> f (a) => (b) {{ b = Bernoulli(a) }}
        <domain: "local", opset_import: ["" : 21, "local" : 1]> g (a) => (b) {{ b = local.f(a) }}"""
    model = read_model(text)
    before = {key: len(function) for key, function in model.functions.items()}
    Simplify().run(model)
    kinds = operators(model)
    assert len(kinds) == 3
    assert kinds[0] == kinds[1]
    assert len(set(model.graph[-1].inputs)) == 2
    assert {key: len(function) for key, function in model.functions.items()} == before


def test_equal_calls_of_a_function_without_chance_become_one():
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        m (float[2,3] x) => (float[2,3] y) { a = local.f(x) b = local.f(x) y = Mul(a, b) }
        <domain: "local", opset_import: ["" : 21]> f (a) => (b) { b = Exp(a) }"""
    model, _ = check(Simplify(), text)
    assert operators(model) == ["f", "Mul"]


@pytest.mark.parametrize("kind", ["initializers", "constants", "vectors"])
def test_a_negative_zero_is_no_positive_one(kind):
    """They are equal, but a quotient by one is another infinity than by the other."""
    shape = "[3]" if kind == "vectors" else ""
    plus, minus = ("{0, 1, 2}", "{-0.0, 1, 2}") if shape else ("{0}", "{-0.0}")
    stored = f"<float{shape} p = {plus}, float{shape} n = {minus}>" if kind != "constants" else ""
    made = "" if stored else "p = Constant<value_float = 0.0>() n = Constant<value_float = -0.0>()"
    text = (
        f"{HEADER} g (float[2,3] x) => (float[2,3] y, float[2,3] z) {stored} {{ {made} y = Div(x, p) z = Div(x, n) }}"
    )
    model = read_model(text)
    feeds = {"x": np.array([[1, 2, 3], [4, 5, 6]], np.float32)}
    expected = Session(model.clone()).run(feeds)
    Simplify().run(model)
    found = Session(model).run(feeds)
    assert all(np.array_equal(expected[name], found[name]) for name in ("y", "z"))
    assert found["z"][0, 0] == -np.inf


@pytest.mark.parametrize("where", ["graph", "function"])
def test_operators_that_the_checker_knows_may_be_of_another_domain(where):
    call = 'ai.onnx.ml.Normalizer<norm = "L2">'
    text = f"""<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 3, "local" : 1]>
        m (float[2,3] x) => (float[2,3] y) {{ i = Identity(x) y = {call if where == "graph" else "local.f"}(i) }}
        <domain: "local", opset_import: ["" : 21, "ai.onnx.ml" : 3]> f (a) => (b) {{ b = {call}(a) }}"""
    model, _ = check(Simplify(), text)
    assert [(node.domain, node.op_type) for node in model.graph] in (
        [("ai.onnx.ml", "Normalizer")],
        [("local", "f")],
    )
    assert "passopt.hidden" not in print_model(model)


def test_constants_of_the_third_version_of_the_format():
    """There, constants had to be inputs; onnxsim refuses others, which many files have all the same."""
    text = """<ir_version: 3, opset_import: ["" : 8]>
        g (float[2,3] x) => (float[2,3] y) <float[1] c = {2}> {
            i = Identity(x) k = Constant<value = float[1] {3}>() m = Mul(i, c) y = Add(m, k) }"""
    model, _ = check(Simplify(), text)
    assert "Identity" not in operators(model)
    assert model.ir_version == 3


def test_a_norm_whose_weight_is_larger_than_its_input_is_no_norm():
    """onnxsim would make an RMSNormalization of it, which does not broadcast its input."""
    text = """g (float[n,3,2] x, float[3,3,2] w) => (float[?,?,?] y)
        <float e = {0.001}, float two = {2}, int64[1] a = {-1}, float one = {1}> {
        i = Identity(x) p = Pow(i, two) m = ReduceMean<keepdims = 1>(p, a) q = Add(m, e) s = Sqrt(q) r = Div(one, s)
        n = Mul(i, r) y = Mul(w, n) }"""
    header = HEADER.replace("21", "23")
    for length in (1, 3):
        model, _ = check(Simplify(), header + text, lengths={"n": length})
        assert "RMSNormalization" not in operators(model)


def test_reductions_of_all_axes_and_of_one_stay_two():
    text = """g (float[n,3] x) => (float[?] y) <int64[1] first = {0}> {
        i = Identity(x) a = ReduceL1<keepdims = 1>(i) y = ReduceL1<keepdims = 0>(a, first) }"""
    model, _ = check(Simplify(), HEADER + text)
    assert operators(model) == ["ReduceL1", "ReduceL1"]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_product_with_a_bias_keeps_its_batch_where_an_axis_may_be_empty(k):
    text = """g (float[n,k,4] x) => (float[?,?,?] y) <float[4,4] w = random, float[4] b = {1, 2, 3, 4}> {
        i = Identity(x) p = MatMul(i, w) y = Add(p, b) }"""
    model, _ = check(Simplify(), HEADER + text, lengths={"k": k})
    assert operators(model) == ["MatMul", "Add"]


def test_a_softmax_over_one_masked_element_is_no_one():
    text = """g (float[n,4] x) => (float[?,?] y) <int64[1] last = {1}> {
        i = Identity(x) m = ReduceMax<keepdims = 1>(i, last) y = Softmax<axis = 1>(m) }"""
    model, _ = check(Simplify(), HEADER + text)
    assert "Softmax" in operators(model)
    feeds = {"x": np.array([[-np.inf] * 4, [1, 2, 3, 4]], np.float32)}
    assert np.isnan(Session(model).run(feeds)["y"]).tolist() == [[True], [False]]


@pytest.mark.parametrize("kind", ["sequence", "optional"])
def test_an_input_that_is_handed_on_to_an_output_keeps_its_name(kind):
    body = "s = SequenceConstruct(x) y = SequenceAt(s, zero)"
    if kind == "optional":
        body = "s = Optional(x) y = OptionalGetElement(s)"
    text = (
        f"g (float[n,6] x) => (float[?,?] y, float[?,?] z) <int64 zero = {{0}}> {{ {body} i = Identity(x) z = Neg(i) }}"
    )
    model, _ = check(Simplify(), HEADER + text)
    assert [value.name for value in model.graph.inputs] == ["x"]
