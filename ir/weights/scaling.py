"""Define the expression that multiplies a weight by a vector along an axis, as folding the scales of a norm does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression, Pad, Shard, _Unary


@dataclasses.dataclass(frozen=True)
class ScaleAlong(_Unary):
    """The `operand`, multiplied in fp32 by element i of `vector` at index i of the axis `along`."""

    along: int
    vector: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand, self.vector)

    def text(self) -> str:
        return f"scale({self.operand.text()}, axis={self.along}, {self.vector.text()})"


def scale_along(operand: Expression, axis: int, vector: Expression) -> Expression:
    """Return a vector or matrix times a vector along one of its axes.

    Args:
        operand: What is multiplied, in fp32.
        axis: The axis; a negative one counts from the back.
        vector: As many numbers in fp32 as the axis has.

    Raises:
        ModelError: If dtypes or lengths do not fit.
    """
    axis = operand.axis(axis)
    if {operand.dtype, vector.dtype} != {DataType.FLOAT} or len(operand.shape) not in {1, 2}:
        raise ModelError(
            f"scale_along takes a vector or matrix of fp32 and a vector of fp32, not "
            f"{operand.dtype.name}{list(operand.shape)} and {vector.dtype.name}{list(vector.shape)}"
        )
    if vector.shape != (operand.shape[axis],):
        raise ModelError(
            f"a vector of shape {list(vector.shape)} does not scale axis {axis} of {list(operand.shape)}: "
            f"expected [{operand.shape[axis]}]"
        )
    return ScaleAlong(operand.dtype, operand.shape, operand, axis, vector)


def beneath_shards(operand: Expression, axis: int, change: Callable[[Expression], Expression]) -> Expression:
    """Apply a change that mixes or scales numbers along an axis below the shards and zero padding of other axes.

    So a weight that is changed before it is sharded is the same expression as one that is changed afterwards, and
    quantisation, which looks through shards and padding on the outside only, sees the whole weight.

    Args:
        operand: The weight.
        axis: The axis along which `change` works.
        change: Makes the new weight of the one below; it keeps the shape.

    Raises:
        ModelError: If the weight is sharded or padded along the axis itself.
    """
    if not isinstance(operand, Shard | Pad):
        return change(operand)
    if operand.along == axis or (isinstance(operand, Pad) and operand.value != 0):
        raise ModelError(f"{operand.text()} cannot be changed along axis {axis}, along which it is sharded or padded")
    whole = beneath_shards(operand.operand, axis, change)
    if isinstance(operand, Shard):
        return whole.shard(operand.along, operand.degree, operand.segments)
    return whole.pad(operand.along, operand.shape[operand.along], operand.segments)
