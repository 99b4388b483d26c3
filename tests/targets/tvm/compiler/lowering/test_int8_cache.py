"""Attention over a cache in 8 bits is lowered in place, with what it turns and quantises; anything else is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from passopt.ir.errors import ModelError
from passopt.passes.precision.quantize_cache import QuantizeCache
from passopt.targets.tvm.compiler.lowering.graph import lower
from passopt.targets.tvm.machines import find_cpu
from passopt.testing.checking import read_model

pytest.importorskip("tvm")

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
model (int64[batch,seq] input_ids, int64[batch,"past+seq"] attention_mask,
       float[batch,2,past,6] "past.0.key", float[batch,2,past,6] "past.0.value")
   => (float[batch,seq,7] logits, float[batch,2,"past+seq",6] "present.0.key",
       float[batch,2,"past+seq",6] "present.0.value")
<float[13,24] table = random, float[24,24] wq = random, float[24,12] wk = random, float[24,7] head = random,
 int64[4] four = {0, 0, 4, 6}, int64[4] two = {0, 0, 2, 6}, int64[3] join = {0, 0, 24}, float zero = {0},
 float low = {-1e30}, int64[2] axes = {1, 2}> {
   x = Gather (table, input_ids)
   q0 = MatMul (x, wq)
   q1 = Reshape (q0, four)
   q = Transpose <perm = [0, 2, 1, 3]> (q1)
   k0 = MatMul (x, wk)
   k1 = Reshape (k0, two)
   k = Transpose <perm = [0, 2, 1, 3]> (k1)
   seen = Cast <to = 9> (attention_mask)
   bias = Where (seen, zero, low)
   mask = Unsqueeze (bias, axes)
   y, "present.0.key", "present.0.value" = Attention <is_causal = 1> (q, k, k, mask, "past.0.key", "past.0.value")
   t = Transpose <perm = [0, 2, 1, 3]> (y)
   j = Reshape (t, join)
   logits = MatMul (j, head)
}"""


def quantised(keys="channel"):
    model = read_model(TEXT)
    QuantizeCache(keys=keys).run(model)
    return model


@pytest.mark.parametrize("keys", ["channel", "token"])
def test_codes_and_scales_are_arguments(keys):
    lowered = lower(quantised(keys), find_cpu())
    assert lowered.in_place
    assert lowered.inputs == ("input_ids", "attention_mask")
    main = next(body for name, body in lowered.module.functions.items() if name.name_hint == "main")
    caches = [item.ty for item in main.params if item.name.startswith("cache_")]
    assert [str(item.dtype) for item in caches] == ["int8", "int8", "float32", "float32"]
    names = {name.name_hint for name in lowered.module.functions}
    assert "append_cache_2_6_int8" in names
    assert ("turn_rows_4_6" in names) == (keys == "channel")
    assert {"wq.packed", "wk.packed", "head.packed"} <= {item.name for item in lowered.parameters}
    assert not lowered.imported


@pytest.mark.parametrize("allow_fallback", [False, True])
def test_rows_with_other_scales_are_refused(allow_fallback):
    """A library would store other codes than the graph."""
    model = quantised()
    value = model.graph.initializers["cache.largest-code"]
    value.const_value = onnx_ir.tensor(np.array(100, np.float32), name=value.name)
    with pytest.raises(ModelError, match="rows of its cache are not scaled by their largest magnitude / 127"):
        lower(model, find_cpu(), allow_fallback=allow_fallback)


def test_a_matrix_that_changes_the_products_is_refused():
    model = quantised()
    value = model.graph.initializers["cache.turn.key"]
    value.const_value = onnx_ir.tensor(2 * value.const_value.numpy(), name=value.name)
    with pytest.raises(ModelError, match="MatMul"):
        lower(model, find_cpu())


def test_a_present_of_other_codes_is_refused():
    model = quantised()
    output = next(value for value in model.graph.outputs if value.name == "present.0.key")
    node = output.producer()
    node.replace_input_with(1, node.inputs[0])
    with pytest.raises(ModelError, match=r"reads past\.0\.key"):
        lower(model, find_cpu())
