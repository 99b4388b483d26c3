"""Define weights that were quantised elsewhere: a float matrix that is given by its codes and scales.

Scales belong to the indexes of an axis, or to groups of inputs of a weight [out, in]. A pass reads such a weight as any
other. One that quantises it asks for `own_codes` or `own_groups` first, so that nothing is rounded twice.
"""

from __future__ import annotations

import dataclasses

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.weights.concat import Concat, concat
from passopt.ir.weights.expressions import SCALE_OF_ZEROS, Cast, DataType, Expression, Pad, Shard, Slice, Transpose
from passopt.ir.weights.groups import placed


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
    found = _mapped(weight, axis)
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
    found = _mapped_groups(weight, 0, group)
    return None if found is None else (found[0], found[1].cast(weight.dtype))


def _mapped_groups(weight: Expression, axis: int, group: int) -> tuple[Expression, Expression] | None:
    """Return codes in the layout of a weight, whose output channels are an axis of it, and scales [out, groups]."""
    if isinstance(weight, Dequantized):
        return (weight.codes, weight.scales) if (axis, weight.group) == (0, group) else None
    if not isinstance(weight, (Shard, Pad, Slice, Transpose, Cast)):
        return None
    inner = weight.permutation[axis] if isinstance(weight, Transpose) else axis
    found = _mapped_groups(weight.operand, inner, group)
    if found is None or (isinstance(weight, Pad) and weight.value != 0):
        return None
    codes, scales = found
    if isinstance(weight, Transpose):
        return codes.transpose(weight.permutation), scales
    if isinstance(weight, Cast):
        return codes, scales
    # Scales are always [out, groups], so their axis differs from that of codes stored as [in, out].
    along = 0 if weight.along == axis else 1
    cut = dataclasses.replace(weight, along=along, shape=weight.shape if axis == 0 else weight.shape[::-1])
    return placed(weight, codes, 1), placed(cut, scales, group if along else 1, SCALE_OF_ZEROS)


def _mapped(weight: Expression, axis: int) -> tuple[Expression, Expression] | None:
    if isinstance(weight, Dequantized):
        return (weight.codes, weight.scales) if weight.along == axis and not weight.group else None
    if isinstance(weight, Concat):
        return _joined(weight, axis)
    if not isinstance(weight, (Shard, Pad, Slice, Transpose, Cast)):
        return None
    inner = weight.permutation[axis] if isinstance(weight, Transpose) else axis
    found = _mapped(weight.operand, inner)
    if found is None or (isinstance(weight, Pad) and weight.value != 0):
        return None
    codes, scales = found
    if isinstance(weight, Transpose):
        return codes.transpose(weight.permutation), scales
    if isinstance(weight, Cast):
        return codes, scales
    along, is_scaled, length = weight.along, weight.along == axis, weight.shape[weight.along]
    if isinstance(weight, Shard):
        cut = (weight.degree, weight.segments)
        return codes.shard(along, *cut), scales.shard(0, *cut) if is_scaled else scales
    if isinstance(weight, Pad):
        padded = scales.pad(0, length, weight.segments, SCALE_OF_ZEROS) if is_scaled else scales
        return codes.pad(along, length, weight.segments), padded
    stop = weight.start + length
    return codes.slice(along, weight.start, stop), scales.slice(0, weight.start, stop) if is_scaled else scales


def _joined(weight: Concat, axis: int) -> tuple[Expression, Expression] | None:
    """Return codes and scales of weights that are joined along the axis of their scales, all of which have some."""
    found = [_mapped(part, axis) for part in weight.parts]
    pairs = [pair for pair in found if pair is not None]
    if weight.along != axis or len(pairs) < len(found) or len({scales.dtype for _, scales in pairs}) > 1:
        return None
    return concat([codes for codes, _ in pairs], axis), concat([scales for _, scales in pairs], 0)
