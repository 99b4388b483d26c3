"""Find an axis of a shape, and change its length."""

from __future__ import annotations

from passopt.ir.errors import ModelError


def axis_of(shape: tuple[int, ...], axis: int) -> int:
    """Return an axis of a shape counted from the front; raise ModelError if the shape has no such axis."""
    if not -len(shape) <= axis < len(shape):
        raise ModelError(f"axis {axis} is outside of shape {list(shape)}")
    return axis % len(shape)


def with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    """Return a shape with another length of one axis."""
    return (*shape[:axis], length, *shape[axis + 1 :])
