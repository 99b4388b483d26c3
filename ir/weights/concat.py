"""Define the expression that joins several others along an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lengths import with_length


@dataclasses.dataclass(frozen=True)
class Concat(Expression):
    """The `parts`, joined along the axis `along`."""

    parts: tuple[Expression, ...]
    along: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def text(self) -> str:
        return f"concat({', '.join(part.text() for part in self.parts)}, axis={self.along})"


def concat(parts: Iterable[Expression], axis: int) -> Expression:
    """Join `parts` of one dtype along `axis`; their other axes must agree, else ModelError is raised."""
    parts = tuple(parts)
    if not parts:
        raise ModelError("concat needs at least one part")
    axis = parts[0].axis(axis)
    rests = {(part.dtype, with_length(part.shape, axis, 0)) for part in parts}
    if len(rests) != 1:
        raise ModelError(
            f"concat of {[(part.dtype.name, list(part.shape)) for part in parts]} along axis {axis}: "
            f"the parts must agree in dtype and in all other axes"
        )
    if len(parts) == 1:
        return parts[0]
    length = sum(part.shape[axis] for part in parts)
    return Concat(parts[0].dtype, with_length(parts[0].shape, axis, length), parts, axis)
