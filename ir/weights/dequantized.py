"""Define weights that were quantised elsewhere: codes in 32-bit words, and a float matrix of codes and scales.

Scales belong to the indexes of an axis, or to groups of inputs of a weight [out, in]. A pass reads such a weight as any
other. One that quantises it asks for `own_codes` or `own_groups` first, so that nothing is rounded twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.weights.concat import Concat, concat
from passopt.ir.weights.expressions import SCALE_OF_ZEROS, Cast, DataType, Expression, Pad, Shard, Slice, Transpose
from passopt.ir.weights.groups import placed

#: Returns the codes and scales of a weight, whose output channels are an axis of it, or None.
Known: TypeAlias = Callable[[Expression, int], "tuple[Expression, Expression] | None"]

_WORD = 32
#: The numbers of bits of a code of which a word holds a whole number, without codes that cross bytes.
CODE_BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class _Along(Expression):
    """An operation on each row of a matrix; `bits` are those of a code."""

    operand: Expression
    bits: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)


@dataclasses.dataclass(frozen=True)
class UnpackCodes(_Along):
    """The codes in the words of each row of `operand`, lowest bits first, less 2^(bits − 1), as int8."""

    def text(self) -> str:
        return f"unpack_codes({self.operand.text()}, bits={self.bits})"


@dataclasses.dataclass(frozen=True)
class PackCodes(_Along):
    """The codes of each row of `operand`, plus 2^(bits − 1), in words of int32, lowest bits first."""

    def text(self) -> str:
        return f"pack_codes({self.operand.text()}, bits={self.bits})"


def codes_per_word(bits: int) -> int:
    """Return how many codes a word holds; raise ModelError unless codes are of 4 or 8 bits."""
    if bits not in CODE_BITS:
        raise ModelError(f"codes of {bits} bits, expected one of {', '.join(map(str, CODE_BITS))}")
    return _WORD // bits


def unpack_codes(words: Expression, bits: int) -> Expression:
    """Return the codes [n, k] in a matrix of words [n, k · bits / 32].

    Args:
        words: The words, int32; the lowest bits are the first code.
        bits: The bits of a code; it is stored plus 2^(bits − 1).

    Raises:
        ModelError: If this is no matrix of int32, or codes are not of 4 or 8 bits.
    """
    if len(words.shape) != 2 or words.dtype != DataType.INT32:
        raise ModelError(f"codes lie in an int32 matrix, not in {words.dtype.name}{list(words.shape)}")
    rows, columns = words.shape
    return UnpackCodes(DataType.INT8, (rows, columns * codes_per_word(bits)), words, bits)


def pack_codes(codes: Expression, bits: int) -> Expression:
    """Return the codes [n, k] as words [n, k · bits / 32].

    Args:
        codes: The codes, int8, of which each fits the bits.
        bits: The bits of a code; it is stored plus 2^(bits − 1), the first in the lowest bits.

    Raises:
        ModelError: If this is no matrix of int8 whose rows fill words, or codes are not of 4 or 8 bits.
    """
    per_word = codes_per_word(bits)
    if len(codes.shape) != 2 or codes.dtype != DataType.INT8 or codes.shape[1] % per_word:
        raise ModelError(
            f"codes are packed from an int8 matrix of rows that {per_word} divides, not from "
            f"{codes.dtype.name}{list(codes.shape)}"
        )
    return PackCodes(DataType.INT32, (codes.shape[0], codes.shape[1] // per_word), codes, bits)


@dataclasses.dataclass(frozen=True)
class Dequantized(Expression):
    """The int8 `codes`, each times its scale, rounded to the scales' dtype.

    That is the scale of its index of the axis `along`; or, where `scales` are [rows, groups], of its group of columns.
    """

    codes: Expression
    scales: Expression
    along: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.codes, self.scales)

    @property
    def group(self) -> int:
        """Return how many columns share a scale; 0 where all of them do."""
        return 0 if len(self.scales.shape) == 1 else self.shape[1] // self.scales.shape[1]

    def text(self) -> str:
        return f"dequantized({self.codes.text()}, {self.scales.text()}, axis={self.along})"

    def computed_in(self, dtype: DataType) -> Expression:
        """Return the weight as a graph of another dtype computes it: its scales are rounded, and not the products."""
        return dequantized(self.codes, self.scales.cast(dtype), self.along)


def dequantized(codes: Expression, scales: Expression, axis: int = 0) -> Dequantized:
    """Return the float matrix of int8 codes with a scale per index of an axis.

    Args:
        codes: The codes, an int8 matrix.
        scales: The scales, floats; [rows, groups] for scales of groups of columns.
        axis: The axis of which every index has its own scale, or its own groups.

    Raises:
        ModelError: If codes and scales do not fit together.
    """
    axis = codes.axis(axis)
    if len(codes.shape) != 2 or codes.dtype != DataType.INT8 or scales.dtype not in FLOATS:
        raise ModelError(
            f"an int8 matrix is dequantised by scales of floats, not {codes.dtype.name}{list(codes.shape)} by "
            f"{scales.dtype.name}"
        )
    if len(scales.shape) == 2:
        rows, groups = scales.shape
        if axis or rows != codes.shape[0] or not groups or codes.shape[1] % groups:
            raise ModelError(f"{list(codes.shape)} codes with {list(scales.shape)} scales of groups of columns")
    elif scales.shape != (codes.shape[axis],):
        raise ModelError(f"{list(codes.shape)} codes with {list(scales.shape)} scales, expected {codes.shape[axis]}")
    return Dequantized(scales.dtype, codes.shape, codes, scales, axis)


def own_codes(weight: Expression, axis: int) -> tuple[Expression, Expression] | None:
    """Return the codes that a weight was made of, and a scale per index of an axis in the weight's dtype.

    Shards, zero padding, slices, transpositions, casts and joins of such weights have those of their codes.

    Args:
        weight: The weight.
        axis: The axis of which every index is to have a scale.

    Returns:
        Codes and scales, or None if the weight was not quantised, or along another axis.
    """
    found = mapped_codes(weight, axis, 0, lambda part, along: _own(part, along, 0))
    return None if found is None else (found[0], found[1].cast(weight.dtype))


def own_groups(weight: Expression, group: int) -> tuple[Expression, Expression] | None:
    """Return the codes that a weight [out, in] was made of, and scales [out, groups] in the weight's dtype.

    Shards, zero padding, slices, transpositions and casts of such weights have those of their codes.

    Args:
        weight: The weight.
        group: How many inputs share a scale.

    Returns:
        Codes and scales, or None if the weight was not quantised in such groups.

    Raises:
        ModelError: If a shard, a slice or a padding cuts a group.
    """
    found = mapped_codes(weight, 0, group, lambda part, along: _own(part, along, group))
    return None if found is None else (found[0], found[1].cast(weight.dtype))


def mapped_codes(weight: Expression, axis: int, group: int, known: Known) -> tuple[Expression, Expression] | None:
    """Return codes in the layout of a weight, and its scales, from those of the weight that it was made of.

    Shards, zero padding, slices, transpositions and casts of a weight become those of its codes and scales, and so do
    weights that are joined along their output channels.

    Args:
        weight: The weight.
        axis: The axis of its output channels.
        group: How many inputs share a scale, which then are [out, groups]; 0 for one scale per output channel, [out].
        known: A function that returns the codes and scales of a weight with output channels along an axis, or None if
            it knows none.

    Returns:
        Codes and scales, or None if nothing is known of what the weight was made of.

    Raises:
        ModelError: If a shard, a slice or a padding cuts a group.
    """
    found = known(weight, axis)
    if found is not None:
        return found
    if isinstance(weight, Concat) and not group:
        return _joined(weight, axis, known)
    if not isinstance(weight, (Shard, Pad, Slice, Transpose, Cast)):
        return None
    inner = weight.permutation[axis] if isinstance(weight, Transpose) else axis
    found = mapped_codes(weight.operand, inner, group, known)
    if found is None or (isinstance(weight, Pad) and weight.value != 0):
        return None
    codes, scales = found
    if isinstance(weight, Transpose):
        return codes.transpose(weight.permutation), scales
    if isinstance(weight, Cast):
        return codes, scales
    # Scales are always [out] or [out, groups], so their axis differs from that of codes stored as [in, out].
    is_of_channels, codes = weight.along == axis, placed(weight, codes, 1)
    if not is_of_channels and not group:
        return codes, scales
    shape = weight.shape if axis == 0 else weight.shape[::-1]
    cut = dataclasses.replace(weight, along=0 if is_of_channels else 1, shape=shape)
    return codes, placed(cut, scales, 1 if is_of_channels else group, SCALE_OF_ZEROS)


def _joined(weight: Concat, axis: int, known: Known) -> tuple[Expression, Expression] | None:
    """Return codes and scales of weights that are joined along the axis of their scales, all of which have some."""
    found = [mapped_codes(part, axis, 0, known) for part in weight.parts]
    pairs = [pair for pair in found if pair is not None]
    if weight.along != axis or len(pairs) < len(found) or len({scales.dtype for _, scales in pairs}) > 1:
        return None
    return concat([codes for codes, _ in pairs], axis), concat([scales for _, scales in pairs], 0)


def _own(weight: Expression, axis: int, group: int) -> tuple[Expression, Expression] | None:
    """Return the codes and scales that a weight was made of, along an axis and in groups."""
    is_asked = isinstance(weight, Dequantized) and (weight.along, weight.group) == (axis, group)
    return (weight.codes, weight.scales) if is_asked else None  # type: ignore[attr-defined]
