"""verify on a cache in 8 bits: judged by predictions, tightly in all else; a cache that is read wrongly is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir
import pytest

from passopt.ir.attention.int8_cache import int8_caches
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_cache import QuantizeCache
from passopt.testing.decoders import tiny_decoder
from passopt.verification.original_on_codes import WITH_NUMBERS
from passopt.verification.own_codes import OWN_CACHE
from passopt.verification.quantised_weights import ON_CODES
from passopt.verification.sampling.cache_inputs import cache_inputs, present_numbers
from passopt.verification.verify import VerifyOptions, verify

TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, 34, 100))
WHOLE = VerifyOptions(tokens=TOKENS, window=24, stride=12)


@pytest.fixture(scope="module")
def fused() -> onnx_ir.Model:
    return changed(tiny_decoder(), "fuse")


def changed(model: onnx_ir.Model, passes: str) -> onnx_ir.Model:
    copy = model.clone()
    for item in resolve(passes).passes:
        item.run(copy)
    return copy


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_it_is_lossy_as_declared(fused, keys, layerwise):
    candidate = changed(fused, f"int8-cache{{keys={keys}}}")
    report = verify(fused, candidate, options=dataclasses.replace(WHOLE, layerwise=layerwise))
    assert report.verdict == "ok: lossy as declared (int8 cache)", report.to_text()
    cache = [row for row in report.rows if row.output.startswith("present.")]
    original = [row.error for row in cache if row.comparison != WITH_NUMBERS]
    assert 1e-4 < max(original) < 2e-2  # also the keys, which are turned back before they are compared
    if not layerwise:
        assert {row.error for row in report.rows if row.comparison == WITH_NUMBERS} == {0.0}
        own = [row for row in report.rows if row.comparison == OWN_CACHE]
        assert len(own) == 3
        assert max(row.error for row in own) < 1e-4


@pytest.mark.parametrize(
    "passes", ["int8,int8-cache", "int8{activations=dynamic},int8-cache", "int8-cache,tp{degree=2,pad=true}"]
)
def test_with_int8_weights_and_ranks(fused, passes):
    report = verify(fused, changed(fused, passes), options=WHOLE)
    assert report.ok, report.to_text()
    assert any(row.comparison == OWN_CACHE for row in report.rows)
    assert any(row.comparison in (ON_CODES, WITH_NUMBERS) for row in report.rows)


def test_both_with_codes(fused):
    """Ranks against the unsplit model, both with a cache of codes."""
    report = verify(changed(fused, "int8-cache"), changed(fused, "tp{degree=2,pad=true},int8-cache"), options=WHOLE)
    assert report.verdict == "ok: lossy as declared (int8 cache)"
    assert max(row.error for row in report.rows if row.output == "logits") < 1e-5


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_in_16_bits(fused, dtype):
    model = changed(fused, f"cast{{dtype={dtype}}}")
    report = verify(model, changed(model, "int8-cache"), options=WHOLE)
    assert report.verdict == "ok: lossy as declared (int8 cache)", report.to_text()


def part_of(model, which="key"):
    return getattr(next(iter(int8_caches(model).values())), which)


def use_other_scales(model):
    """Read the past of one layer with the scales of its values instead of its keys."""
    node = part_of(model).past.producer()
    node.replace_input_with(1, part_of(model, "value").past_scales)


def forget_scales(model):
    """Hand on the scales of new rows before those of the past."""
    output = next(value for value in model.graph.outputs if value.name == "present.0.value.scales")
    node = output.producer()
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def scale_up(model):
    """Clip rows to 3 codes of 127, as scales that are far too large do."""
    maker = part_of(model).codes.producer()
    (scale,) = [value for value in model.graph.initializers.values() if value.name == "cache.largest-code"]
    scale.const_value = onnx_ir.tensor(np.array(3, np.float32), name=scale.name)
    assert maker.op_type == "QuantizeLinear"


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("fault", [use_other_scales, forget_scales, scale_up])
def test_a_fault_is_found(fused, fault, layerwise):
    """Predictions of a text, which read no cache back, show none but the last of these faults."""
    candidate = changed(fused, "int8-cache")
    fault(candidate)
    report = verify(fused, candidate, options=dataclasses.replace(WHOLE, layerwise=layerwise))
    assert not report.ok
    if fault is not scale_up and not layerwise:
        assert {row.comparison for row in report.rows if not row.ok} == {OWN_CACHE}


def test_a_wrong_weight_is_found_although_the_cache_is_lossy(fused):
    candidate = changed(fused, "int8-cache")
    name, weight = next((n, v) for n, v in candidate.graph.initializers.items() if n.endswith("up_proj.weight"))
    array = weight.const_value.numpy().copy()
    array[0, 0] += 1e-2
    weight.const_value = onnx_ir.tensor(array, name=name)
    report = verify(fused, candidate, options=WHOLE)
    assert any(row.comparison == WITH_NUMBERS for row in report.rows if not row.ok)


def test_what_is_fed_comes_back_as_numbers(fused):
    candidate = changed(fused, "int8-cache")
    numbers = np.random.default_rng(0).standard_normal((2, 3, 5, 4), np.float32)
    for cache in cache_inputs(candidate):
        fed = {name.replace("past.", "present."): array for name, array in cache.feeds(numbers).items()}
        found = present_numbers([cache], fed)[cache.present]
        assert np.abs(found - numbers).max() < 0.02 * np.abs(numbers).max()
        assert {array.dtype.name for array in fed.values()} == {"int8", "float32"}


def test_a_second_run_finds_nothing(fused):
    candidate = changed(fused, "int8-cache")
    assert not QuantizeCache().run(candidate).modified


def test_predictions_after_a_cache_of_random_numbers_do_not_count(fused):
    """No model has put these numbers there; they are shown, and compared tightly with a cache of numbers."""
    options = VerifyOptions(lengths=(1, 7))
    reports = [verify(fused, changed(fused, passes), options=options) for passes in ("int8-cache", "int8")]
    counts = [next(int(row.note.split()[0]) for row in found.rows if row.output == "KL mean") for found in reports]
    assert counts[0] == counts[1] - 4
    late = [row for row in reports[0].rows if row.scenario.startswith("near the end")]
    assert {row.comparison for row in late if row.judged} == {WITH_NUMBERS}
