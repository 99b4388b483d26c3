"""fuse-matmul-nbits: numbers in onnxruntime's own kernel, and the way back by decompose-contrib."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.relative_error import operator_error
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.decomposition.contrib.decompose_contrib import DecomposeContrib
from passopt.passes.fusion.fuse_matmul_nbits import FuseMatMulNBits
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_groups import QuantizeGroups
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check, random_feeds, read_model
from passopt.testing.decoders import DecoderSpec, tiny_decoder
from passopt.verification.comparisons import NUMPY_TWIN

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,96] x) => (float[batch,5] y) <float[5,96] w = random>
{ t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""


def quantised(text: str = TEXT, **options: object) -> onnx_ir.Model:
    model = read_model(text)
    QuantizeGroups(group=32, **options).run(model)
    return model


def numbers(model: onnx_ir.Model) -> np.ndarray:
    """The numbers of the only weight."""
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    with Evaluator() as evaluator:
        codes, scales, *zeros = (evaluator.array(expression_of(value)).astype(np.float32) for value in node.inputs)
    zero = np.repeat(zeros[0], 32, 1) if zeros else 0
    return (codes - zero) * np.repeat(scales, 32, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime_computes_the_same(symmetric: bool):
    """Three groups, so that a row of zero points ends within a byte."""
    model = quantised(symmetric=symmetric)
    fused, _ = check(FuseMatMulNBits(), model, matches=1)
    assert [node.op_type for node in fused.graph] == ["MatMulNBits"]
    feeds = random_feeds(model, {})
    assert operator_error(Session(model).run(feeds)["y"], Session(fused).run(feeds)["y"]) <= 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_way_back_has_the_same_numbers(symmetric: bool):
    text = TEXT.replace("96", "128")  # decompose-contrib takes zero points that fill whole bytes
    model = quantised(text, symmetric=symmetric)
    fused, _ = check(FuseMatMulNBits(), model, matches=1)
    again = stored_anew(fused)
    DecomposeContrib().run(again)
    assert np.array_equal(numbers(again), numbers(model))
    feeds = random_feeds(model, {})
    assert np.array_equal(Session(again).run(feeds)["y"], Session(model).run(feeds)["y"])


def stored_anew(model: onnx_ir.Model) -> onnx_ir.Model:
    """The model with its weights as constants, as after it was written and read."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        with Evaluator() as evaluator:
            array = evaluator.array(expression_of(value))
        value.const_value = onnx_ir.tensor(array, name=value.name)
    return copy


def test_golden(check_pass):
    check_pass(FuseMatMulNBits(), quantised(symmetric=False), matches=1)


def test_weights_that_linears_share_are_packed_once():
    text = TEXT.replace("y = MatMul(x, t)", "u = MatMul(x, t) v = Neg(x) r = MatMul(v, t) y = Sub(u, r)")
    fused, _ = check(FuseMatMulNBits(), quantised(text), matches=2)
    assert sorted(fused.graph.initializers) == ["w.codes.nbits", "w.scales"]


def test_shards_have_the_numbers_of_the_whole(tmp_path):
    import passopt

    spec = DecoderSpec(layers=1, heads=4, head_dim=32, hidden=96, intermediate=192)
    passes = "int4{group=32},tp{degree=2},fuse-matmul-nbits"
    passopt.run(tiny_decoder(spec), passes, tmp_path / "ranks")
    whole = tiny_decoder(spec)
    run_passes(whole, resolve("int4{group=32}").passes)
    assert passopt.verify(whole, tmp_path / "ranks").ok


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_verification_knows_it_as_four_bits(tmp_path, symmetric: str):
    import passopt

    spec = DecoderSpec(layers=1, heads=4, head_dim=32, hidden=128, intermediate=192)  # whole bytes of zero points
    passopt.run(tiny_decoder(spec), f"int4{{group=32,symmetric={symmetric}}},fuse-matmul-nbits", tmp_path / "out")
    report = passopt.verify(tiny_decoder(spec), tmp_path / "out")
    assert report.verdict == "ok: lossy as declared (int4)", report.to_text()
    assert any(row.comparison == NUMPY_TWIN for row in report.rows)


def test_declines_what_the_operator_does_not_take():
    model = quantised()
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    model.graph.initializers["w.codes"].dtype = onnx_ir.DataType.INT8
    _, result = FuseMatMulNBits(), FuseMatMulNBits().run(model)
    assert list(result.declines) == ["w.codes holds INT8 without zero points, expected int4"]
    model = quantised()
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    node.attributes["block_size"] = onnx_ir.AttrInt64("block_size", 48)
    result = FuseMatMulNBits().run(model)
    assert list(result.declines) == ["w.codes has groups of 48, expected a power of two from 16 on"]
