"""Round a weight to codes one column after the other, each error made good by the columns that come later (GPTQ).

Every row is rounded by itself, with scales that are fixed before, so codes stay one scale per output channel (or per
group of its inputs) and a shard of rows has the codes of the whole. (Frantar et al., GPTQ, 2022; to round columns by
falling activity, with scales in the original order, is called static act order)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.inverse_factor import InverseFactor
from passopt.calibration.tiles import TileRunner, tiles

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: Rounds the columns of a block, which lie as rows: (weights [b, n], scales [b, n], U [b, b], largest code, errors
#: [b, n], codes [b, n]).
BlockRounder: TypeAlias = Callable[[Array, Array, Array, int, Array, Array], None]

#: The columns that are rounded before the next ones get the errors of all earlier ones by one product, and the rows of
#: a task.
_BLOCK, _ROWS = 128, 512


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which the columns of a weight are rounded.

    Attributes:
        columns: The columns in that order, [k].
        place: The place of each column in it, [k].
    """

    columns: Array
    place: Array

    @classmethod
    def of(cls, diagonal: Array, *, by_activity: bool) -> Order:
        """Return the order by falling activity (the Hessian's diagonal, [k]), or the one of the weight."""
        count = len(diagonal)
        columns = np.argsort(-diagonal, kind="stable") if by_activity else np.arange(count)
        place = np.empty(count, np.int64)
        place[columns] = np.arange(count)
        return cls(columns, place)


def round_weight(
    weight: Array, scales: Array, factor: InverseFactor, order: Order, largest: int, runner: TileRunner
) -> Array:
    """Return codes [n, k] as int8 for a weight, of which the array is used up.

    Args:
        weight: The weight [n, k] in fp32, with columns in the order of the factor.
        scales: A positive scale per row and group of columns of the weight as it is stored, [n, groups] in fp32.
        factor: The factor of the inverse Hessian, with columns in `order`.
        order: The order of the columns.
        largest: The largest magnitude of a code: 127 for int8, 7 for int4.
        runner: Runs the rows.
    """
    count = weight.shape[1]
    codes = np.empty(weight.shape, np.int8)
    group_of = order.columns // (count // scales.shape[1])
    rounder = block_rounder()

    def task(rows: slice) -> None:
        errors = weight[rows]  # what was rounded makes room for its errors, which are all that later columns need
        found = np.empty(errors.shape, np.int8)
        for start in range(0, count, _BLOCK):
            block = slice(start, min(start + _BLOCK, count))
            part = np.ascontiguousarray((errors[:, block] - errors[:, :start] @ factor.upper[:start, block]).T)
            steps = np.ascontiguousarray(scales[rows][:, group_of[block]].T)
            corner = np.ascontiguousarray(factor.upper[block, block])
            made, rounded = np.empty_like(part), np.empty(part.shape, np.int8)
            rounder(part, steps, corner, largest, made, rounded)
            errors[:, block], found[:, block] = made.T, rounded.T
        codes[rows] = found[:, order.place]

    runner.run(functools.partial(task, rows) for rows in tiles(len(weight), _ROWS))
    return codes


@functools.lru_cache(maxsize=1)
def block_rounder() -> BlockRounder:
    """Return the compiled loop over the columns of a block, or that of numpy where numba is missing; bits are equal."""
    try:
        from passopt.calibration.codes_numba import round_block
    except (ImportError, RuntimeError):
        return round_block_by_numpy
    return round_block


def round_block_by_numpy(weight: Array, scales: Array, upper: Array, largest: int, errors: Array, codes: Array) -> None:
    """Round the columns of a block one by one; `weight` is changed, `errors` and `codes` are written."""
    for column in range(len(weight)):
        value, scale = weight[column], scales[column]
        code = np.clip(np.rint(value / scale), -largest, largest)
        codes[column] = code
        error = (value - code * scale) / upper[column, column]
        errors[column] = error
        weight[column + 1 :] -= upper[column, column + 1 :, None] * error
