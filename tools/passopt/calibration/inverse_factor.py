"""Factor the inverse of a Hessian, H⁻¹ = Uᵀ U with U upper triangular, without a second factorisation that could fail.

H = V Vᵀ with V upper triangular, and U = V⁻¹. Both steps work in place on the upper triangle, tile by tile. The lower
one keeps H, so that it can be tried again with more damping.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.tiles import TileRunner, below, tiles
from passopt.ir.errors import ModelError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: A failed factorisation is tried again with ten times the damping, up to this one.
_MOST_DAMP = 10.0


@dataclasses.dataclass(frozen=True)
class InverseFactor:
    """The factor of an inverse.

    Attributes:
        upper: U [k, k] in fp32; only its upper triangle counts.
        damp: The damping that was needed, as a part of the mean of H's diagonal.
        dead: Which channels never had any input, [k].
    """

    upper: Array
    damp: float
    dead: Array


def factor_inverse(hessian: Array, damp: float, runner: TileRunner, name: str = "an input") -> InverseFactor:
    """Return U with (H + damp · mean(diag H) · 1)⁻¹ = Uᵀ U; the array of H is used up.

    A channel that never had any input gets 1 on the diagonal: its weights are rounded to the nearest, and change no
    others.

    Args:
        hessian: H [k, k] in fp32, both triangles.
        damp: The damping to begin with.
        runner: Runs the tiles.
        name: What the channels are, for messages.

    Raises:
        ModelError: If no damping makes H positive definite.
    """
    diagonal = hessian.diagonal().copy()
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = float(diagonal.mean(dtype=np.float64))
    while damp <= _MOST_DAMP:
        np.fill_diagonal(hessian, diagonal + np.float32(damp * mean))
        try:
            _factor(hessian, runner)
            _invert(hessian, runner)
        except np.linalg.LinAlgError:
            _restore(hessian)
            damp = damp * 10 if damp else 0.01
            continue
        return InverseFactor(hessian, damp, dead)
    raise ModelError(f"{name}: its Hessian is not positive definite at any damping up to {_MOST_DAMP:g}")


def _factor(matrix: Array, runner: TileRunner) -> None:
    """Overwrite the upper triangle with V, from the last column of tiles to the first."""
    ranges = tiles(len(matrix))
    for index in reversed(range(len(ranges))):
        last = ranges[index]
        after = slice(last.stop, len(matrix))
        below_it = matrix[last, after].T
        corner = _upper_factor(matrix[last, last] - matrix[last, after] @ below_it)
        inverse = np.linalg.inv(corner.astype(np.float64)).astype(np.float32).T.copy()
        _set_upper(matrix, last, corner)

        def divide(
            rows: slice, last: slice = last, after: slice = after, below_it: Array = below_it, inverse: Array = inverse
        ) -> None:
            matrix[rows, last] = (matrix[rows, last] - matrix[rows, after] @ below_it) @ inverse

        runner.run(functools.partial(divide, rows) for rows in ranges[:index])


def _upper_factor(tile: Array) -> Array:
    """Return the upper triangular V of a symmetric tile, of which the upper triangle is given, with tile = V Vᵀ."""
    upper = np.triu(tile).astype(np.float64)
    whole = upper + np.triu(upper, 1).T
    factor: Array = np.linalg.cholesky(whole[::-1, ::-1])[::-1, ::-1].astype(np.float32)
    if not np.isfinite(factor).all() or (factor.diagonal() <= 0).any():
        raise np.linalg.LinAlgError("not positive definite")
    return factor


def _invert(matrix: Array, runner: TileRunner) -> None:
    """Overwrite the upper triangular V with its inverse, column of tiles by column of tiles."""
    ranges = tiles(len(matrix))
    for index, column in enumerate(ranges):
        corner = np.linalg.inv(np.triu(matrix[column, column]).astype(np.float64)).astype(np.float32)
        panel = matrix[: column.start, column] @ corner if index else None

        def multiply(place: int, column: slice = column, panel: Array | None = panel) -> None:
            assert panel is not None
            rows = ranges[place]
            found = np.triu(matrix[rows, rows]) @ panel[rows]
            if rows.stop < column.start:
                found += matrix[rows, rows.stop : column.start] @ panel[rows.stop :]
            matrix[rows, column] = -found

        runner.run(functools.partial(multiply, place) for place in range(index))
        _set_upper(matrix, column, corner)


def _set_upper(matrix: Array, place: slice, tile: Array) -> None:
    """Write the upper triangle of a tile on the diagonal; the lower one keeps what it holds."""
    matrix[place, place] = np.triu(tile) + np.tril(matrix[place, place], -1)


def _restore(matrix: Array) -> None:
    """Copy the lower triangle to the upper one."""
    for rows, columns in below(tiles(len(matrix))):
        if rows != columns:
            matrix[rows, columns] = matrix[columns, rows].T
        else:
            lower = np.tril(matrix[rows, rows], -1)
            matrix[rows, rows] = lower + lower.T
