"""Named pipelines on whole decoders written by hand: steps that resolve, a second run that finds nothing."""

from __future__ import annotations

import collections

import pytest

from passopt.ir.errors import ExpectationError
from passopt.ir.graph.decoder import layer_count
from passopt.ir.serialization.text import parse_model, print_model
from passopt.passes.pipeline.expectations import parse_expectation
from passopt.passes.pipeline.named import PIPELINES
from passopt.passes.pipeline.runner import run_passes
from passopt.passes.pipeline.text import resolve
from passopt.testing.checking import compare_numbers
from passopt.testing.decoders import DecoderSpec, tiny_decoder


def expectations(name):
    resolved = resolve(name)
    return resolved, [
        parse_expectation(text, [item.name for item in resolved.passes]) for text in PIPELINES[name].expectations
    ]


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_steps_and_expectations_resolve(name):
    resolved, found = expectations(name)
    assert resolved.passes
    assert {item.name for item in found} <= {item.name for item in resolved.passes}


@pytest.mark.parametrize("heads", [3, 5])
def test_fuse_takes_attention_of_every_layer(heads):
    model = tiny_decoder(DecoderSpec(heads=heads, layers=2))
    original = model.clone()
    resolved, wanted = expectations("fuse")
    run_passes(model, resolved.passes, expectations=wanted)
    kinds = collections.Counter(node.op_type for node in model.graph)
    assert kinds["Attention"] + kinds["AlibiAttention"] == 2
    assert kinds["Softmax"] == 0
    compare_numbers(original, model, 1e-5, {}, {})
    text = print_model(model)
    run_passes(model, resolved.passes, expectations=wanted)
    assert print_model(model) == text


def test_an_unmet_expectation_fails():
    text = 'g (int64[b,s] input_ids, float[b,2,p,4] "past.0.key") => (float[b,s] y) { y = Cast<to=1>(input_ids) }'
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    resolved, wanted = expectations("fuse")
    with pytest.raises(ExpectationError, match="expected fuse-attention>=decoder_attentions .that is 1."):
        run_passes(model, resolved.passes, expectations=wanted)


def named(*weights):
    constants = ", ".join(f'float[1] "{name}" = {{1}}' for name in weights)
    return parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[1] x) => (float[1] y) <{constants}> {{ y = Neg(x) }}'
    )


@pytest.mark.parametrize(
    ("weights", "layers"),
    [
        (("model.layers.0.a", "model.layers.0.b", "model.layers.11.a"), 2),
        (("transformer.h.0.w", "transformer.h.1.w", "transformer.h.2.w"), 3),
        (("transformer.blocks.4.w", "head"), 1),
        (("model.sublayers.0.w", "path.0.w", "layers.w"), None),
    ],
)
def test_layers_are_counted_by_weights_without_a_cache(weights, layers):
    assert layer_count(named(*weights)) == layers


def test_layers_are_counted_by_the_cache_first():
    assert layer_count(tiny_decoder(DecoderSpec(layers=3))) == 3


@pytest.mark.parametrize(("inputs", "wanted"), [("", 0), (", int64[1] position_ids", 4)])
def test_rotary_layers_are_those_of_a_model_with_positions(inputs, wanted):
    text = f'g (float[1] x{inputs}) => (float[1] y) <float[1] "layers.0.a" = {{1}}, float[1] "layers.1.a" = {{1}}>'
    model = parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text} {{ y = Neg(x) }}')
    assert parse_expectation("mine==2*rotary_layers", ["mine"]).wanted(model) == wanted
