"""A cache in 8 bits is recognised by what the graph computes; anything else that looks like it is not."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.attention.int8_cache import has_int8_cache, int8_caches
from passopt.passes.precision.quantize_cache import QuantizeCache
from passopt.testing.checking import read_model

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch,seq] input_ids, float[batch,4,seq,6] q, float[batch,2,seq,6] k,
         float[batch,2,past,6] "past.0.key", float[batch,2,past,6] "past.0.value")
     => (float[batch,4,seq,6] y, float[batch,2,"past+seq",6] "present.0.key",
         float[batch,2,"past+seq",6] "present.0.value") {
    y, "present.0.key", "present.0.value" = Attention(q, k, k, , "past.0.key", "past.0.value")
}"""


@pytest.fixture
def model():
    found = read_model(TEXT)
    QuantizeCache().run(found)
    return found


def cache_of(model):
    return next(iter(int8_caches(model).values()), None)


def replace_constant(model, name, array):
    value = model.graph.initializers[name]
    value.const_value = onnx_ir.tensor(np.asarray(array, np.float32), name=name)


def test_it_is_found_with_what_it_is_made_of(model):
    cache = cache_of(model)
    assert has_int8_cache(model)
    assert (cache.key.input.name, cache.value.input.name) == ("past.0.key", "past.0.value")
    assert (cache.turn.query.name, cache.turn.key.name, cache.value.rows.name) == ("q", "k", "k")
    assert cache.key.by_largest
    assert cache.value.by_largest
    plain = read_model(TEXT)
    assert not has_int8_cache(plain)
    assert cache_of(plain) is None


def test_matrices_that_change_the_products_are_no_turn(model):
    replace_constant(model, "cache.turn.query", 1.01 * model.graph.initializers["cache.turn.query"].const_value.numpy())
    cache = cache_of(model)
    assert cache.turn is None
    assert cache.key.rows.producer().op_type == "MatMul"


@pytest.mark.parametrize(
    ("name", "number"), [("cache.largest-code", 126), ("cache.one", 2), ("cache.zero", 1), ("cache.largest-code", 128)]
)
def test_other_scales_are_not_by_the_largest(model, name, number):
    replace_constant(model, name, number)
    assert not cache_of(model).key.by_largest


def test_scales_of_other_rows_are_not_by_the_largest(model):
    cache = cache_of(model)
    maker = next(node for node in model.graph if node.op_type == "Abs" and node.inputs[0] is cache.key.rows)
    maker.replace_input_with(0, cache.value.rows)
    assert not cache_of(model).key.by_largest


@pytest.mark.parametrize("op_type", ["QuantizeLinear", "DequantizeLinear"])
def test_blocks_of_less_than_a_row_are_something_else(model, op_type):
    for node in model.graph:
        if node.op_type == op_type:
            node.attributes["block_size"] = onnx_ir.AttrInt64("block_size", 3)
    assert cache_of(model) is None


def test_codes_that_are_read_with_other_scales_are_something_else(model):
    cache = cache_of(model)
    cache.key.stored.producer().replace_input_with(1, cache.value.scales)
    assert cache_of(model) is None
