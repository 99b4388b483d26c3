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


#: The groups of inputs for whose codes of 4 bits there are passes and kernels.
GROUPS = (32, 64, 128)


def check_groups(where: Path, scales: Source, bits: int, inputs: int, groups: int) -> None:
    """Raise ModelError unless scales are one per output channel, or codes have 4 bits in groups that are supported.

    Args:
        where: The checkpoint, for the message.
        scales: The scales.
        bits: The bits of a code.
        inputs: The inputs of the linear.
        groups: The number of its groups.
    """
    if groups == 1:
        return
    size = inputs // groups if inputs % groups == 0 else None
    if bits == 4 and size in GROUPS:
        return
    expected = f"groups of {', '.join(map(str, GROUPS))} inputs, or one scale per output channel"
    raise ModelError(
        f"{where}: {scales.name!r} has {groups} groups of {inputs} inputs. Export takes codes of 4 bits in {expected}, "
        f"and codes of 8 bits with one scale per output channel. Quantise the original checkpoint so"
    )


def check_order(where: Path, order: Source, inputs: int, groups: int) -> None:
    """Raise ModelError unless the groups of inputs are consecutive, as DequantizeLinear has them.

    Args:
        where: The checkpoint, for the message.
        order: The group of each input.
        inputs: The inputs of the linear.
        groups: The number of its groups.
    """
    demand(where, order, {DataType.INT32, DataType.INT64}, [(inputs,)], f"there are {inputs} inputs")
    found = read(order)
    if (found == np.arange(inputs) // (inputs // groups)).all():
        return
    if not ((found >= 0) & (found < groups)).all():
        raise ModelError(f"{where}: {order.name!r} names groups {found.min()} to {found.max()}, there are {groups}")
    raise ModelError(
        f"{where}: {order.name!r} gives inputs that are not neighbours to one group: they were grouped by activity "
        f"(desc_act, actorder=group), and DequantizeLinear takes neighbours only. Quantise the original checkpoint "
        f"with static groups (static_groups=true, actorder=static), or without that order"
    )


def in_shape(tensor: Source, *shape: int) -> Source:
    """Return the same bytes of a file as a tensor of another shape with as many elements."""
    return dataclasses.replace(tensor, shape=shape)
