"""legalize: every change of an operator is either known to mean the same, converted, or refused; numbers stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.errors import PassError, UsageError
from passopt.ir.graph.provenance import MADE_BY, MADE_FROM
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.model_files import model_bytes
from passopt.ir.serialization.text import parse_model, print_model
from passopt.ir.weights.lazy_weight import LazyWeight
from passopt.passes import resolve, run_passes
from passopt.passes.opset.legalize import Legalize
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, check_onnx, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder


def model_text(opset, body, extra=""):
    return f'<ir_version: 8, opset_import: ["" : {opset}{extra}]>\n{body}'


def converted(opset, target, body, **settings):
    """(operators of the main graph, model) after every check of `check`."""
    model, result = check(Legalize(opset=target), model_text(opset, body), **settings)
    assert result.modified
    assert model.graph.opset_imports[""] == target
    return [node.op_type for node in model.graph], model


def refused(opset, target, body, message, kind=PassError):
    with pytest.raises(kind, match=message):
        Legalize(opset=target).run(parse_model(model_text(opset, body)))


X = "g (float[2,3,5] x) => (float[] y)"


@pytest.mark.parametrize("kind", ["L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"])
@pytest.mark.parametrize("attributes", ["<axes = [1, -1]>", "<axes = [1], keepdims = 0>", "<keepdims = 0>", ""])
@pytest.mark.parametrize(("opset", "target"), [(11, 17), (11, 18), (12, 26)])
def test_reductions(kind, attributes, opset, target):
    _, model = converted(opset, target, f"{X} {{ y = Reduce{kind} {attributes} (x) }}")
    (node,) = model.graph
    has_input = "axes" in attributes and (target >= 18 or kind == "Sum")
    assert (len(node.inputs), "axes" in node.attributes) == (1 + has_input, "axes" in attributes and not has_input)


def test_log_sum_of_positive_numbers():
    x = np.random.default_rng(1).random((2, 3, 5), np.float32) + 0.5
    converted(17, 18, f"{X} {{ y = ReduceLogSum <axes = [-2]> (x) }}", feeds={"x": x})


@pytest.mark.parametrize(
    "body",
    [
        "{ y = Unsqueeze <axes = [0, -1]> (x) }",
        "{ u = Unsqueeze <axes = [2, 0]> (x) y = Squeeze <axes = [0, 2]> (u) }",
        "{ u = Unsqueeze <axes = [2]> (x) y = Squeeze (u) }",
    ],
)
def test_squeeze_and_unsqueeze(body):
    for target in (13, 21, 24):
        _, model = converted(11, target, f"{X} {body}")
        assert not any("axes" in node.attributes for node in model.graph)


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize(("attributes", "operands"), [("<axis = 2, split = [1, 3, 1]>", ""), ("<axis = 1>", "")])
def test_split(opset, attributes, operands):
    sizes = ""
    if opset >= 13 and "split" in attributes:
        attributes, operands, sizes = "<axis = 2>", ", sizes", "<int64[3] sizes = {1, 3, 1}>"
    head = "g (float[2,3,5] x) => (float[] a, float[] b, float[] c)"
    body = f"{head} {sizes} {{ a, b, c = Split {attributes} (x{operands}) }}"
    for target in (17, 18, 26):
        _, model = converted(opset, target, body)
        (node,) = model.graph
        given = len(node.inputs) > 1
        assert ("num_outputs" in node.attributes) == (target >= 18 and not given)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
def test_softmax_over_several_axes(kind, axis):
    attributes = "" if axis is None else f"<axis = {axis}>"
    operators, model = converted(11, 13, f"{X} {{ h = Neg(x) y = {kind} {attributes} (h) }}")
    assert operators == (["Neg", kind] if axis in {2, -1} else ["Neg", "Flatten", "Shape", kind, "Reshape"])
    assert model.graph.outputs[0].name == "y"
    for node in model.graph:
        if node.op_type in {"Flatten", "Reshape"}:
            assert (node.metadata_props[MADE_BY], node.metadata_props[MADE_FROM]) == ("legalize", f"{kind}_1")


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "lengths", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (1, 1, 1, 1)]
)
def test_softmax_of_symbolic_and_empty_axes(kind, axis, lengths):
    model = read_model(
        model_text(11, f"g (float[a,b,c,d] x) => (float[a,b,c,d] y) {{ y = {kind} <axis = {axis}> (x) }}")
    )
    x = np.random.default_rng(axis).standard_normal(lengths).astype(np.float32)
    before = Session(model).run({"x": x})["y"]
    Legalize(opset=14).run(model)
    verify_model(model)
    np.testing.assert_array_equal(Session(model).run({"x": x})["y"], before)


def test_softmax_keeps_its_shape_for_the_passes_that_follow():
    """Flatten was once inferred with its default axis, and the next pass believed that."""
    body = "g (float[2,12] x) => (float[2,12] y) { y = Softmax <axis = 0> (x) }"
    model, _ = check(Legalize(opset=23), model_text(11, body))
    assert {value.name: value.shape for node in model.graph for value in node.outputs}["y.inner"] == [1, 24]
    run_passes(model, resolve("canonicalize,fold-constants,canonicalize").passes)
    x = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    assert Session(model).run({"x": x})["y"].shape == (2, 12)


def test_declines_softmax_of_an_axis_that_may_be_empty_where_reshape_cannot_restore_it():
    body = "g (float[a,b,c] x) => (float[a,b,c] y) { y = Softmax <axis = 1> (x) }"
    refused(
        12, 13, body, r"x of shape \[a,b,c\] may have an empty axis, .* Go to that one at least: legalize{opset=14}."
    )


def test_softmax_whose_output_is_read_and_given_out():
    body = "g (float[2,3,5] x) => (float[2,3,5] s, float[2,3,5] y) { s = Softmax <axis = 1> (x) y = Neg(s) }"
    _, model = converted(12, 23, body)
    assert [value.name for value in model.graph.outputs] == ["s", "y"]
    inner = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    assert (inner.name, inner.shape) == ("s.inner", [2, 15])


@pytest.mark.parametrize("attributes", ["", "<axis = 0>", "<axis = -1>"])
def test_softmax_of_unknown_rank_goes_through_two_dimensions(attributes):
    body = f"g (float[2,3,5] x, int64[r] s) => (float[a,b] y) {{ h = Reshape(x, s) y = Softmax {attributes} (h) }}"
    model = read_model(model_text(11, body))
    model.graph[0].outputs[0].shape = None
    _, result = check(Legalize(opset=18), model, feeds={"s": np.array([6, 5], np.int64)}, lengths={"r": 2})
    assert result.matches == 1


@pytest.mark.parametrize("target", [12, 13, 22])
def test_dropout_of_an_inference_graph(target):
    _, model = converted(11, target, f"{X} {{ y = Dropout <ratio = 0.25> (x) }}")
    (node,) = model.graph
    assert not node.attributes
    assert node.inputs[1].const_value.numpy() == np.float32(0.25)


def test_group_normalization_per_channel():
    """onnxruntime runs neither form of opset 18 to 20: the numbers come from the definition."""
    body = """g (float[2,6,5] x) => (float[2,6,5] y) <float[3] scale = {1, 2, 4}, float[3] bias = {0.5, -1, 3}> {
        y = GroupNormalization <num_groups = 3, epsilon = 0.001> (x, scale, bias)
    }"""
    model = parse_model(model_text(20, body))
    Legalize(opset=21).run(model)
    verify_model(model)
    x = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    groups = x.reshape(2, 3, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 0.001)
    expected = normal * np.array([1, 2, 4])[:, None] + np.array([0.5, -1, 3])[:, None]
    np.testing.assert_allclose(Session(model).run({"x": x})["y"], expected.reshape(2, 6, 5), rtol=1e-5, atol=1e-5)


def test_declines_group_normalization_of_unknown_channels():
    body = """g (float[2,c,5] x, float[3] s) => (float[] y) { y = GroupNormalization <num_groups = 3> (x, s, s) }"""
    refused(20, 21, body, "GroupNormalization 'GroupNormalization_0' cannot go from opset 20 to 21: the number of chan")


def test_batch_normalization():
    body = """g (float[2,3,5] x, float[3] a) => (float[] y) <float[3] v = {1, 2, 4}> {
        y = BatchNormalization (x, a, a, a, v) }"""
    converted(11, 23, body)


def test_declines_batch_normalization_while_training():
    body = "g (float[2,3] x, float[3] a) => (float[] y, float[] m) { y, m = BatchNormalization (x, a, a, a, a) }"
    refused(11, 14, body, "from opset 13 to 14: its training outputs m changed")


def test_declines_erf_of_integers():
    refused(11, 13, "g (int32[2] x) => (int32[2] y) { y = Erf (x) }", "from opset 12 to 13: it no longer takes INT32")
    converted(11, 13, f"{X} {{ y = Erf(x) }}")


def test_declines_casts_whose_infinities_changed():
    body = "g (float[2] x) => (float8e4m3fnuz[2] y) { y = Cast <to = 18> (x) }"
    refused(21, 24, body, "the cast of infinities to FLOAT8E4M3FNUZ changed")


@pytest.mark.parametrize(
    "body",
    [
        "{ s = Shape(x) y = Reshape(x, s) }",
        "{ t = Transpose <perm = [2, 0, 1]> (x) y = Flatten <axis = 2> (t) }",
        "<float lo = {-0.5}, float hi = {0.75}> { y = Clip(x, lo, hi) }",
        "<int64[1] k = {2}> { y, i = TopK <axis = -1> (x, k) }",
        "<int64[1] s = {1}, int64[1] e = {9}, int64[1] a = {2}> { y = Slice(x, s, e, a) }",
        "<int64[6] p = {0, 1, 0, 2, 0, 1}, float v = {3}> { y = Pad(x, p, v) }",
        "<int64[2] i = {2, 0}> { y = Gather <axis = 1> (x, i) }",
        "<int64[1,2] i = {1, 2}> { y = GatherND(x, i) }",
        "{ n = ArgMax <axis = 1> (x) y = Cast <to = 1> (n) }",
        "<float two = {2}> { e = Pow(x, two) y = Log(e) }",
        "<float z = {0}> { g = Greater(x, z) y = Where(g, x, z) }",
        "<float z = {0}> { a = Add(x, z) m = Max(a, z) l = Less(m, z) n = Not(l) y = Cast <to = 1> (n) }",
        "<int64 a = {0}> { c = CumSum(x, a) y = Tanh(c) }",
        "<int64[2] n = {3, 2}> { o = ConstantOfShape <value = float[1] {2.5}> (n) q = Constant <value = float {3}>()"
        " y = Mul(o, q) }",
        "<int64[4] s = {4, 1, 1, 1}> { e = Expand(x, s) s1 = Sigmoid(e) y = Identity(s1) }",
        "<float s = {0.05}, uint8 z = {9}> { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        "{ s = Sin(x) c = Cos(s) r = Round(c) y = Softplus(r) }",
        "<int64[1,3] i = {0, 1, 2}, float[1] u = {7}> { y = ScatterND(x, i, u) }",
    ],
)
@pytest.mark.parametrize(("opset", "target"), [(13, 18), (13, 23), (11, 26)])
def test_operators_that_mean_the_same(body, opset, target):
    converted(opset, target, f"{X} {body}")


def test_fused_operators_rise_to_24_and_26():
    body = """g (float[2,3,4,6] q, float[2,1,5,6] k, float[2,1,5,6] v, float[4,5] m, float[6] w) => (float[] y) {
        a = Attention <scale = 0.25> (q, k, v, m)
        y = RMSNormalization (a, w)
    }"""
    for target in (24, 26):
        operators, _ = converted(23, target, body)
        assert operators == ["Attention", "RMSNormalization"]


BODIES = """
g (bool c, float[2,3] x) => (float[2,1] y) {
    y = If (c) <
        then_branch = a () => (float[] t) { t = ReduceSum <axes = [1]> (x) },
        else_branch = b () => (float[] e) { s = Softmax <axis = 0> (x) e = ReduceMean <axes = [1]> (s) }>
}"""


@pytest.mark.parametrize("branch", [True, False])
def test_bodies_follow(branch):
    _, model = converted(12, 23, BODIES, feeds={"c": np.array(branch)})
    names = [node.op_type for node in model.graph.all_nodes()]
    assert names == ["If", "ReduceSum", "Flatten", "Shape", "Softmax", "Reshape", "ReduceMean"]


FUNCTION = """<ir_version: 8, opset_import: ["" : 12, "local" : 1]>
g (float[2,3,5] x) => (float[2,3,5] y) {
    h = local.norm <dims = [-1]> (x)
    y = local.norm <dims = [1]> (h)
}
<domain: "local", opset_import: ["" : 12]>
norm <dims> (x) => (y) {
    m = ReduceMean <axes : ints = @dims> (x)
    s = ReduceSum <axes = [-1]> (x)
    d = Sub(x, m)
    e = Add(d, s)
    y = Softmax <axis = 1> (e)
}"""


def test_functions_follow_with_their_parameters():
    model, _ = check(Legalize(opset=23), read_model(FUNCTION))
    (function,) = model.functions.values()
    assert function.opset_imports[""] == 23
    names = [node.op_type for node in function]
    assert names.count("Constant") == 2
    assert names[-4:] == ["Flatten", "Shape", "Softmax", "Reshape"]


def test_names_types_metadata_and_lazy_weights_stay(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(LazyWeight, "numpy", refuse)
    monkeypatch.setattr(LazyWeight, "tobytes", refuse)
    text = model_text(
        17,
        """g (float[b,4] x) => (float[b,6] y) <float[4,6] w = random> {
            m = ReduceMean <axes = [-1]> (x)
            d = Sub(x, m)
            y = MatMul(d, w)
        }""",
    )
    model = read_model(text)
    node = model.graph[0]
    node.metadata_props["namespace"] = "model.norm"
    model.metadata_props["who"] = "me"
    model.graph.metadata_props["what"] = "graph"
    weight = model.graph.initializers["w"].const_value
    Legalize(opset=23).run(model)
    assert model.graph[0] is node
    assert (node.name, node.metadata_props["namespace"]) == ("ReduceMean_0", "model.norm")
    assert (model.metadata_props["who"], model.graph.metadata_props["what"]) == ("me", "graph")
    assert model.graph.initializers["w"].const_value is weight
    assert node.outputs[0].dtype == onnx_ir.DataType.FLOAT


def test_equal_axes_are_one_constant(check_pass):
    check_pass(
        Legalize(opset=18),
        model_text(
            17,
            """g (float[b,4] x) => (float[b,1] y, float[1,4] z) {
                a = ReduceMean <axes = [-1]> (x)
                d = Sub(x, a)
                y = ReduceMax <axes = [-1]> (d)
                z = ReduceL2 <axes = [0]> (d)
            }""",
        ),
    )


def test_a_new_name_that_a_function_has_is_not_taken():
    model = read_model(FUNCTION.replace("(x) => (y) {\n    m", "(axes) => (y) {\n    x = Identity(axes) m"))
    check(Legalize(opset=23), model)


def test_a_decoder_of_opset_17_gives_the_same_numbers():
    model = tiny_decoder(DecoderSpec(heads=3))
    assert check(Legalize(opset=26), model)[1].modified


@pytest.mark.parametrize(("opset", "version"), [(18, 10), (23, 11), (24, 12), (26, 13)])
def test_it_is_written_with_the_ir_version_that_the_opset_needs(opset, version):
    model = read_model(model_text(17, f"{X} {{ y = Relu(x) }}"))
    Legalize(opset=opset).run(model)
    assert onnx.load_from_string(model_bytes(model, {})).ir_version == version


def test_the_same_opset_changes_nothing():
    model = read_model(model_text(23, f"{X} {{ y = Relu(x) }}"))
    before = print_model(model)
    assert not Legalize(opset=23).run(model).modified
    assert print_model(model) == before


# What is refused, upwards


@pytest.mark.parametrize(("opset", "target"), [(23, 27), (13, 6)])
def test_declines_opsets_that_cannot_be_reached(opset, target):
    message = f"opset {target} is not between 7 and 26. Choose"
    refused(opset, target, f"{X} {{ y = Relu(x) }}", message, UsageError)


@pytest.mark.parametrize("opset", [6, 29])
def test_declines_models_out_of_range(opset):
    refused(opset, 18, f"{X} {{ y = Relu(x) }}", f"'g' is of opset {opset}; the oldest that is converted is 7, the new")


def test_declines_an_operator_that_changed_in_an_unknown_way():
    body = """g (float[1,2,3] x, float[1,2,3] i) => (float[] s, float[] y) {
        s, y = Scan <num_scan_inputs = 1, body = b (float[3] a, float[3] c) => (float[3] d, float[3] e) {
            d = Add(a, c) e = Identity(d) }> ("", i, x) }"""
    message = (
        "Scan 'Scan_0' cannot go from opset 8 to 9: its operator changed, and no conversion of it is known. Change"
    )
    refused(8, 18, body, message + " that node, or stay at opset 8: legalize{opset=8}.")


# Downwards


@pytest.mark.parametrize(
    "body",
    [
        "{ s = Shape(x) y = Reshape <allowzero = 1> (x, s) }",
        "{ n = Cast <to = 7, saturate = 1> (x) y = Cast <to = 1> (n) }",
        "<int8[2,3,5] q = {1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,0}, float[3] s = {0.5, 1, 2}>"
        " { d = DequantizeLinear <axis = 1, block_size = 0> (q, s) y = Add(x, d) }",
        "<int64[1] a = {-1}> { r = ReduceMean(x, a) s = Sin(r) y = Squeeze(s, a) }",
    ],
)
def test_downwards(body):
    for target in (22, 19, 18):
        _, model = converted(23, target, f"{X} {body}")
        names = {name for node in model.graph for name in node.attributes}
        assert "block_size" not in names or target >= 21
        assert "saturate" not in names or target >= 19


def test_up_and_down_again_is_the_same_text():
    model = tiny_decoder(DecoderSpec(heads=3))
    model.graph.opset_imports[""] = 18
    before = print_model(model)
    Legalize(opset=26).run(model)
    Legalize(opset=18).run(model)
    assert print_model(model) == before


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("g (float[2,3] x, float[3] w) => (float[] y) { y = RMSNormalization(x, w) }", "Run decompose-rms-norm first"),
        (
            "g (float[2,3,4,6] x, float[2,4,3] c) => (float[] y) { y = RotaryEmbedding(x, c, c) }",
            "Run decompose-rotary first",
        ),
        ("g (float[2,3,4,6] q) => (float[] y) { y = Attention(q, q, q) }", "Run decompose-attention first"),
        ("g (float[2,3] x) => (float[2,3] y) { y = Swish(x) }", "Run decompose-activations first"),
    ],
)
def test_declines_fused_operators_below_23(body, hint):
    refused(24, 21, body, f"from opset 2[34] to 2[23]: no such operator there. {hint}")


def test_declines_an_operator_that_nothing_decomposes():
    body = "g (float[2,3,4] c, int64[2] n, float[2,1,4] u) => (float[2,3,4] y) { y = TensorScatter(c, u, n) }"
    refused(
        24, 23, body, "'TensorScatter_0' cannot go from opset 24 to 23: no such operator there, and passopt knows no"
    )


def test_declines_a_dtype_that_the_older_operator_lacks():
    body = """g (int8[3,4] q, float16[3] s) => (float16[3,4] y) { y = DequantizeLinear <axis = 0> (q, s) }"""
    converted(23, 19, body)
    refused(23, 18, body, r"from opset 19 to 18: x_scale cannot be FLOAT16 there \(s\)")


def test_declines_an_attribute_that_the_older_operator_lacks():
    body = "g (int8[4,4] q, float[2,4] s) => (float[4,4] y) { y = DequantizeLinear <axis = 0, block_size = 2> (q, s) }"
    refused(21, 20, body, "from opset 21 to 20: the attribute block_size = 2 has no equivalent there")


def test_declines_an_input_that_the_older_operator_lacks():
    body = "g (float[2,3,4,6] q, int64[2] n) => (float[] y) { y = Attention(q, q, q, , , , n) }"
    refused(24, 23, body, "from opset 24 to 23: the input nonpad_kv_seqlen has no equivalent there")


def test_declines_below_18():
    refused(21, 17, f"{X} {{ y = Relu(x) }}", "downwards, 18 is the lowest target, not 17", UsageError)


def test_declines_the_way_back_of_a_conversion():
    body = "g (float[2,6,5] x, float[6] s) => (float[] y) { y = GroupNormalization <num_groups = 3> (x, s, s) }"
    refused(21, 20, body, "from opset 21 to 20: its operator changed")


def test_declines_dtypes_inside_of_bodies():
    body = """g (bool c, float16[3] s, int8[3,4] q) => (float16[3,4] y) {
        y = If (c) <then_branch = a () => (float16[3,4] t) { t = DequantizeLinear <axis = 0> (q, s) },
                    else_branch = b () => (float16[3,4] e) { h = DequantizeLinear <axis = 0> (q, s) e = Neg(h) }> }"""
    refused(
        23,
        18,
        body,
        r"DequantizeLinear that makes '[th]' cannot go from opset 19 to 18: x_scale cannot be FLOAT16 there \(s\)",
    )


def test_declines_what_is_not_known_to_fit():
    text = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
    g (float[2,3] x) => (float[2,3] y) { a = other.Thing(x) b = Reshape(a, s) y = Neg(b) }"""
    model = parse_model(text.replace("{ a", "<int64[2] s = {3, 2}> { a"))
    with pytest.raises(
        PassError, match="the dtype of a is unknown, and opset 20 takes fewer as data. Change that node"
    ):
        Legalize(opset=18).run(model)


CALLED = """<ir_version: 10, opset_import: ["" : 23, "local" : 1]>
g (float16[2,3] x) => (float16[2,3] y) { y = local.scaled (x) }
<domain: "local", opset_import: ["" : 23]>
scaled (x) => (y) {
    s = Constant <value = float16[1] {15360}> ()
    q = Constant <value = int8[2,3] {1, 2, 3, 4, 5, 6}> ()
    d = DequantizeLinear (q, s)
    y = Add(x, d)
}"""


def test_declines_dtypes_inside_of_functions():
    with pytest.raises(PassError, match="from opset 19 to 18: x_scale cannot be FLOAT16 there"):
        Legalize(opset=18).run(parse_model(CALLED))


def test_functions_are_lowered_if_every_call_fits():
    model = parse_model(CALLED)
    Legalize(opset=19).run(model)
    check_onnx(model)
    (function,) = model.functions.values()
    assert (model.graph.opset_imports[""], function.opset_imports[""]) == (19, 19)


def test_declines_values_of_attributes_that_came_later():
    body = 'g (float[2,3] x) => (float[4,3] y) <int64[4] p = {1, 0, 1, 0}> { y = Pad <mode = "wrap"> (x, p) }'
    converted(21, 19, body)
    refused(21, 18, body, "Pad 'Pad_0' cannot go from opset 19 to 18: mode = wrap has no equivalent there")


def test_pooling_without_dilations_goes_down():
    body = "g (float[1,2,5,6] x) => (float[] y) { y = AveragePool <kernel_shape = [2, 3], dilations = [1, 1]> (x) }"
    _, model = converted(22, 18, body)
    assert "dilations" not in model.graph[0].attributes
    refused(22, 18, body.replace("[1, 1]", "[2, 1]"), r"dilations = \(2, 1\) has no equivalent there")


def test_a_model_of_the_newest_opset_comes_down():
    """onnxruntime does not read opset 28, so the numbers are those of the same graph written in opset 23."""
    body = (
        "g (float n, float[2,3] x) => (float[m] y) <float a = {1}, float d = {0.5}> { c = Celu(x) y = Range(a, n, d) }"
    )
    model = parse_model(model_text(28, body))
    Legalize(opset=23).run(model)
    assert print_model(model) == print_model(parse_model(model_text(23, body)))


def test_declines_scores_that_hold_the_causal_mask_or_not():
    body = """g (float[2,3,4,6] q) => (float[] y, float[] s) {
        y, k, v, s = Attention <is_causal = 1, qk_matmul_output_mode = 2> (q, q, q) }"""
    for opset, target in ((24, 25), (25, 24)):
        refused(opset, target, body, "its output qk_matmul_output holds the causal mask from opset 25 on only")
        converted(opset, target, body.replace("mode = 2", "mode = 0"))


def test_declines_remainders_of_floats_downwards():
    body = "g (float[2] x, float[2] z) => (float[2] y) { y = Mod (x, z) }"
    refused(28, 23, body, "it takes the remainder of floats with the sign of the divisor")
    Legalize(opset=23).run(parse_model(model_text(28, body.replace("float[2]", "int32[2]"))))


REFUSED_AT_A_CALL = """<ir_version: 10, opset_import: ["" : %d, "local" : 1]>
g (%s x) => (%s y) { y = local.inner (x, x) }
<domain: "local", opset_import: ["" : %d]>
inner (x, like) => (y) { %s }"""


@pytest.mark.parametrize(
    ("opset", "dtype", "body", "message"),
    [
        (12, "int32[2]", "y = Erf(x)", "from opset 12 to 13: it no longer takes INT32"),
        (23, "float8e4m3fnuz[2]", "y = CastLike(x, like)", "the cast of infinities to FLOAT8E4M3FNUZ changed"),
    ],
)
def test_declines_upwards_what_a_call_makes_of_a_function(opset, dtype, body, message):
    with pytest.raises(PassError, match=message):
        Legalize(opset=26).run(parse_model(REFUSED_AT_A_CALL % (opset, dtype, dtype, opset, body)))
    model = parse_model(REFUSED_AT_A_CALL % (opset, "float[2]", "float[2]", opset, body))
    Legalize(opset=26).run(model)
    check_onnx(model)
