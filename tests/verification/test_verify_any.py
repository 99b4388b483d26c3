"""Graphs of any kind are compared on inputs that are sampled by type and name, or given."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import ModelError, UsageError
from passopt.testing.checking import read_model
from passopt.verification.verify import VerifyOptions, verify
from passopt.verification.verify_any import read_inputs

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
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, message):
    given = {name: np.zeros((1, 2), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    given = {name: array for name, array in {**given, **change}.items() if array is not None}
    with pytest.raises(UsageError, match=message):
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


@pytest.mark.parametrize("options", [VerifyOptions(layerwise=True), VerifyOptions(tokens=(1, 2, 3))])
def test_options_of_decoders_are_refused(options):
    with pytest.raises(UsageError, match="is for decoders"):
        verify(read_graph("images"), read_graph("images"), options=options)


def test_a_graph_that_runs_on_no_sample_asks_for_inputs():
    text = "g (float[n,3] x) => (float[?,?] y) <int64[2] to = {7, 5}> { y = Reshape(x, to) }"
    model = read_model(HEADER + text)
    with pytest.raises(ModelError, match=r"no inputs were found on which .*Give some with `inputs=FILE\.npz`.*x FLOAT"):
        verify(model, model)
