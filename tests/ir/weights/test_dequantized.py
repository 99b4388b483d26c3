"""Codes that others made: in 32-bit words, as floats, and under all that passes do to a weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from passopt.ir.errors import ModelError
from passopt.ir.weights.concat import concat
from passopt.ir.weights.dequantized import dequantized, own_codes, own_groups
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.literals import Literal
from passopt.ir.weights.packed_codes import pack_codes, unpack_codes
from passopt.ir.weights.sources import safetensors_sources
from passopt.ir.weights.streaming.write_weights import write_safetensors
from passopt.testing.quantised_checkpoints import words_of

RNG = np.random.default_rng(18)
CODES = RNG.integers(-128, 128, (6, 16)).astype(np.int8)
SCALES = RNG.uniform(1e-3, 1e-2, 6).astype(np.float16)


def values(expression: Expression, rank: int = 0) -> Any:
    with Evaluator(rank) as evaluator:
        return evaluator.array(expression)


def weight(along: int = 0) -> Any:
    codes = Literal.of(CODES)
    return dequantized(codes if along == 0 else codes.transpose(), Literal.of(SCALES), along)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_first_code_in_their_lowest_bits(bits: int) -> None:
    offset, count = 1 << (bits - 1), 32 // bits
    codes = np.clip(CODES, -offset, offset - 1)
    words = np.zeros((6, 16 // count), np.uint32)
    for index in range(16):
        words[:, index // count] |= (codes[:, index].astype(np.int64) + offset).astype(np.uint32) << (
            bits * (index % count)
        )
    packed = pack_codes(Literal.of(codes), bits)
    np.testing.assert_array_equal(values(packed), words.view(np.int32))
    unpacked = unpack_codes(Literal.of(words.view(np.int32)), bits)
    np.testing.assert_array_equal(values(unpacked), codes)
    np.testing.assert_array_equal(values(unpacked.slice(0, 1, 5).slice(1, 3, 14)), codes[1:5, 3:14])


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_a_file_are_streamed_in_both_layouts(tmp_path: Path, bits: int) -> None:
    words = RNG.integers(-(2**31), 2**31, (24, 10)).astype(np.int32)
    save_file({"rows": words, "turned": np.ascontiguousarray(words.T)}, tmp_path / "in.safetensors")
    found = safetensors_sources(tmp_path / "in.safetensors")
    rows, turned = unpack_codes(found["rows"], bits), unpack_codes(found["turned"].transpose(), bits)
    weights = {
        "rows": rows,
        "turned": turned,
        "shard": turned.shard(0, 2).shard(1, 4),
        "packed": turned.pack(5, 4),
        "padded": unpack_codes(found["rows"].pad(0, 30), bits),
        "words": pack_codes(rows, bits),
        "turned-words": pack_codes(turned, bits).transpose(),
        "floats": dequantized(turned, Literal.of(np.linspace(1e-3, 1e-2, 24, dtype=np.float16))),
    }
    write_safetensors(tmp_path / "out.safetensors", weights, rank=1)
    out = safetensors_sources(tmp_path / "out.safetensors")
    for name, expression in weights.items():
        np.testing.assert_array_equal(values(out[name]), values(expression, 1), err_msg=name)
    np.testing.assert_array_equal(values(out["words"]), words)
    np.testing.assert_array_equal(values(out["turned-words"]), words.T)


def test_a_weight_is_code_times_scale_in_the_dtype_of_the_scales() -> None:
    expected = CODES.astype(np.float16) * SCALES[:, None]
    np.testing.assert_array_equal(values(weight()), expected)
    np.testing.assert_array_equal(values(weight(1)), expected.T)
    wide = weight().computed_in(DataType.FLOAT)
    np.testing.assert_array_equal(values(wide), CODES.astype(np.float32) * SCALES.astype(np.float32)[:, None])


def test_all_that_passes_do_to_a_weight_is_done_to_its_codes() -> None:
    cases = [
        (weight().transpose(), 1),
        (weight(1).transpose(), 0),
        (weight().shard(0, 2).transpose(), 1),
        (weight().shard(1, 4), 0),
        (weight().pad(0, 8, 2).shard(0, 2, 2), 0),
        (weight().pad(1, 20), 0),
        (weight().slice(0, 1, 4).slice(1, 3, 9), 0),
        (weight().cast(DataType.FLOAT).slice(0, 2, 6), 0),
        (concat([weight().slice(0, 2, 6), weight().slice(0, 0, 1)], 0), 0),
    ]
    for case, axis in cases:
        found = own_codes(case, axis)
        assert found is not None
        codes, scales = values(found[0], 1), values(found[1], 1)
        assert scales.dtype == case.dtype.numpy()
        made = codes.astype(np.float32) * np.expand_dims(scales.astype(np.float32), 1 - axis)
        np.testing.assert_array_equal(made.astype(np.float16), values(case, 1).astype(np.float16), err_msg=case.text())


def grouped() -> Any:
    scales = RNG.uniform(1e-3, 1e-2, (6, 4)).astype(np.float16)
    return dequantized(Literal.of(np.clip(CODES, -8, 7)), Literal.of(scales))


def test_all_that_passes_do_to_a_weight_in_groups_is_done_to_its_codes() -> None:
    weight = grouped()
    assert weight.group == 4
    for case in [
        weight,
        weight.shard(0, 2),
        weight.shard(1, 2),
        weight.shard(1, 2, 2),
        weight.transpose().shard(0, 4).transpose(),
        weight.pad(0, 8, 2).shard(0, 2, 2),
        weight.pad(1, 24).shard(1, 3),
        weight.slice(0, 1, 4).slice(1, 4, 12),
        weight.cast(DataType.FLOAT).slice(0, 2, 6),
    ]:
        found = own_groups(case, 4)
        assert found is not None, case.text()
        codes, scales = values(found[0], 1), values(found[1], 1)
        made = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 4, axis=1)
        np.testing.assert_array_equal(made.astype(np.float16), values(case, 1).astype(np.float16), err_msg=case.text())
    assert own_groups(weight, 8) is None
    assert own_groups(weight.transpose(), 4) is None
    assert own_codes(weight, 0) is None
    with pytest.raises(ModelError, match="cuts groups of 4"):
        own_groups(weight.slice(1, 2, 10), 4)


def test_other_weights_have_no_codes_of_their_own() -> None:
    plain = Literal.of(RNG.normal(size=(6, 16)).astype(np.float16))
    for case, axis in [
        (plain, 0),
        (weight(), 1),
        (weight().pad(0, 8, 1, 2.5), 0),
        (weight().normalize_rows(1e-6), 0),
        (concat([weight(), plain], 0), 0),
        (concat([weight(), weight()], 1), 0),
    ]:
        assert own_codes(case, axis) is None, case.text()


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = Literal.of(CODES), Literal.of(SCALES)
    for make, message in [
        (lambda: dequantized(codes, scales, 1), "16 codes with|expected 16"),
        (lambda: dequantized(scales, scales), "no axis|int8 matrix"),
        (lambda: dequantized(codes, Literal.of(SCALES[:, None].repeat(5, 1))), "scales of groups of columns"),
        (lambda: dequantized(codes, codes), "scales of floats"),
        (lambda: unpack_codes(codes, 8), "int32 matrix"),
        (lambda: unpack_codes(Literal.of(CODES.astype(np.int32)), 3), "codes of 3 bits"),
        (lambda: pack_codes(codes.slice(1, 0, 6), 8), "rows that 4 divides"),
    ]:
        with pytest.raises(ModelError, match=message):
            make()


def test_codes_of_four_bits_in_a_file_are_packed_and_cut(tmp_path: Path) -> None:
    """A model of 4 bits that was written before: two codes lie in a byte of its file."""
    codes = RNG.integers(-8, 8, (24, 16)).astype(np.int8)
    save_file({"c": words_of(codes, 4).view(np.uint8) ^ 0x88}, tmp_path / "in.safetensors")
    held = safetensors_sources(tmp_path / "in.safetensors")["c"]
    source = dataclasses.replace(held, dtype=DataType.INT4, shape=(24, 16))
    np.testing.assert_array_equal(values(source).astype(np.int8), codes)
    weights = {
        "words": pack_codes(source.cast(DataType.INT8), 4),
        "bytes": source.cast(DataType.INT8).shard(0, 2),
        "turned": source.cast(DataType.INT8).transpose(),
        "nibbles": source.shard(0, 2),
    }
    write_safetensors(tmp_path / "out.safetensors", weights, rank=1)
    out = {name: values(found) for name, found in safetensors_sources(tmp_path / "out.safetensors").items()}
    np.testing.assert_array_equal(out["words"], words_of(codes, 4))
    np.testing.assert_array_equal(out["bytes"], codes[12:])
    np.testing.assert_array_equal(out["turned"], codes.T)
    np.testing.assert_array_equal(out["nibbles"].reshape(12, 8), words_of(codes[12:], 4).view(np.uint8) ^ 0x88)
