"""quantize-groups, compared with numpy's own dequantised weights, in order with shard, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

import passopt
from passopt.ir.errors import CalibrationError, PassError, UsageError
from passopt.ir.relative_error import operator_error
from passopt.ir.serialization.model_files import load_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_groups import QuantizeGroups
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
TRANSPOSED = """
g (float[batch,64] x) => (float[batch,5] y) <float[5,64] w = random>
{ t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""
DIRECT = "g (float[batch,64] x) => (float[batch,5] y) <float[64,5] w = random> { y = MatMul(x, w) }"
GEMM = """
g (float[batch,64] x) => (float[batch,5] y) <float[5,64] w = random, float[5] b = {1, 2, 3, 4, 5}>
{ y = Gemm<transB = 1>(x, w, b) }"""
#: 128 inputs of an attention of 4 heads, 192 of a gate: groups of 32 on 2 ranks, of 64 without tensor parallelism only
#: where the 96 of the hidden state are not among them.
SPEC = DecoderSpec(layers=1, heads=4, head_dim=32, hidden=96, intermediate=192)


def dequantized(rows, group, symmetric):
    """Codes of 4 bits of rows [n, k] and back, group by group, independent of passopt."""
    back = np.empty_like(rows)
    for row in range(len(rows)):
        for start in range(0, rows.shape[1], group):
            part = rows[row, start : start + group]
            if symmetric:
                scale = np.float32(np.abs(part).max() / np.float32(7))
                back[row, start : start + group] = np.clip(np.rint(part / scale), -7, 7) * scale
                continue
            least, most = min(part.min(), 0), max(part.max(), 0)
            scale = np.float32((most - least) / np.float32(15))
            zero = np.rint(-least / scale)
            back[row, start : start + group] = (np.clip(np.rint(part / scale) + zero, 0, 15) - zero) * scale
    return back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("text", "is_turned"), [(TRANSPOSED, False), (DIRECT, True), (GEMM, False)])
def test_numbers_are_those_of_numpy(text, is_turned, group, symmetric):
    model = read_model(HEADER + text)
    changed, _ = check(QuantizeGroups(group=group, symmetric=symmetric), model, tolerance=0.3)
    twin = model.clone()
    value = twin.graph.initializers["w"]
    rows = value.const_value.numpy().T if is_turned else value.const_value.numpy()
    numbers = dequantized(np.ascontiguousarray(rows), group, symmetric)
    value.const_value = LazyWeight(Literal.of(np.ascontiguousarray(numbers.T) if is_turned else numbers), "w")
    inputs = random_feeds(model, {})
    expected, found, original = (Session(each).run(inputs)["y"] for each in (twin, changed, model))
    assert operator_error(expected, found) <= 1e-5
    assert operator_error(original, found) > 1e-3
    codes = changed.graph.initializers["w.codes"]
    assert (codes.dtype.name, list(codes.shape)) == ("INT4" if symmetric else "UINT4", [5, 64])
    assert list(changed.graph.initializers["w.scales"].shape) == [5, 64 // group]
    assert ("w.zeros" in changed.graph.initializers) != symmetric


def test_a_weight_becomes_codes_and_scales_of_groups(check_pass):
    check_pass(QuantizeGroups(group=32), HEADER + TRANSPOSED, tolerance=0.3, matches=1)


def test_zero_points_where_codes_are_not_symmetric(check_pass):
    check_pass(QuantizeGroups(group=32, symmetric=False), HEADER + TRANSPOSED, tolerance=0.3, matches=1)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_folder_and_back(tmp_path, symmetric):
    model = tiny_decoder(SPEC)
    made = passopt.run(model, f"int4{{group=32,symmetric={symmetric}}}", tmp_path / "out").model
    again = load_model(tmp_path / "out")
    assert {value.name: value.dtype for value in again.graph.initializers.values() if "codes" in value.name} == {
        value.name: value.dtype for value in made.ir.graph.initializers.values() if "codes" in value.name
    }
    feeds = decoder_feeds()
    for name, expected in Session(made.ir).run(feeds).items():
        assert np.array_equal(Session(again).run(feeds)[name], expected), name


def decoder_feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(2)
    past = {f"past.0.{part}": random.standard_normal((1, 4, 2, 32)).astype(np.float32) for part in ("key", "value")}
    return {
        "input_ids": random.integers(0, 34, (1, 5)),
        "attention_mask": np.ones((1, 7), np.int64),
        "position_ids": np.arange(2, 7)[None],
        **past,
    }


def test_shared_weights_are_stored_once():
    text = """
    g (float[batch,64] x, float[batch,64] z) => (float[batch,5] y, float[batch,5] u) <float[5,64] w = random>
    { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) u = MatMul(z, t) }"""
    changed, _ = check(QuantizeGroups(group=32), HEADER + text, tolerance=0.3)
    assert sorted(changed.graph.initializers) == ["w.codes", "w.scales"]


def test_declines_the_head():
    _, result = check(QuantizeGroups(group=32), tiny_decoder(SPEC), tolerance=0.6)
    assert result.matches == 6
    assert any("is the head" in reason for reason in result.declines)


@pytest.mark.parametrize(
    ("item", "text", "message"),
    [
        (QuantizeGroups(), TRANSPOSED.replace("64", "96"), "groups of 64 do not fill the 96 inputs of w"),
        (QuantizeGroups(group=16), TRANSPOSED, "group=16, expected 128, 64, 32"),
        (QuantizeGroups(group=32, symmetric=False, from_="c"), TRANSPOSED, "leave symmetric=false out"),
    ],
)
def test_refuses_what_it_cannot_do(item, text, message):
    with pytest.raises((PassError, UsageError), match=message):
        item.run(read_model(HEADER + text))


def test_refuses_an_older_opset():
    with pytest.raises(PassError, match=r"from opset 21 on, this model has 20. Run legalize\{opset=21\} first"):
        QuantizeGroups().run(read_model(HEADER.replace("21", "20") + TRANSPOSED))


def test_gptq_needs_a_calibration():
    with pytest.raises(CalibrationError, match="--bits 4 --group 64"):
        QuantizeGroups(method="gptq").run(read_model(HEADER + TRANSPOSED))


def made(pipeline: str, spec: DecoderSpec = SPEC) -> onnx_ir.Model:
    model = tiny_decoder(spec)
    run_passes(model, resolve(pipeline).passes)
    return model


def codes_of(model: onnx_ir.Model, degree: int) -> dict[str, list[np.ndarray]]:
    found = {}
    for name, value in model.graph.initializers.items():
        if name.endswith((".codes", ".scales", ".zeros")):
            ranks = []
            for rank in range(degree):
                with Evaluator(rank) as evaluator:
                    ranks.append(evaluator.array(expression_of(value)))
            found[name] = ranks
    return found


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_codes_are_equal_in_either_order_and_at_every_degree(symmetric):
    int4 = f"int4{{group=32,symmetric={symmetric}}}"
    whole = codes_of(made(int4), 1)
    first = codes_of(made(f"{int4},tp{{degree=2}}"), 2)
    last = codes_of(made(f"tp{{degree=2}},{int4}"), 2)
    assert whole.keys() == first.keys() == last.keys()
    assert len(whole) == (12 if symmetric == "true" else 18)
    for name, (expected,) in whole.items():
        for one, two in zip(first[name], last[name], strict=True):
            assert np.array_equal(one, two), name
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        assert np.array_equal(np.concatenate(first[name], axis), expected), name


@pytest.mark.parametrize("order", ["tp{degree=4},int4{group=32}", "int4{group=32},tp{degree=4}"])
def test_groups_that_ranks_would_cut_are_refused_before_any_pass(order):
    seen = []

    class Watch:
        def before_pass(self, index, item, model):
            seen.append(item.name)

        after_pass = before_pass

    message = (
        r"groups of 32 do not divide the 48 inputs of model.layers.0.mlp.down_proj.weight that each of 4 ranks holds, "
        r"48 = 1 · 32 \+ 16. Legal: group=32 with tp 2"
    )
    with pytest.raises(UsageError, match=message):
        run_passes(tiny_decoder(SPEC), resolve(order).passes, instruments=[Watch()])
    assert seen == []


def test_weights_that_groups_do_not_fill_are_named_with_what_is_legal():
    with pytest.raises(UsageError, match=r"groups of 64 do not divide the 96 inputs .* Legal: group=32 with tp 2"):
        made("int4{group=64}")
    with pytest.raises(UsageError, match="no group of 128, 64 or 32: quantise to int8 instead"):
        made("int4{group=32}", DecoderSpec(layers=1))


def test_a_quantised_model_knows_which_degrees_are_legal():
    model = made("int4{group=32}")
    with pytest.raises(UsageError, match="degree 4 does not divide 6 units of .*up_proj.* Legal degrees: 2"):
        run_passes(model, resolve("tp{degree=4}").passes)


def test_padded_heads_hold_zeros_in_either_order():
    spec = DecoderSpec(layers=1, heads=3, head_dim=32, hidden=96, intermediate=192)
    first = codes_of(made("int4{group=32},tp{degree=2,pad=true}", spec), 2)
    last = codes_of(made("tp{degree=2,pad=true},int4{group=32}", spec), 2)
    for name, parts in first.items():
        for one, two in zip(parts, last[name], strict=True):
            assert np.array_equal(one, two), name
    o_proj = "model.layers.0.self_attn.o_proj.weight"
    assert not first[f"{o_proj}.codes"][1].astype(np.int8)[:, 32:].any()
    assert (first[f"{o_proj}.scales"][1][:, 1:] == 1).all()
