"""Graphs of any kind are compared on inputs that are sampled by type and name, or given."""

from __future__ import annotations

import types

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.ir.graph.decoder import decoder_of
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.precision.cast import CastModel
from passopt.passes.precision.quantize_activations import QuantizeActivations
from passopt.passes.precision.quantize_weights import QuantizeWeights
from passopt.testing.checking import read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder
from passopt.verification.comparisons import NUMPY_TWIN, ORIGINAL
from passopt.verification.quantised_weights import ON_CODES
from passopt.verification.sampling.given_inputs import read_inputs
from passopt.verification.tolerances import BARS, judgement_of, precision_of
from passopt.verification.verify import VerifyOptions, runnable, verify
from passopt.verification.verify_compiled import _precision as library_precision

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
GRAPHS = {
    "encoder": """g (int64[batch,seq] input_ids, int64[batch,seq] attention_mask, int64[batch,seq] token_type_ids)
        => (float[batch,seq,6] last_hidden_state)
        <float[30,6] words = random, float[2,6] types = random, float[6,6] w = random, float one = {1},
         float low = {-10000}> {
        a = Gather(words, input_ids) t = Gather(types, token_type_ids) h = Add(a, t) q = MatMul(h, w)
        kt = Transpose <perm = [0, 2, 1]> (h) s = MatMul(q, kt) m = Cast <to = 1> (attention_mask)
        axes = Constant <value_ints = [1]> () m1 = Unsqueeze(m, axes) i = Sub(one, m1) b = Mul(i, low)
        sm = Add(s, b) p = Softmax(sm) last_hidden_state = MatMul(p, h) }""",
    "images": """g (float[batch,3,12,10] pixel_values) => (float[batch,5] logits)
        <float[4,3,3,3] k = random, float[4,5] w = random> {
        c = Conv(pixel_values, k) r = Relu(c) p = MaxPool <kernel_shape = [2, 2], strides = [2, 1]> (r)
        g1 = GlobalAveragePool(p) f = Flatten(g1) logits = MatMul(f, w) }""",
    "encoder and decoder": """g (int64[b,e] encoder_ids, int64[b,d] decoder_ids, float[b,1,d,e] cross_mask)
        => (float[b,d,7] logits)
        <float[9,6] words = random, float[6,7] w = random> {
        x = Gather(words, encoder_ids) y = Gather(words, decoder_ids) xt = Transpose <perm = [0, 2, 1]> (x)
        s = MatMul(y, xt) axes = Constant <value_ints = [1]> () m = Squeeze(cross_mask, axes) t = Add(s, m)
        p = Softmax(t) c = MatMul(p, x) h = Add(c, y) logits = MatMul(h, w) }""",
}


def read_graph(name):
    return read_model(HEADER + GRAPHS[name])


def nudged(model, name="w"):
    """A copy in which one element of a weight is off by 1 %."""
    changed = model.clone()
    value = changed.graph.initializers[name]
    array = np.array(value.const_value.numpy())
    array.flat[np.abs(array).argmax()] *= 1.01
    value.const_value = onnx_ir.tensor(array, name=name)
    return changed


@pytest.mark.parametrize("name", GRAPHS)
def test_any_graph_is_compared_on_sampled_inputs(name):
    model = read_graph(name)
    report = verify(model, model.clone())
    assert report.ok
    assert report.worst.error == 0.0
    assert len({row.scenario for row in report.rows}) > 5
    assert any(note.startswith("inputs: ") for note in report.notes)
    assert not verify(model, nudged(model)).ok


def test_token_ids_stay_within_the_table():
    """Ids beyond the table would fail in onnxruntime, and the samples with them."""
    report = verify(read_graph("encoder"), read_graph("encoder"))
    assert {row.output for row in report.rows} == {"last_hidden_state"}


def test_a_mask_that_is_ignored_shows():
    def ignore(model):
        add = next(node for node in model.graph if node.outputs[0].name == "sm")
        add.replace_input_with(1, add.inputs[0])

    changed = read_graph("encoder")
    ignore(changed)
    assert not verify(read_graph("encoder"), changed).ok


def test_given_inputs_take_the_place_of_sampled_ones(tmp_path):
    model = read_graph("encoder")
    ids = np.array([[3, 29, 0]], np.int32)
    path = tmp_path / "inputs.npz"
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    report = verify(model, nudged(model), options=VerifyOptions(inputs=read_inputs(path)))
    assert {row.scenario for row in report.rows} == {"given inputs"}
    assert not report.ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inptu_ids": np.zeros((1, 2), np.int64)}, "the model has no input inptu_ids"),
        ({"attention_mask": None}, "the file has no array for attention_mask"),
        ({"input_ids": np.zeros(3, np.int64)}, r"has the shape \[3\], expected input_ids INT64\[batch, seq\]"),
        ({"input_ids": np.zeros((1, 2), np.float32)}, "is float32, expected input_ids INT64"),
        ({"attention_mask": np.zeros((5, 2), np.int64)}, "batch is 1 in the array for input_ids and 5 in that for att"),
        ({"input_ids": np.full((1, 2), 2**63, np.uint64)}, "is uint64 with numbers beyond input_ids INT64"),
        ({"input_ids": np.full((1, 2), 99)}, r"the original does not run on input_ids int64\[1, 2\], attention_mask"),
        (
            {name: np.zeros((1, 0), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")},
            "nothing was",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    given = {name: np.zeros((1, 2), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    given = {name: array for name, array in {**given, **change}.items() if array is not None}
    with pytest.raises((UsageError, ModelError), match=message):
        verify(read_graph("encoder"), read_graph("encoder"), options=VerifyOptions(inputs=given))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    path = tmp_path / "inputs.npz"
    with pytest.raises(UsageError, match="cannot be read"):
        read_inputs(path)
    path.write_bytes(b"PK\x03\x04 no zip at all")
    with pytest.raises(UsageError, match=r"inputs\.npz: is"):
        read_inputs(path)


def test_other_names_are_another_model():
    with pytest.raises(ModelError, match="the candidate has other inputs: missing .*pixel_values"):
        verify(read_graph("images"), read_graph("encoder"))


@pytest.mark.parametrize(
    "options", [VerifyOptions(layerwise=True), VerifyOptions(tokens=(1, 2, 3)), VerifyOptions(max_positions=9)]
)
def test_options_of_decoders_are_refused(options):
    with pytest.raises(UsageError, match="is for decoders"):
        verify(read_graph("images"), read_graph("images"), options=options)


def test_a_graph_that_runs_on_no_sample_asks_for_inputs():
    text = "g (float[n,3] x) => (float[?,?] y) <int64[2] to = {7, 5}> { y = Reshape(x, to) }"
    model = read_model(HEADER + text)
    with pytest.raises(ModelError, match=r"no inputs were found on which .*Give some with `inputs=FILE\.npz`.*x FLOAT"):
        verify(model, model)


def compared(one, other, **options):
    models = [read_model(HEADER + text) for text in (one, other)]
    return verify(*models, options=VerifyOptions(**options))


def test_long_strings_and_sequences_are_compared_to_the_last_element():
    text = "g (string[2000] a, string[2000] b, bool[2000] c) => (string[2000] y) { y = Where(c, a, b) }"
    given = {"a": np.full(2000, "a", object), "b": np.full(2000, "b", object), "c": np.ones(2000, bool)}
    given["c"][1000] = False
    assert compared(text, text, inputs=given).ok
    assert not compared(text, text.replace("Where(c, a, b)", "Identity(a)"), inputs=given).ok
    text = "g (float[2000] x) => (seq(float[2000]) y) <float k = {1}> { z = Mul(x, k) y = SequenceConstruct(x, z) }"
    assert compared(text, text).ok
    assert not compared(text, text.replace("k = {1}", "k = {1.01}")).ok


@pytest.mark.parametrize(
    ("one", "other", "finding"),
    [
        ("(int64[n] y) { y = Cast <to = 7> (x) }", "(int32[n] y) { y = Cast <to = 6> (x) }", "dtype int32, expected"),
        ("(bool[n] y) { y = IsNaN(x) }", "(float[n] y) { b = IsNaN(x) y = Cast <to = 1> (b) }", "dtype float32, exp"),
        ("(float[n] y) { y = Relu(x) }", "(double[n] y) { r = Relu(x) y = Cast <to = 11> (r) }", "dtype float64, exp"),
    ],
)
def test_other_dtypes_of_outputs_are_wrong(one, other, finding):
    report = compared(f"g (float[n] x) => {one}", f"g (float[n] x) => {other}")
    assert not report.ok
    assert report.worst.note.startswith(finding)


def test_inputs_of_another_dtype_are_another_model():
    text = "g (int64[n] x) => (int64[n] y) { y = Identity(x) }"
    with pytest.raises(ModelError, match=r"the candidate has the input x INT32\[n\], expected x INT64\[n\]"):
        compared(text, text.replace("int64", "int32"))


def test_integers_are_equal():
    text = "g (int64[n] x) => (int64[n] y) <int64 big = {100000}> { z = Add(x, big) y = Identity(z) }"
    assert not compared(text, text.replace("{100000}", "{100001}")).ok


PICKED = """g (float16[n,4] x) => (float16[n,4] logits, float16[n,4] pooled, int64[n] best)
    { w = Constant <value = float16[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,17}> ()
    logits = MatMul(x, w) pooled = Identity(logits)
    best = ArgMax <axis = 1, keepdims = 0> (logits) }"""


def test_two_graphs_in_fp16_should_agree():
    assert not compared(PICKED, PICKED).lossy
    assert compared(PICKED, PICKED).ok
    for right, wrong in [("pooled = Identity", "pooled = Neg"), ("ArgMax", "ArgMin")]:
        assert not compared(PICKED, PICKED.replace(right, wrong)).ok


def cast(model, dtype):
    changed = model.clone()
    CastModel(dtype=dtype).run(changed)
    return changed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_right_cast_of_any_graph_is_lossy_as_declared(name, dtype):
    report = verify(read_graph(name), cast(read_graph(name), dtype))
    assert report.ok, report.to_text()
    assert report.lossy == {"fp16": "fp16", "bf16": "bf16 and wider"}[dtype]


@pytest.mark.parametrize("name", ["images", "encoder and decoder"])
def test_a_lossy_candidate_is_judged_by_every_output(name):
    model = read_graph(name)
    changed = cast(model, "fp16")
    weight = changed.graph.initializers["w"]
    weight.const_value = onnx_ir.tensor(-weight.const_value.numpy(), name="w")
    assert not verify(model, changed).ok


def test_int8_of_a_right_classifier_is_judged_on_ordinary_inputs():
    text = """g (float[n,32] x) => (float[n,5] logits) <float[32,32] w = random, float[32,5] head = random> {
        a = MatMul(x, w) r = Relu(a) logits = MatMul(r, head) }"""
    model = read_model(HEADER + text)
    changed = model.clone()
    QuantizeWeights(head=True).run(changed)
    assert verify(model, changed).ok
    assert verify(model, changed).lossy == "int8"


def test_random_graphs_are_said_to_be_random():
    text = "g (float[n] x) => (float[n] y, float[n] z) { r = RandomNormalLike(x) y = Add(x, r) z = Neg(x) }"
    report = compared(text, text)
    assert report.ok
    assert any(note.startswith("not compared: y, since the graph draws random numbers") for note in report.notes)
    assert not compared(text, text.replace("Neg", "Abs")).ok
    text = "g (float[n] x) => (float[n] y) { r = RandomNormalLike(x) y = Add(x, r) }"
    with pytest.raises(ModelError, match=r"nothing can be compared: the graph draws random numbers"):
        compared(text, text)


def int8(text, *, dynamic=False, dtype=None):
    changed = read_model(HEADER + text)
    if dtype:
        CastModel(dtype=dtype).run(changed)
    QuantizeWeights(head=True).run(changed)
    if dynamic:
        QuantizeActivations().run(changed)
    return changed


def scale_one_channel(model, name, factor):
    value = model.graph.initializers[name]
    with Evaluator() as evaluator:
        array = np.array(evaluator.array(expression_of(value)))
    array[0] *= factor
    value.const_value = onnx_ir.tensor(array, name=name)


def decoder_inputs():
    decoder = decoder_of(tiny_decoder())
    ids = np.random.default_rng(1).integers(0, 30, (2, 5))
    empty = np.zeros((2, decoder.kv_heads, 0, decoder.head_dim), np.float32)
    caches = {f"past.{layer}.{part}": empty for layer in range(decoder.layers) for part in ("key", "value")}
    mask, places = np.ones((2, 5), np.int64), np.tile(np.arange(5), (2, 1))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places, **caches}


MLP = """g (float[n,32] x) => (float[n,5] y)
    <float[32,32] w1 = random, float[32] b1 = random, float[32,5] w2 = random> {
    a = MatMul(x, w1) b = Add(a, b1) r = Relu(b) y = MatMul(r, w2) }"""


@pytest.mark.parametrize("name", ["w1.scales", "w2.scales", "b1"])
def test_int8_of_any_graph_is_compared_with_its_own_codes(name):
    """A scale of one channel that is off by a tenth moves an output by less than int8 itself may."""
    changed = read_model(HEADER + MLP)
    QuantizeWeights(head=True).run(changed)
    assert verify(read_model(HEADER + MLP), changed).ok
    scale_one_channel(changed, name, 1.1)
    assert not verify(read_model(HEADER + MLP), changed).ok


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations"])
def test_right_int8_of_any_graph_is_lossy_as_declared(dynamic, dtype):
    changed = int8(MLP, dynamic=dynamic, dtype=dtype)
    report = verify(read_model(HEADER + MLP), changed)
    assert report.ok, report.to_text()
    assert report.lossy == ("int8 activations" if dynamic else "int8")
    assert {NUMPY_TWIN, ON_CODES, ORIGINAL} == {row.comparison for row in report.rows}


@pytest.mark.parametrize("name", ["w1.scales", "w2.scales"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations"])
@pytest.mark.parametrize("given", [False, True], ids=["sampled", "given"])
def test_one_wrong_scale_of_any_graph_is_worse_than_declared(name, dynamic, given):
    changed = int8(MLP, dynamic=dynamic)
    scale_one_channel(changed, name, 1.3)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)} if given else None
    report = verify(read_model(HEADER + MLP), changed, options=VerifyOptions(inputs=inputs))
    assert report.verdict.startswith("FAILED: worse than declared (int8")
    assert any(row.output == name.removesuffix(".scales") for row in report.rows if not row.ok)


@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "activations"])
def test_decoders_on_given_inputs_are_compared_with_their_codes(dynamic):
    given = decoder_inputs()
    changed = tiny_decoder(DecoderSpec(quantized=True))
    if dynamic:
        QuantizeActivations().run(changed)
    assert verify(tiny_decoder(), changed, options=VerifyOptions(inputs=given)).ok
    name = "model.layers.1.mlp.down_proj.weight.scales"
    scale_one_channel(changed, name, 1.3)
    report = verify(tiny_decoder(), changed, options=VerifyOptions(inputs=given))
    assert {row.output for row in report.rows if row.output == "model.layers.1.mlp.down_proj.weight" and not row.ok}


def test_two_models_with_int8_activations_agree_but_for_halves():
    """The predictions of two such models may drift apart; with plain activations nothing may."""
    one = int8(MLP, dynamic=True)
    report = verify(one, one.clone())
    assert report.ok
    assert {NUMPY_TWIN, ON_CODES, ORIGINAL} == {row.comparison for row in report.rows}
    other = one.clone()
    scale_one_channel(other, "b1", 1.01)
    report = verify(one, other)
    assert ON_CODES in {row.comparison for row in report.rows if not row.ok}


@pytest.mark.parametrize(
    "body",
    [
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast <to = 1> (i) y = Mul(f, s)",
        "q = QuantizeLinear(x, k, o) d = DequantizeLinear(q, k, o) c = Cast <to = 1> (w) y = MatMul(d, c)",
    ],
)
def test_other_forms_of_int8_activations_are_lossy_against_floats_only(body):
    text = """g (float[n,8] x) => (float[n,3] y) <int8[8,3] w =
        {-3,7,5,1,-9,3,8,2,4,-5,6,7,7,1,-2,3,4,5,6,-7,8,1,2,3}, float k = {0.03}, int8 o = {0}> { BODY }"""
    plain = text.replace("BODY", "c = Cast <to = 1> (w) y = MatMul(x, c)")
    report = compared(plain, text.replace("BODY", body))
    assert report.lossy == "int8 activations"
    assert report.ok, report.to_text()
    assert not compared(text.replace("BODY", body), text.replace("BODY", body)).lossy


#: (of the reference, of the candidate, the kind of comparison, whether the candidate is lossy)
JUDGEMENTS = [
    ({}, {}, "fp32", False),
    ({}, {"dtype": "fp16"}, "fp16", True),
    ({"dtype": "fp16"}, {}, "fp16", True),
    ({"dtype": "fp16"}, {"dtype": "fp16"}, "fp16", False),
    ({}, {"dtype": "bf16"}, "bf16 and wider", True),
    ({"dtype": "bf16"}, {"dtype": "bf16"}, "bf16", False),
    ({"dtype": "fp16"}, {"dtype": "bf16"}, "bf16 and wider", True),
    ({}, {"int8": "weights"}, "int8", True),
    ({"dtype": "fp16"}, {"int8": "weights"}, "int8", True),
    ({"int8": "weights"}, {"int8": "weights"}, "fp32", False),
    ({"int8": "weights"}, {}, "fp32", False),
    ({}, {"int8": "activations"}, "int8 activations", True),
    ({"int8": "activations"}, {"int8": "activations"}, "int8 activations", True),
    ({"int8": "weights"}, {"int8": "activations"}, "int8 activations", True),
]


def _made(dtype=None, int8=None):
    model = tiny_decoder(DecoderSpec(quantized=int8 is not None))
    if int8 == "activations":
        QuantizeActivations().run(model)
    if dtype:
        CastModel(dtype=dtype).run(model)
    return runnable(model, "model", [])


def _library(dtype="fp32", int8=None):
    kinds = {None: "none", "weights": "weights", "activations": "dynamic"}
    return types.SimpleNamespace(cache=types.SimpleNamespace(dtype=dtype), quantized=kinds[int8])


@pytest.mark.parametrize("case", JUDGEMENTS, ids=str)
def test_one_judgement_for_graphs_and_compiled_folders(case):
    reference, candidate, kind, lossy = case
    original = precision_of(_made(**reference))
    for found in (precision_of(_made(**candidate)), library_precision(_library(**candidate))):
        judgement = judgement_of(original, found)
        assert (judgement.kind, judgement.lossy) == (kind, lossy)
        assert judgement.bar(1e-3) is None
        assert judgement.bar(None) == (BARS[kind] if lossy else None)


def test_a_few_fp32_constants_make_no_other_precision():
    text = """g (float16[n,4] x) => (float16[n,4] y) <float16[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> {
        a = MatMul(x, w) b = Cast <to = 1> (a) c = Mul(b, k) y = Cast <to = 10> (c) }"""
    one = text.replace("k)", "two)").replace("a = M", "two = Constant <value_float = 2.0> () a = M")
    other = text.replace("7}>", "7}, float two = {2}>").replace("k)", "two)")
    report = compared(one, other)
    assert report.ok
    assert not report.lossy
    assert not compared(one, other.replace("two = {2}", "two = {2.2}")).ok
