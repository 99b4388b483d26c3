"""Models of 4 bits agree with their own codes and are judged by the bar that int4 declares; wrong codes are found."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.serialization.text import parse_model
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of
from passopt.ir.weights.literals import Literal
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.targets.onnxruntime.session import Session
from passopt.testing.decoders import DecoderSpec, tiny_decoder
from passopt.verification.comparisons import NUMPY_TWIN
from passopt.verification.dequantised_twin import dequantised_twin
from passopt.verification.quantised_weights import ON_CODES
from passopt.verification.verify import VerifyOptions, verify

SPEC = DecoderSpec(layers=1, heads=4, head_dim=32, hidden=96, intermediate=192)
TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, 34, 60))
OPTIONS = VerifyOptions(tokens=TOKENS, window=24, stride=12)
DOWN = "model.layers.0.mlp.down_proj.weight"


def quantised(symmetric: bool, passes: str = "") -> onnx_ir.Model:
    model = tiny_decoder(SPEC)
    run_passes(model, resolve(f"{passes}int4{{group=32,symmetric={str(symmetric).lower()}}}").passes)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_of_four_bits_agrees_with_its_own_codes(symmetric: bool) -> None:
    report = verify(tiny_decoder(SPEC), quantised(symmetric), options=OPTIONS)
    assert report.verdict == "ok: lossy as declared (int4)", report.to_text()
    assert any(note.startswith("int4: declared lossy") for note in report.notes)
    for comparison in (NUMPY_TWIN, ON_CODES):
        rows = [row for row in report.rows if row.comparison == comparison and row.output == "logits"]
        assert rows
        assert all(row.error <= row.tolerance <= 1e-4 for row in rows)


def test_ranks_agree_with_the_whole() -> None:
    report = verify(quantised(True), quantised(True, "tp{degree=2},"), options=OPTIONS)
    assert report.ok, report.to_text()
    assert max(row.tolerance for row in report.rows if row.judged) <= 1e-4


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_wrong_codes_are_found(part: str) -> None:
    model = quantised(True)
    value = model.graph.initializers[f"{DOWN}.{part}"]
    with Evaluator() as evaluator:
        numbers = evaluator.array(expression_of(value)).copy()
    if part == "codes":
        numbers[5] = numbers[5, ::-1]
        literal = Literal.of(numbers.astype(np.int8)).cast(DataType.INT4)
    else:
        numbers[5, 2] *= 3
        literal = Literal.of(numbers)
    value.const_value = LazyWeight(literal, value.name)
    report = verify(tiny_decoder(SPEC), model, options=OPTIONS)
    assert not report.ok
    assert any(DOWN in row.output or row.comparison == ON_CODES for row in report.rows if not row.ok), report.to_text()


@pytest.mark.parametrize(
    ("axis", "block", "kind"), [(0, 2, "int4"), (1, 3, "uint4"), (-1, 2, "int8"), (0, 3, "uint8"), (1, 5, "uint8")]
)
def test_the_twin_of_blocks_has_the_numbers_of_onnxruntime(tmp_path, axis: int, block: int, kind: str) -> None:
    random = np.random.default_rng(axis + block)
    dtype = DataType[kind.upper()]
    shape = (6, 6)
    parts = [6, 6]
    parts[axis] = -(-6 // block)
    low, high = (-8, 8) if kind == "int4" else (0, 16)
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g ({kind}[6,6] w, float[{parts[0]},{parts[1]}] s, {kind}[{parts[0]},{parts[1]}] z) => (float[6,6] y)
        {{ y = DequantizeLinear <axis = {axis}, block_size = {block}> (w, s, z) }}""")
    contents = {
        "w": Literal.of(random.integers(low, high, shape).astype(np.int8)).cast(dtype),
        "s": Literal.of(random.random(parts).astype(np.float32)),
        "z": Literal.of(random.integers(low, high, parts).astype(np.int8)).cast(dtype),
    }
    for value in list(model.graph.inputs):
        model.graph.inputs.remove(value)
        value.const_value = LazyWeight(contents[value.name], value.name)
        model.graph.register_initializer(value)
    (expected,) = Session(model).run({}).values()
    (found,) = Session(dequantised_twin(model, tmp_path)).run({}).values()
    assert np.array_equal(found, expected)
