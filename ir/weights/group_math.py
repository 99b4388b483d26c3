"""Compute codes of 4 bits, their scales and zero points, and bytes of two codes each, in numpy.

Matrices are [rows, columns]; all computing is done in fp32, as in `row_math`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from passopt.ir.weights.expressions import SCALE_OF_ZEROS, DataType, Expression
from passopt.ir.weights.groups import (
    LARGEST,
    MIDDLE,
    MOST,
    GroupCodes,
    GroupScales,
    GroupZeros,
    Nibbles,
    PackedBytes,
    Unsigned,
    View,
)
from passopt.ir.weights.row_math import Array, scales_of

Box: TypeAlias = "tuple[tuple[int, int], ...]"


class Reading(Protocol):
    """What is needed of the evaluator of boxes, which calls these functions."""

    def read(self, expression: Expression, box: Box, /) -> Array:
        """Return a box of an expression."""

    def array(self, expression: Expression, /) -> Array:
        """Return the whole of an expression."""

    def finite(self, expression: Expression, start: int, stop: int, /) -> Array:
        """Return rows of floats, none of which is infinite or NaN."""

    def full_rows(self, expression: Expression, box: Box, rows: Callable[[int, int], Array], /) -> Array:
        """Return a box of what is computed from whole rows."""


#: The bytes of copies per element of a row while codes are computed.
SCRATCH_BYTES = 24


def symmetric_scales(rows: Array, group: int, dtype: DataType) -> Array:
    """Return absmax/7 of every group of finite fp32 rows, [rows, groups] in `dtype`."""
    peaks = np.abs(_grouped(rows, group)).max(axis=2, initial=0)
    return scales_of(peaks.reshape(-1), dtype, LARGEST).reshape(peaks.shape)


def symmetric_codes(rows: Array, scales: Array) -> Array:
    """Return round-half-even(rows / scales) within ±7 as int8, with scales [rows, groups]."""
    codes = np.rint(_grouped(rows, rows.shape[1] // scales.shape[1]) / scales.astype(np.float32)[:, :, None])
    return np.clip(codes, -LARGEST, LARGEST).astype(np.int8).reshape(rows.shape)


def ranges(rows: Array, group: int, dtype: DataType) -> tuple[Array, Array]:
    """Return the scales in `dtype` and the zero points (uint8) of codes 0 to 15 that reach all of each group, and 0."""
    parts = _grouped(rows, group)
    least = parts.min(axis=2, initial=0)
    extent = parts.max(axis=2, initial=0) - least
    scales = (extent / np.float32(MOST)).astype(dtype.numpy())
    scales[scales == 0] = SCALE_OF_ZEROS
    zeros = np.clip(np.rint(-least / scales.astype(np.float32)), 0, MOST).astype(np.uint8)
    return scales, zeros


def codes_in_ranges(rows: Array, scales: Array, zeros: Array) -> Array:
    """Return round-half-even(rows / scales) + zeros within 0 and 15 as uint8, with both [rows, groups]."""
    codes = np.rint(_grouped(rows, rows.shape[1] // scales.shape[1]) / scales.astype(np.float32)[:, :, None])
    found: Array = np.clip(codes + zeros[:, :, None], 0, MOST).astype(np.uint8)
    return found.reshape(rows.shape)


def group_values(core: Expression, rows: Array) -> Array:
    """Return what a group expression makes of finite fp32 rows of its operand."""
    assert isinstance(core, (GroupCodes, GroupScales, GroupZeros)), type(core)
    dtype = core.operand.dtype
    if isinstance(core, GroupZeros) or not core.symmetric:
        scales, zeros = ranges(rows, core.group, dtype)
        if isinstance(core, GroupCodes):
            return codes_in_ranges(rows, scales, zeros)
        return scales if isinstance(core, GroupScales) else zeros
    scales = symmetric_scales(rows, core.group, dtype)
    return scales if isinstance(core, GroupScales) else symmetric_codes(rows, scales)


def joined_codes(codes: Array, distance: int) -> Array:
    """Return the bytes [rows, columns/2] of codes [rows, columns], as `groups.Nibbles` says."""
    low, high = np.moveaxis(_bits(codes).reshape(len(codes), -1, 2, distance), 2, 0)
    found: Array = low | high << 4
    return found.reshape(len(codes), -1)


def separate_codes(data: Array, dtype: DataType) -> Array:
    """Return the codes [rows, 2 · bytes] of bytes [rows, bytes] as ONNX packs them, in a dtype of 4 bits."""
    both = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=both[..., 0])
    np.right_shift(data, 4, out=both[..., 1])
    if dtype == DataType.INT4:
        signed = ((both ^ MIDDLE).astype(np.int8) - MIDDLE).astype(dtype.numpy())
        return signed.reshape(len(data), -1)
    return both.reshape(len(data), -1).astype(dtype.numpy())


def unsigned_codes(codes: Array) -> Array:
    """Return signed codes with 8 added, as uint8."""
    return (codes.astype(np.int8) + MIDDLE).astype(np.uint8)


def _bits(codes: Array) -> Array:
    """Return the four bits of each code as uint8; those of a negative one are its complement."""
    bits: Array = codes.astype(np.int8).view(np.uint8) & 15
    return bits


def _grouped(rows: Array, group: int) -> Array:
    return rows.reshape(len(rows), -1, group)


# How the evaluator of boxes reads the expressions.


def read_groups(at: Reading, core: Any, box: Box) -> Array:
    """Return a box of codes, scales or zero points."""
    return at.full_rows(core, box, lambda start, stop: group_values(core, at.finite(core.operand, start, stop)))


def read_unsigned(at: Reading, core: Unsigned, box: Box) -> Array:
    """Return a box of unsigned codes."""
    return unsigned_codes(at.read(core.operand, box))


def read_nibbles(at: Reading, core: Nibbles, box: Box) -> Array:
    """Return a box of bytes of two codes."""
    width = core.operand.shape[1]

    def rows(start: int, stop: int) -> Array:
        return joined_codes(at.read(core.operand, ((start, stop), (0, width))), core.distance)

    return at.full_rows(core, box, rows)


def read_packed_bytes(at: Reading, core: PackedBytes, box: Box) -> Array:
    """Return a range of the bytes of a tensor of 4 bits."""
    codes = _bits(at.array(core.operand)).reshape(-1)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(0))
    found: Array = joined_codes(codes[None], 1)[0]
    return found[slice(*box[0])]


def read_view(at: Reading, core: View, box: Box) -> Array:
    """Return a box of a tensor in another shape."""
    whole = at.array(core.operand).reshape(core.shape)
    return whole[tuple(slice(*bounds) for bounds in box)]


READERS: Mapping[type, Callable[[Any, Any, Box], Array]] = {
    GroupCodes: read_groups,
    GroupScales: read_groups,
    GroupZeros: read_groups,
    Unsigned: read_unsigned,
    Nibbles: read_nibbles,
    PackedBytes: read_packed_bytes,
    View: read_view,
}
