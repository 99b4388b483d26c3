"""quantize-cache, step by step against the unrewritten graph in onnxruntime, and against the formula in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from passopt.ir.attention.int8_cache import has_int8_cache, int8_caches
from passopt.ir.errors import PassError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.graph.verifier import verify_model
from passopt.ir.serialization.text import print_model
from passopt.passes.pipeline.text import resolve
from passopt.passes.precision.quantize_cache import QuantizeCache, turning_matrices
from passopt.passes.sharding.shard import Shard
from passopt.targets.onnxruntime.joined_ranks import join_ranks, rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.testing.checking import check_onnx, read_model
from passopt.testing.decoders import tiny_decoder
from passopt.verification.dequantised_twin import without_int8_cache

#: 4 query heads over 2 kv heads of width 6, and weights at which attention is far from uniform.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch,seq] input_ids, int64[batch,"past+seq"] attention_mask,
         float[batch,2,past,6] "past.0.key", float[batch,2,past,6] "past.0.value")
     => (float[batch,seq,7] logits, float[batch,2,"past+seq",6] "present.0.key",
         float[batch,2,"past+seq",6] "present.0.value")
<float[13,10] table = random, float[10,24] wq = random, float[10,12] wk = random, float[10,12] wv = random,
 float[24,7] wo = random, int64[4] four = {0, 0, 4, 6}, int64[4] two = {0, 0, 2, 6}, int64[3] flat = {0, 0, 24},
 int64[1] zero = {0}, int64[2] axes = {1, 2}, float lowest = {-10000.0}, float nothing = {0.0}> {
    x = Gather(table, input_ids)
    q0 = MatMul(x, wq)
    q1 = Reshape(q0, four)
    q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k0 = MatMul(x, wk)
    k1 = Reshape(k0, two)
    k = Transpose<perm = [0, 2, 1, 3]>(k1)
    v0 = MatMul(x, wv)
    v1 = Reshape(v0, two)
    v = Transpose<perm = [0, 2, 1, 3]>(v1)
    past = Shape<start = 2, end = 3>("past.0.key")
    first = Squeeze(past)
    last = Shape<start = 1, end = 2>(attention_mask)
    end = Squeeze(last)
    step = Constant<value_int = 1>()
    rows = Range(first, end, step)
    origin = Constant<value_int = 0>()
    columns = Range(origin, end, step)
    row = Unsqueeze(rows, one)
    one = Constant<value_ints = [1]>()
    causal = GreaterOrEqual(row, columns)
    shown = Cast<to = 9>(attention_mask)
    seen = Unsqueeze(shown, axes)
    visible = And(causal, seen)
    mask = Where(visible, nothing, lowest)
    y, "present.0.key", "present.0.value" = Attention<scale = 0.4>(q, k, v, mask, "past.0.key", "past.0.value")
    y0 = Transpose<perm = [0, 2, 1, 3]>(y)
    y1 = Reshape(y0, flat)
    logits = MatMul(y1, wo)
}"""
TEXT = TEXT.replace(
    "    row = Unsqueeze(rows, one)\n    one = Constant<value_ints = [1]>()\n",
    "    one = Constant<value_ints = [1]>()\n    row = Unsqueeze(rows, one)\n",
)
#: One kv head for all query heads, with ALiBi.
ALIBI = (
    TEXT.replace('["" : 23]', '["" : 23, "passopt" : 1]')
    .replace("[batch,2,", "[batch,1,")
    .replace("float[10,12]", "float[10,6]")
    .replace("{0, 0, 2, 6}", "{0, 0, 1, 6}")
    .replace("float nothing", "float[4,1,1] slopes = {0.5, 0.25, 0.125, 0.0625}, float nothing")
    .replace(
        'Attention<scale = 0.4>(q, k, v, mask, "past.0.key"',
        'passopt.AlibiAttention<scale = 0.4>(q, k, v, slopes, places, mask, "past.0.key"',
    )
    .replace("    causal =", "    floats = Cast<to = 1>(columns)\n    places = Unsqueeze(floats, zero)\n    causal =")
)
KINDS = pytest.mark.parametrize("text", [TEXT, ALIBI], ids=["grouped", "alibi over one head"])
KEYS = pytest.mark.parametrize("keys", ["channel", "token"])


def decoder(text=TEXT):
    model = read_model(text)
    if "AlibiAttention" in text:
        from passopt.ir.graph.functions import local_function

        function = local_function("AlibiAttention", 23)
        model.functions[function.identifier()] = function
    return model


def quantised(model, keys="channel"):
    changed = model.clone()
    result = QuantizeCache(keys=keys).run(changed)
    verify_model(changed)
    assert result.modified
    again = print_model(changed)
    assert not QuantizeCache(keys=keys).run(changed).modified
    assert print_model(changed) == again
    check_onnx(changed)
    return changed


def run(model, chunks, padding=(0, 0)):
    """Logits and cache of two sequences that run in chunks, the first from an empty past."""
    session, seen, start = Session(model), [], 0
    ids = np.random.default_rng(4).integers(0, 13, (2, sum(chunks)))
    mask = np.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    cache = {
        value.name: np.zeros([2, value.shape[1], 0, value.shape[3]], value.dtype.numpy())
        for value in model.graph.inputs
        if value.name.startswith("past.")
    }
    for length in chunks:
        stop = start + length
        outputs = session.run({"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **cache})
        seen.append(outputs.pop("logits"))
        cache = {name.replace("present.", "past."): array for name, array in outputs.items()}
        start = stop
    return np.concatenate(seen, axis=1), cache


def check_same(codes, others):
    """Rows may differ where a kernel sums in another order: scales by roundings, and codes where a half turns over."""
    for name, array in codes.items():
        if array.dtype == np.int8:
            apart = np.abs(array.astype(int) - others[name])
            assert apart.max() <= 1
            assert apart.mean() < 0.01
        else:
            np.testing.assert_allclose(others[name], array, rtol=1e-5)


def error(expected, found):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_keys_and_values_become_codes(golden):
    golden(print_model(quantised(decoder(), "token")))


@KINDS
@KEYS
def test_numbers_are_those_of_the_unrewritten_graph_within_eight_bits(text, keys):
    model = decoder(text)
    changed = quantised(model, keys)
    for chunks, padding in [((1,), (0, 0)), ((7,), (0, 0)), ((7, 1, 1), (0, 3)), ((1, 1, 1, 4), (1, 0))]:
        (expected, cache), (found, codes) = run(model, chunks, padding), run(changed, chunks, padding)
        begin = max(padding)
        assert error(expected[:, begin:], found[:, begin:]) < 1e-2
        values = codes["past.0.value"] * codes["past.0.value.scales"]
        assert error(cache["past.0.value"], values) <= 0.51 / 127
        assert codes["past.0.key"].dtype == codes["past.0.value"].dtype == np.int8
        assert sum(array.nbytes for name, array in codes.items() if name.endswith(("key", "value"))) * 4 == sum(
            array.nbytes for array in cache.values()
        )


@KINDS
@KEYS
def test_rows_do_not_depend_on_chunks_or_padding(text, keys):
    """The same codes: nothing that is stored is quantised again, and each row stands alone."""
    changed = quantised(decoder(text), keys)
    whole, codes = run(changed, (9,), (0, 4))
    for chunks in [(1,) * 9, (4, 5), (8, 1)]:
        logits, others = run(changed, chunks, (0, 4))
        assert error(whole[:, 4:], logits[:, 4:]) < 3e-3
        check_same(codes, others)


def test_codes_are_those_of_the_formula():
    """Of random keys, some of them of very unlike scale, and one row of zeros."""
    model = decoder()
    _, cache = run(model, (7,))
    _, codes = run(quantised(model, "token"), (7,))
    for name in ("past.0.key", "past.0.value"):
        rows = cache[name]
        scales = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(127)
        check_same({name: np.rint(rows / scales).astype(np.int8), f"{name}.scales": scales}, codes)


def test_a_row_of_zeros_has_scale_one():
    model = decoder()
    model.graph.initializers["wk"].const_value = onnx_ir.tensor(np.zeros((10, 12), np.float32), name="wk")
    found, codes = run(quantised(model), (3, 1))
    assert np.isfinite(found).all()
    assert (codes["past.0.key.scales"] == 1).all()
    assert not codes["past.0.key"].any()


@pytest.mark.parametrize("width", [1, 5, 6, 12, 64, 80, 128])
def test_turned_queries_and_keys_have_the_same_products(width):
    query, key = turning_matrices(width)
    np.testing.assert_allclose(query @ key.T, np.eye(width), rtol=0, atol=1e-12)
    for matrix in (query, key):
        largest, mean = np.abs(matrix).max(), np.sqrt(np.mean(matrix**2))
        assert largest <= 1.5 * mean  # every channel gets a share of every other
        if width & (width - 1) == 0:
            np.testing.assert_array_equal(matrix, matrix.astype(ml_dtypes.bfloat16))


def test_channels_that_stand_out_cost_the_others_nothing():
    """One channel of the keys is 40 times the others, in all positions; queries look at the others."""
    model = decoder()
    weight = np.array(model.graph.initializers["wk"].const_value.numpy())
    weight[:, ::6] *= 40
    model.graph.initializers["wk"].const_value = onnx_ir.tensor(weight, name="wk")
    query = np.array(model.graph.initializers["wq"].const_value.numpy())
    query[:, ::6] /= 40
    model.graph.initializers["wq"].const_value = onnx_ir.tensor(query, name="wq")
    expected, _ = run(model, (9, 1))
    token, channel = (error(expected, run(quantised(model, keys), (9, 1))[0]) for keys in ("token", "channel"))
    assert channel < 0.5 * token


@KEYS
@pytest.mark.parametrize("dtype", [onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16])
def test_scales_of_16_bits(keys, dtype):
    model = decoder()
    resolve(f"cast{{dtype={'fp16' if dtype == onnx_ir.DataType.FLOAT16 else 'bf16'}}}").passes[0].run(model)
    changed = quantised(model, keys)
    assert {value.dtype for value in changed.graph.inputs if value.name.endswith(".scales")} == {dtype}
    if dtype == onnx_ir.DataType.BFLOAT16:
        model, changed = fp32_twin(model), fp32_twin(changed)
    assert error(run(model, (7, 1))[0].astype(np.float32), run(changed, (7, 1))[0].astype(np.float32)) < 2e-2


@KEYS
@pytest.mark.parametrize("order", ["before", "after"])
def test_ranks_hold_the_codes_of_their_heads(keys, order):
    model = decoder()
    whole, codes = run(quantised(model, keys), (5, 1), (0, 2))
    steps = [QuantizeCache(keys=keys), Shard(2, pad=True)]
    for item in steps if order == "before" else steps[::-1]:
        item.run(model)
    joined = join_ranks(rank_models(model))
    logits, others = run(joined, (5, 1), (0, 2))
    assert error(whole, logits) < 3e-3
    check_same(codes, others)
    assert len(int8_caches(joined)) == 2


@KINDS
@KEYS
def test_without_it_the_graph_computes_what_it_did(text, keys):
    model = decoder(text)
    plain = without_int8_cache(quantised(model, keys))
    verify_model(plain)
    assert not has_int8_cache(plain)
    assert [value.name for value in plain.graph.inputs] == [value.name for value in model.graph.inputs]
    for one, other in zip(run(model, (5, 1)), run(plain, (5, 1)), strict=True):
        np.testing.assert_equal(other, one)


def test_decoding_is_what_has_a_cache():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (int64[batch,seq] input_ids) => (float[batch,seq,7] logits) <float[13,7] table = random> {
        logits = Gather(table, input_ids)
    }"""
    with pytest.raises(PassError, match=r"expected a decoder with input_ids and past\.N\.key/value .* found input_ids"):
        QuantizeCache().run(read_model(text))


def refused(model):
    before = print_model(model)
    with pytest.raises(PassError) as caught:
        QuantizeCache().run(model)
    assert print_model(model) == before
    return str(caught.value)


def test_declines_old_opsets():
    model = decoder()
    model.graph.opset_imports[""] = 20
    assert "a scale per row needs opset 21, this model has 20. Run legalize{opset=23} first" in refused(model)


def test_declines_attention_that_is_not_fused():
    model = tiny_decoder()
    assert "expected one fused attention that reads past.0.key, found Concat" in refused(model)


def test_declines_a_present_that_the_graph_reads():
    text = TEXT.replace(
        "logits = MatMul(y1, wo)",
        'logits0 = MatMul(y1, wo)\n a = ReduceMax("present.0.key")\n    logits = Add(logits0, a)',
    )
    assert "reads present.0.key, which is to hold codes" in refused(decoder(text))


def test_declines_a_past_that_others_read():
    text = TEXT.replace(
        "logits = MatMul(y1, wo)",
        'logits0 = MatMul(y1, wo)\n a = ReduceSum("past.0.key")\n    logits = Add(logits0, a)',
    )
    assert "expected one fused attention that reads past.0.key, found Attention" in refused(decoder(text))


def test_declines_another_name_of_the_present():
    text = TEXT.replace("present.0.key", "grown.0.key")
    assert "to give present.0.key, found grown.0.key" in refused(decoder(text))


def test_declines_keys_and_values_of_different_layers():
    text = TEXT.replace('mask, "past.0.key", "past.0.value")', 'mask, "past.0.key", other)').replace(
        "    y, ", '    other = Identity("past.0.value")\n    y, '
    )
    assert "reads past.0.key, but not past.0.value as its past values" in refused(decoder(text))


def test_declines_values_that_are_no_floats_of_models():
    text = TEXT.replace('float[batch,2,past,6] "past', 'double[batch,2,past,6] "past')
    text = text.replace('float[batch,2,"past+seq",6]', 'double[batch,2,"past+seq",6]').replace("    y, ", CASTS)
    text = text.replace("(q, k, v, mask, ", "(qd, kd, vd, wide, ").replace("wo)", "wo)").replace("(y1, wo)", "(y2, wo)")
    text = text.replace("    logits", "    y2 = Cast<to = 1>(y1)\n    logits")
    assert "past.0.key is DOUBLE, new rows DOUBLE: expected one float" in refused(decoder(text))


CASTS = """    qd = Cast<to = 11>(q)
    kd = Cast<to = 11>(k)
    vd = Cast<to = 11>(v)
    wide = Cast<to = 11>(mask)
    y, """
