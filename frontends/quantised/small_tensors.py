"""Read the small tensors of quantised checkpoints, zero points and orders, and check shapes by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression, Source

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def read(tensor: Expression) -> Array:
    """Return the values of a small tensor."""
    with Evaluator() as evaluator:
        return evaluator.array(tensor)


def demand(
    where: Path, tensor: Source, dtypes: Collection[DataType], shapes: Collection[tuple[int, ...]] | int, why: str
) -> None:
    """Raise ModelError unless a tensor has one of the dtypes, and one of the shapes or so many axes.

    Args:
        where: The checkpoint, for the message.
        tensor: The tensor.
        dtypes: The dtypes that it may have.
        shapes: The shapes that it may have, or the number of its axes.
        why: What expects it so.
    """
    fits = len(tensor.shape) == shapes if isinstance(shapes, int) else tensor.shape in shapes
    if tensor.dtype in dtypes and fits:
        return
    kinds = " or ".join(sorted(dtype.name for dtype in dtypes))
    form = f"a matrix of {kinds}" if isinstance(shapes, int) else f"{kinds} {' or '.join(map(str, map(list, shapes)))}"
    raise ModelError(f"{where}: {tensor.name!r} is {tensor.dtype.name}{list(tensor.shape)}, expected {form}, as {why}")


def in_shape(tensor: Source, *shape: int) -> Source:
    """Return the same bytes of a file as a tensor of another shape with as many elements."""
    return dataclasses.replace(tensor, shape=shape)
