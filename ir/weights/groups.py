"""Describe codes of 4 bits whose scales belong to groups of inputs, and how two codes lie in a byte.

A matrix is always [out, in], and a group is `group` neighbouring inputs of one row. As for codes of 8 bits, a shard or
a zero padding of a weight has the codes of the whole weight: `quantize_groups` is built below them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import (
    SCALE_OF_ZEROS,
    Cast,
    DataType,
    Expression,
    Pad,
    Shard,
    Slice,
    Transpose,
    _Unary,
)
from passopt.ir.weights.lengths import with_length

#: Symmetric codes lie within ±LARGEST; others within 0 and MOST.
LARGEST, MOST = 7, 15
#: What is added to a signed code of 4 bits to make it unsigned: its zero point then.
MIDDLE = 8
FOUR_BITS = frozenset({DataType.INT4, DataType.UINT4})
_CODES = FOUR_BITS | {DataType.INT8, DataType.UINT8}


@dataclasses.dataclass(frozen=True)
class GroupCodes(_Unary):
    """The codes of the rows of `operand`, a byte each: int8 within ±7 if `symmetric`, else uint8 up to 15."""

    group: int
    symmetric: bool

    def text(self) -> str:
        return f"group_codes({self.operand.text()}, group={self.group}, symmetric={self.symmetric})"


@dataclasses.dataclass(frozen=True)
class GroupScales(_Unary):
    """The scales [rows, groups] of `operand`: absmax/7 of a group if `symmetric`, else (largest - least)/15."""

    group: int
    symmetric: bool

    def text(self) -> str:
        return f"group_scales({self.operand.text()}, group={self.group}, symmetric={self.symmetric})"


@dataclasses.dataclass(frozen=True)
class GroupZeros(_Unary):
    """The zero points [rows, groups] of codes of `operand` that are not symmetric, as uint8."""

    group: int

    def text(self) -> str:
        return f"group_zeros({self.operand.text()}, group={self.group})"


@dataclasses.dataclass(frozen=True)
class Unsigned(_Unary):
    """The signed codes of 4 bits of `operand`, with 8 added, as uint8."""

    def text(self) -> str:
        return f"unsigned({self.operand.text()})"


@dataclasses.dataclass(frozen=True)
class Nibbles(_Unary):
    """The codes of the rows of `operand`, two in a byte: uint8 [rows, columns/2].

    Of every 2 · `distance` codes, the first half lies in the low bits of `distance` bytes, the second in the high ones.
    A distance of 1 is how ONNX packs tensors of 4 bits.
    """

    distance: int

    def text(self) -> str:
        return f"nibbles({self.operand.text()}, distance={self.distance})"


@dataclasses.dataclass(frozen=True)
class PackedBytes(_Unary):
    """The bytes in which ONNX packs a tensor of 4 bits of any shape: the first of two codes in the low bits."""

    def text(self) -> str:
        return f"packed_bytes({self.operand.text()})"


@dataclasses.dataclass(frozen=True)
class View(_Unary):
    """The elements of `operand` in their order, in another shape."""

    def text(self) -> str:
        return f"view({self.operand.text()}, {list(self.shape)})"


def quantize_groups(weight: Expression, group: int, *, symmetric: bool = True) -> tuple[Expression, ...]:
    """Return the codes of a weight, a byte each, their scales, and zero points if they are not symmetric.

    Scales are computed from the full weight, even if this is a shard of it.

    Args:
        weight: The weight [out, in].
        group: The inputs that share a scale.
        symmetric: Leave zero points out.

    Raises:
        ModelError: If this is not a matrix of floats, or a group would not be full, or be shared by two ranks.
    """
    weight._check_matrix("quantize_groups")
    if isinstance(weight, (Shard, Pad)) and getattr(weight, "value", 0) == 0:
        return _outside(weight, quantize_groups(weight.operand, group, symmetric=symmetric), group)
    rows, columns = weight.shape
    if group < 1 or columns % group:
        raise ModelError(f"groups of {group} do not fill the {columns} inputs of {list(weight.shape)}")
    counts = (rows, columns // group)
    kind = DataType.INT8 if symmetric else DataType.UINT8
    codes = GroupCodes(kind, weight.shape, weight, group, symmetric)
    scales = GroupScales(weight.dtype, counts, weight, group, symmetric)
    return (codes, scales) if symmetric else (codes, scales, GroupZeros(DataType.UINT8, counts, weight, group))


def _outside(placement: Shard | Pad, parts: Sequence[Expression], group: int) -> tuple[Expression, ...]:
    """Return a shard or a padding of codes [out, in], and of scales and zero points [out, groups]."""
    return tuple(
        placed(placement, part, group if index and placement.along == 1 else 1, SCALE_OF_ZEROS if index == 1 else 0.0)
        for index, part in enumerate(parts)
    )


def placed(placement: Shard | Pad | Slice, part: Expression, group: int, filler: float = 0.0) -> Expression:
    """Return a shard, padding or slice of a tensor, as of another whose axis is `group` times as long.

    Args:
        placement: What is done with the other tensor.
        part: The tensor.
        group: How many elements of the other an element of this one stands for, along the axis of the placement.
        filler: What a padding holds.

    Raises:
        ModelError: If that would cut an element.
    """
    axis, length = placement.along, placement.shape[placement.along]
    if isinstance(placement, Slice):
        if placement.start % group or length % group:
            raise ModelError(f"a slice of {length} inputs from {placement.start} on cuts groups of {group}")
        return part.slice(axis, placement.start // group, (placement.start + length) // group)
    segments = placement.segments
    if length % (group * segments) or part.shape[axis] % segments:
        what = f"the {length} inputs of a rank" if isinstance(placement, Shard) else f"{length} padded inputs"
        raise ModelError(f"groups of {group} do not divide {what} in {segments} segments")
    if isinstance(placement, Shard):
        return part.shard(axis, placement.degree, segments)
    return part.pad(axis, length // group, segments, filler)


def nibbles(codes: Expression, distance: int = 1) -> Expression:
    """Return codes of 4 bits of a matrix, two in a byte.

    Shards, slices and zero padding of whole bytes are repeated outside, so that the bytes of a row are computed once.

    Args:
        codes: Codes in a dtype of 4 bits, or in one byte each.
        distance: How many codes apart the two of a byte are.

    Raises:
        ModelError: If these are no such codes, or do not fill whole bytes.
    """
    if len(codes.shape) != 2 or codes.dtype not in _CODES or codes.shape[1] % (2 * distance):
        raise ModelError(f"cannot pack {codes.dtype.name}{list(codes.shape)} into bytes of two codes {distance} apart")
    if isinstance(codes, Cast) and codes.operand.dtype in _CODES:
        return nibbles(codes.operand, distance)
    if isinstance(codes, (Shard, Slice)) or (isinstance(codes, Pad) and codes.value == 0):
        per_byte, whole = (2, 2 * distance) if codes.along == 1 else (1, 1)
        pieces = getattr(codes, "segments", 1)
        lengths = (codes.operand.shape[codes.along], codes.shape[codes.along], getattr(codes, "start", 0) * pieces)
        if not any(length % (whole * pieces) for length in lengths):
            return placed(codes, nibbles(codes.operand, distance), per_byte)
    shape = with_length(codes.shape, 1, codes.shape[1] // 2)
    return Nibbles(DataType.UINT8, shape, codes, distance)


def packed_bytes(codes: Expression) -> Expression:
    """Return the bytes of a tensor of 4 bits as ONNX packs them, in a shape of their own."""
    if len(codes.shape) == 2 and codes.shape[1] % 2 == 0:
        return nibbles(codes)
    return PackedBytes(DataType.UINT8, (codes.nbytes,), codes)


def unsigned(codes: Expression) -> Expression:
    """Return codes as uint8 up to 15; signed ones have 8 added to them."""
    if codes.dtype in {DataType.UINT8, DataType.UINT4}:
        inner = codes.operand if isinstance(codes, Cast) and codes.operand.dtype in _CODES else codes
        return inner.cast(DataType.UINT8)
    if isinstance(codes, Cast) and codes.operand.dtype == DataType.INT8:
        return unsigned(codes.operand)
    if isinstance(codes, (Shard, Slice, Transpose)):
        inner = unsigned(codes.operand)
        return dataclasses.replace(codes, dtype=DataType.UINT8, operand=inner)
    return Unsigned(DataType.UINT8, codes.shape, codes)


def view(weight: Expression, shape: Sequence[int]) -> Expression:
    """Return the elements of a tensor in another shape of as many."""
    found = View(weight.dtype, tuple(shape), weight)
    if found.nbytes != weight.nbytes:
        raise ModelError(f"{weight.dtype.name}{list(weight.shape)} has no view of the shape {list(shape)}")
    return weight if found.shape == weight.shape else found
