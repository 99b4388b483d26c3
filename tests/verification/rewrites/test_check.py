"""Rewrites under `--verify-each=numeric`: right ones hold, wrong ones are stopped with pass, rule and site."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir
import pytest

from passopt.ir.serialization.model_files import load_model, save_materialized
from passopt.ir.serialization.text import print_model
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.ir.weights.literals import Literal
from passopt.passes.framework.accuracy import REASSOCIATED, lossy
from passopt.passes.lm_head.slice_last_token import SliceLastToken
from passopt.passes.precision.cast import CastModel
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.passes.sharding.shard import Shard
from passopt.testing.checking import read_model
from passopt.testing.decoders import tiny_decoder
from passopt.verification.rewrites.check import Violation

X = "g (float[batch,seq,6] x, float[batch,seq,6] y)"


def violation(checked, item, model):
    before = print_model(model)
    with pytest.raises(Violation) as error:
        checked(item, model)
    assert print_model(model) == before, "a rewrite that is stopped leaves the graph as it was"
    assert error.value.exit_code == 1
    return str(error.value)


def test_swapped_operands_are_caught(rule, parsed, checked):
    item = rule(lambda self, op, a, b: op.Sub(a, b), lambda self, op, a, b: op.Add(b, op.Neg(a)))
    model = parsed(f"{X} => (float[batch,seq,6] out) {{ [first] d = Sub(x, y) out = Relu(d) }}")
    model.graph[0].metadata_props.update({"passopt.module": "layers.0.mlp", "passopt.source": "model.py:7"})
    message = violation(checked, item, model)
    assert re.match(
        r"test-rule \(.*test_check\.py:\d+\): changed the numbers of d \(layers\.0\.mlp, model\.py:7\): ", message
    )
    assert "allowed 1e-06 (sampled: batch 2, seq" in message
    assert "the pass declares exact (passes before it: none)" in message


def test_a_right_rule_holds_and_equal_sites_are_checked_once(rule, parsed, checked):
    item = rule(lambda self, op, a, b: op.Sub(a, b), lambda self, op, a, b: op.Add(a, op.Neg(b)))
    body = "d = Sub(x, y) e = Sub(d, y) f = Sub(e, x) out = Relu(f)"
    summary = checked(item, parsed(f"{X} => (float[batch,seq,6] out) {{ {body} }}"))
    assert (summary.sites, summary.distinct, summary.worst, dict(summary.unchecked)) == (3, 1, 0.0, {})
    assert str(summary).startswith("sampled: 3 sites, 1 distinct, worst error 0.0e+00 of 1e-06 (exact)")


NORM = "p = Pow(x, two) m = ReduceMean(p, last) e = Add(m, eps) s = Sqrt(e) out = Div(x, s)"
NORM_CONSTANTS = "<float two = {2}, int64[1] last = {-1}, float eps = {0.000001}>"


@pytest.mark.parametrize(("epsilon", "right"), [(1e-6, True), (1e-5, False), (1e-12, False)])
def test_an_epsilon_counts(rule, parsed, checked, epsilon, right):
    """Rows of normal numbers do not show it: 1e-5 instead of 1e-6 moves them by less than a rounding step."""

    def pattern(self, op, x, eps):
        return op.Div(x, op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, 2.0), [-1]), eps)))

    def rewrite(self, op, x, eps):
        return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), [-1]), epsilon))))

    item = rule(pattern, rewrite, REASSOCIATED)
    model = parsed(f"{X} => (float[batch,seq,6] out) {NORM_CONSTANTS} {{ {NORM} }}")
    if right:
        assert checked(item, model).worst <= 1e-5
    else:
        violation(checked, item, model)


MASKED = """g (int64[batch,total] attention_mask, float[batch,2,seq,total] scores) => (float[batch,2,seq,total] out)
<float one = {1}, float low = {-3.4028235e+38}, int64[2] axes = {1, 2}> {
    seen = Cast <to = 1> (attention_mask)
    wide = Unsqueeze(seen, axes)
    hidden = Sub(one, wide)
    bias = Mul(hidden, low)
    masked = Add(scores, bias)
    out = Softmax <axis = -1> (masked)
}"""


@pytest.mark.parametrize(("sign", "right"), [(1, True), (-1, False)])
def test_a_mask_of_the_wrong_sign_is_caught(rule, parsed, checked, sign, right):
    def pattern(self, op, scores, hidden):
        return op.Softmax(op.Add(scores, op.Mul(hidden, -3.4028235e38)), axis=-1)

    def rewrite(self, op, scores, hidden):
        bias = op.Where(op.Cast(hidden, to=9), np.float32(-1e38 * sign), np.float32(0))
        return op.Softmax(op.Add(scores, bias), axis=-1)

    item, model = rule(pattern, rewrite, REASSOCIATED), parsed(MASKED)
    if right:
        assert checked(item, model).sites == 1
    else:
        violation(checked, item, model)


@pytest.mark.parametrize(("perm", "right"), [([2, 1, 0], True), ([0, 2, 1], False)])
def test_a_permutation_of_equal_axes_is_caught(rule, parsed, checked, perm, right):
    """Shapes say nothing where all axes are equally long."""
    item = rule(
        lambda self, op, a: op.Transpose(op.Transpose(a, perm=[1, 0, 2]), perm=[2, 0, 1]),
        lambda self, op, a: op.Transpose(a, perm=perm),
    )
    text = "g (float[4,4,4] x) => (float[4,4,4] out) { a = Transpose <perm = [1,0,2]> (x)"
    model = parsed(text + " b = Transpose <perm = [2,0,1]> (a) out = Relu(b) }")
    if right:
        assert checked(item, model).sites == 1
    else:
        violation(checked, item, model)


LINEAR = "g (float[batch,seq,6] x) => (float[batch,seq,4] y) <float[6,4] w = random> { z = MatMul(x, w) y = Relu(z) }"


def test_lossy_passes_have_a_budget(rule, parsed, checked):
    def rounded(self, op, x, w):
        return op.Cast(op.Cast(op.Max(op.MatMul(x, w), 0.0), to=10), to=1)

    def pattern(self, op, x, w):
        return op.Relu(op.MatMul(x, op.weight(w)))

    assert 0 < checked(rule(pattern, rounded, lossy(1e-3)), parsed(LINEAR)).worst < 1e-3
    message = violation(checked, rule(pattern, rounded, lossy(1e-6)), parsed(LINEAR))
    assert "allowed 1e-06" in message
    assert "declares lossy(1e-06)" in message


def test_int8_is_measured_on_the_weights_themselves(parsed, checked):
    summary = checked(QuantizeWeights(), parsed(LINEAR))
    assert summary.sites == 1
    assert 1e-4 < summary.worst < 2e-2


def stored(parsed, folder, text, weights):
    """A model whose weights lie in a file, as of a checkpoint."""
    model = parsed(text)
    for name, array in weights.items():
        model.graph.initializers[name].const_value = LazyWeight(Literal.of(array), name)
    save_materialized(model, folder)
    return load_model(folder)


HALVES = (
    "g (float[batch,seq,40] x) => (float[batch,seq,60] y) <float[40,60] w = random> { m = MatMul(x, w) y = Relu(m) }"
)


def halved(rule, order):
    """One product as two, joined in `order`: right for a weight whose halves are equal."""

    def rewrite(self, op, x, w):
        halves = [op.MatMul(x, op.initializer("half", piece)) for piece in op.weight(w).split([30, 30], axis=1)]
        return op.Max(op.Concat(*(halves[index] for index in order), axis=-1), 0.0)

    return rule(lambda self, op, x, w: op.Relu(op.MatMul(x, op.weight(w))), rewrite, REASSOCIATED)


@pytest.mark.parametrize(
    ("weights", "order", "right"),
    [
        ("random", (0, 1), True),
        ("random", (1, 0), False),
        ("equal halves", (1, 0), True),  # the rule may have looked
        ("zeros", (1, 0), False),  # which would hide everything
    ],
)
def test_random_weights_accuse_and_real_ones_decide(rule, parsed, checked, tmp_path, weights, order, right):
    half = np.random.default_rng(3).standard_normal((40, 30)).astype(np.float32)
    array = {"equal halves": np.concatenate([half, half], 1), "zeros": np.zeros((40, 60), np.float32)}.get(
        weights, np.concatenate([half, 2 * half], 1)
    )
    item, model = halved(rule, order), stored(parsed, tmp_path, HALVES, {"w": array})
    if right:
        assert checked(item, model).sites == 1
    else:
        violation(checked, item, model)


def test_types_and_failures_of_the_replacement_are_violations(rule, parsed, checked):
    """A replacement that onnxruntime cannot run is no replacement."""

    def rewrite(self, op, x):
        return op.Reshape(op.Reshape(x, np.array([7], np.int64)), op.Shape(x))

    item = rule(lambda self, op, x: op.Neg(op.Neg(x)), rewrite)
    message = violation(
        checked, item, parsed(f"{X} => (float[batch,seq,6] out) {{ a = Neg(x) b = Neg(a) out = Abs(b) }}")
    )
    assert "the replacement does not run: onnxruntime fails on the model" in message


def read_twice(model):
    node = model.graph[0]
    node.replace_input_with(1, node.inputs[0])


def test_a_pass_that_rewires_directly_is_compared_with_the_graph_before(whole, parsed, checked):
    text = f"{X} => (float[batch,seq,6] out) {{ d = Sub(x, y) out = Relu(d) }}"
    with pytest.raises(Violation, match=r"whole: changed the numbers of d: .*; the pass declares exact"):
        checked(whole(read_twice), parsed(text))


def merge(model):
    """What cse does: `b` is `a`."""
    first, second, *_ = model.graph
    second.outputs[0].replace_all_uses_with(first.outputs[0])
    model.graph.remove(second)


def test_equal_values_may_be_merged_and_different_ones_may_not(whole, parsed, checked):
    text = "a = Exp(x) b = {} c = Mul(a, b) out = Sub(c, y)"
    right = checked(whole(merge), parsed(f"{X} => (float[batch,seq,6] out) {{ {text.format('Exp(x)')} }}"))
    assert (right.sites, right.worst) == (1, 0.0)
    with pytest.raises(Violation, match="changed the numbers of c"):
        checked(whole(merge), parsed(f"{X} => (float[batch,seq,6] out) {{ {text.format('Exp(y)')} }}"))


@pytest.mark.parametrize(("value", "right"), [("x", True), ("y", False)])
def test_two_chains_from_one_value_may_be_merged_where_they_end(whole, parsed, checked, value, right):
    """As keys and queries of one projection: the replacement reads `k` only, which is the transpose of `q`."""

    def merge_ends(model):
        made = {output.name: output for node in model.graph for output in node.outputs}
        for old, new in (("e", "q"), ("t", "k")):
            made[old].replace_all_uses_with(made[new])
            model.graph.remove(made[old].producer(), safe=True)

    text = (
        f"q = Exp(x) t = Transpose<perm = [0,2,1]>(q) e = Exp({value}) k = Transpose<perm = [0,2,1]>(e)"
        " s = Mul(t, k) w = Sigmoid(s) n = Transpose<perm = [0,2,1]>(w) out = Sub(n, y)"
    )
    model = parsed(f"{X} => (float[batch,seq,6] out) {{ {text} }}")
    if right:
        assert checked(whole(merge_ends), model).worst == 0.0
    else:
        with pytest.raises(Violation, match="changed the numbers of s"):
            checked(whole(merge_ends), model)


@pytest.mark.parametrize(("steps", "right"), [(1, True), (24, False)])
def test_a_root_whose_dtype_is_not_stated_is_judged_by_that_of_its_numbers(whole, parsed, checked, steps, right):
    """As the values of an inlined function of fp16: one rounding of theirs is a thousand times what fp32 may lose."""

    def scale(model):
        model.graph[0].replace_input_with(1, model.graph.initializers["near"])

    bits = 0x3C00  # of 1.0
    constants = f"<float16 one = {{{bits}}}, float16 near = {{{bits + steps}}}>"
    text = f"g (float16[batch,6] x) => (float16[batch,6] y) {constants} {{ a = Mul(x, one) y = Neg(a) }}"
    model = parsed(text)
    model.graph[0].outputs[0].type = None
    if right:
        assert 5e-4 < checked(whole(scale, accuracy=REASSOCIATED), model).worst < 2e-3
    else:
        with pytest.raises(Violation, match="changed the numbers of a"):
            checked(whole(scale, accuracy=REASSOCIATED), model)


def test_what_a_whole_graph_pass_leaves_alone_is_no_site(whole, parsed, checked):
    summary = checked(whole(lambda model: None), parsed(LINEAR))
    assert (summary.sites, summary.distinct, summary.whole_worst) == (0, 0, 0.0)
    assert summary.whole > 3


def test_a_changed_interface_is_said_to_be_unchecked(checked):
    summary = checked(SliceLastToken(), tiny_decoder())
    assert summary.sites == 0
    assert "not checked: 1 sites, because it gives inputs or outputs other shapes; compare with passopt verify" in str(
        summary
    )


ENCODER = """g (float[b,s,6] x, int64[b,s] mask) => (float[b,s,6] y) <int64[4] heads = {0,0,2,4},
    int64[3] flat = {0,0,8}, int64[2] axes = {1,2}, int64 zero = {0}, float low = {-10000}> {
    q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1)
    s0 = MatMul(q, k) e = Equal(mask, zero) u = Unsqueeze(e, axes) s1 = Where(u, low, s0) p = Softmax<axis=-1>(s1)
    c0 = MatMul(p, v) c1 = Transpose<perm=[0,2,1,3]>(c0) c = Reshape(c1, flat) o = MatMul(c, wo) y = Add(o, x)
}"""


def masked_encoder(parsed):
    """An attention whose heads are split by a Reshape to constant lengths, which are others on a rank."""
    random = np.random.default_rng(5)
    shapes = {"wq": (6, 8), "wk": (6, 8), "wv": (6, 8), "wo": (8, 6)}
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = parsed(ENCODER.replace("int64[b,s] mask", f"int64[b,s] mask, {declared}"))
    for name, shape in shapes.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = LazyWeight(Literal.of(random.standard_normal(shape).astype(np.float32)), name)
        model.graph.register_initializer(value)
    return model


def test_all_ranks_together_are_compared_with_the_graph_before(parsed, checked):
    for model in (masked_encoder(parsed), tiny_decoder()):
        summary = checked(Shard(2, pad=True), model)
        assert dict(summary.unchecked) == {}
        assert summary.whole > 3
        assert summary.whole_worst < 1e-5


def test_a_sum_over_ranks_that_is_left_out_shows(whole, parsed, checked):
    def run(model):
        Shard(2).run(model)
        node = next(node for node in model.graph if node.op_type == "AllReduce")
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)

    with pytest.raises(Violation, match=r"left a wrong graph, which shows at"):
        checked(whole(run), masked_encoder(parsed))


def test_ranks_of_large_weights_are_said_to_be_unchecked(parsed, checked, monkeypatch):
    monkeypatch.setattr("passopt.verification.sampling.traced_graph._LARGEST", 100)
    summary = checked(Shard(2), masked_encoder(parsed))
    assert dict(summary.unchecked) == {"its weights are too large to run all ranks; compare with passopt verify": 1}


def test_a_cast_of_the_whole_graph_is_checked_value_by_value(parsed, checked):
    summary = checked(CastModel("fp16"), parsed(LINEAR))
    assert (summary.sites, dict(summary.unchecked)) == (2, {})
    assert 1e-5 < summary.worst < 2e-2


def test_collectives_are_said_to_be_unchecked(rule, parsed, checked):
    item = rule(
        lambda self, op, x: op.Neg(op.node("AllReduce", x, domain="com.microsoft")),
        lambda self, op, x: op.node("AllReduce", op.Neg(x), domain="com.microsoft"),
    )
    model = parsed(f"{X} => (float[batch,seq,6] out) {{ a = com.microsoft.AllReduce(x) b = Neg(a) out = Abs(b) }}")
    summary = checked(item, model)
    assert dict(summary.unchecked) == {"AllReduce joins ranks; compare with passopt verify": 1}


BRANCHES = """g (bool c, float[n] x) => (float[n] out) {
    a = If (c) <then_branch = t () => (float[n] p) { q = Exp(x) p = Sub(x, q) },
                else_branch = e () => (float[n] r) { r = Abs(x) }>
    out = Neg(a)
}"""


def test_a_change_in_a_body_is_said_to_be_uncut_and_compared_in_the_whole_graph(whole, parsed, checked):
    def respell(model):
        node = next(node for node in model.graph.all_nodes() if node.op_type == "Sub")
        minus = onnx_ir.node("Neg", [node.inputs[1]])
        total = onnx_ir.node("Add", [node.inputs[0], minus.outputs[0]])
        minus.outputs[0].name, total.outputs[0].name = "minus", "total"
        total.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        node.graph.insert_before(node, [minus, total])
        node.outputs[0].replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        node.graph.remove(node)

    summary = checked(whole(respell), parsed(BRANCHES))
    assert dict(summary.unchecked) == {"If has a subgraph": 1}
    assert (summary.sites, summary.whole_worst) == (0, 0.0)
    text = str(summary)
    assert "exact" not in text
    assert text.endswith("worst error 0.0e+00; not checked: 1 sites, because If has a subgraph")


def test_what_follows_from_an_unknown_operator_is_said_to_be_unchecked(rule, parsed, checked):
    item = rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: op.Identity(a))
    body = "a = Neg(x) b = Neg(a) u = com.microsoft.NoSuchOperator(b) c = Neg(u) d = Neg(c) out = Add(b, d)"
    summary = checked(item, parsed(f"{X} => (float[batch,seq,6] out) {{ {body} }}"))
    assert (summary.sites, summary.whole) == (1, 0)
    (reason,) = summary.unchecked
    assert reason.startswith("the original does not run alone: onnxruntime refuses the model")
    assert "whole graph not compared, because onnxruntime does not know NoSuchOperator" in str(summary)


def test_the_record_says_what_was_sampled(rule, parsed):
    from passopt.passes.pipeline.runner import run_passes
    from passopt.verification.rewrites.check import NumericCheck

    item = rule(lambda self, op, a: op.Neg(op.Neg(a)), lambda self, op, a: op.Add(a, 0.0))
    model = parsed(f"{X} => (float[batch,seq,6] out) {{ a = Neg(x) b = Neg(a) out = Abs(b) }}")
    (record,) = run_passes(model, [item], instruments=[NumericCheck()])
    body = record.to_json()["numeric"]
    assert (body["sampled_sites"], body["distinct_sites"], body["worst_error"], body["accuracy"]) == (
        1,
        1,
        0.0,
        "exact",
    )


PICKED = """g (float[n,5] x, bool c) => (int64[n] y) {
    h = If <then_branch = t () => (float[n,5] a) { a = Relu(x) },
            else_branch = e () => (float[n,5] b) { b = Neg(x) }> (c)
    y = ArgMax <axis = 1, keepdims = 0> (h) }"""


def replaced(whole, name, op_type, **facts):
    """A pass that puts another operator in place of the one that computes a value, in whatever body."""

    def run(model):
        nodes = [*model.graph.all_nodes(), *(node for item in model.functions.values() for node in item.all_nodes())]
        old = next(node for node in nodes if node.outputs[0].name == name)
        old.op_type = op_type

    return whole(run, **facts)


@pytest.mark.parametrize(("name", "op_type"), [("a", "Abs"), ("b", "Relu")])
def test_a_tie_in_one_sample_excuses_no_other_element(whole, parsed, checked, name, op_type):
    """Multiples of a half have ties, which excused every integer of every sample once."""
    with pytest.raises(Violation, match="left a wrong graph"):
        checked(replaced(whole, name, op_type, accuracy=REASSOCIATED), parsed(PICKED))


def test_integers_that_ties_decide_are_counted_apart(whole, checked):
    ones = ", ".join(["1.0"] * 60)
    model = read_model(f"""<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[n,60] x) => (int64[n] y) {{ r = own.f(x) y = ArgMax <axis = 1, keepdims = 0> (r) }}
        <domain: "own", opset_import: ["" : 21]> f (v) => (w) {{
            k = Constant <value_floats = [{ones}]> () r = Relu(v) w = Mul(r, k) }}""")

    def nudge(model):
        (function,) = model.functions.values()
        function[0].attributes.add(onnx_ir.AttrFloat32s("value_floats", [1 + 1e-7 * n for n in range(60)]))

    summary = checked(whole(nudge, accuracy=REASSOCIATED), model)
    assert summary.whole_worst == 0.0
    assert summary.whole_ties > 0
    assert f"{summary.whole_ties} elements not compared" in str(summary)


FUNCTION = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[n,5] x) => (float[n,5] y) { h = own.f(x) y = Add(h, x) }
<domain: "own", opset_import: ["" : 21]> f (v) => (w) { w = Sigmoid(v) }"""


@pytest.mark.parametrize(("op_type", "right"), [("Sigmoid", True), ("Neg", False), ("Relu", False)])
def test_lossy_passes_are_judged_on_the_whole_graph(whole, checked, op_type, right):
    model = read_model(FUNCTION)
    item = replaced(whole, "w", op_type, accuracy=lossy(0.02))
    if right:
        assert checked(item, model).whole_worst == 0.0
    else:
        with pytest.raises(Violation, match="left a wrong graph"):
            checked(item, model)


NARROWED = [
    "g (float[n,4] x) => (float[n,4] y) { a = Exp(x) b = Exp(a) c = Add(b, x) y = Neg(c) }",
    """g (float[b,2,q,8] x, float[b,2,k,8] z, float[b,1,q,k] attn_mask) => (float[b,2,q,k] y) {
        t = Transpose <perm = [0, 1, 3, 2]> (z) s = MatMul(x, t) m = Add(s, attn_mask) y = Softmax(m) }""",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", NARROWED)
def test_right_casts_raise_no_alarm_where_sampled_inputs_overflow(parsed, checked, text):
    summary = checked(CastModel(dtype="fp16"), parsed(text))
    assert summary.whole or summary.sites


def test_random_numbers_are_no_sites(parsed, checked):
    model = parsed("g (float[n] x) => (float[n] y) { q = RandomNormalLike(x) y = Add(q, x) }")
    summary = checked(CastModel("fp16"), model)
    assert "RandomNormalLike draws random numbers" in summary.unchecked


def test_strings_beside_a_site_do_not_matter(parsed, checked):
    model = parsed("""g (float[2] x) => (float[2] y) {
        a = Constant<value = string[2] {"1.5", "2"}>() b = Cast<to = 1>(a) c = Neg(b) d = Neg(c) y = Add(d, x) }""")
    summary = checked(CastModel("fp16"), model)
    assert summary.worst < 2e-2


def test_numbers_in_8_bits_are_compared_as_numbers_on_both_sides(parsed, checked):
    model = parsed("""g (float[4] x) => (float[4] z) {
        s = Constant<value = float {0.5}>() o = Constant<value_float = 0.0>() zp = Cast<to = 17>(o)
        q = QuantizeLinear(x, s, zp) z = DequantizeLinear(q, s, zp) }""")
    checked(CastModel("fp16"), model)
