"""Add up the products of a linear's inputs with themselves: the Hessian of its squared error.

H = 2/N · Σ x xᵀ over N inputs x. (Frantar et al., GPTQ, 2022)
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np

from passopt.calibration.inputs import check_finite
from passopt.calibration.tiles import TileRunner, below, tiles
from passopt.ir.errors import ModelError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The inputs that are multiplied at once. Sums are made of such blocks, counted from the first input, so that they do
#: not depend on how the inputs arrive.
_BLOCK = 2048


class Gram:
    """The sum of x xᵀ of inputs with `width` channels; only the upper triangle is kept up to date.

    Attributes:
        count: The inputs so far.
    """

    def __init__(self, width: int, runner: TileRunner) -> None:
        self.count = 0
        self._sum: Array = np.zeros((width, width), np.float32)
        self._waiting: Array = np.empty((_BLOCK, width), np.float32)
        self._filled = 0
        self._runner = runner

    def add(self, inputs: Array, name: str = "an input") -> None:
        """Add inputs [n, width].

        Args:
            inputs: The inputs, in any float dtype.
            name: What they are, for the message.

        Raises:
            ModelError: If they hold NaN or infinity, of which no sum can be made.
        """
        wide = np.asarray(inputs, np.float32)
        check_finite(wide, self.count, name)
        self.count += len(wide)
        while len(wide):
            taken = min(_BLOCK - self._filled, len(wide))
            self._waiting[self._filled : self._filled + taken] = wide[:taken]
            self._filled += taken
            wide = wide[taken:]
            if self._filled == _BLOCK:
                self._multiply()

    def _multiply(self) -> None:
        block = self._waiting[: self._filled]

        def task(rows: slice, columns: slice) -> None:
            self._sum[rows, columns] += block[:, rows].T @ block[:, columns]

        self._runner.run(functools.partial(task, *pair) for pair in below(tiles(block.shape[1])))
        self._filled = 0

    def hessian(self) -> Array:
        """Return H [width, width] in fp32, both triangles; nothing can be added afterwards.

        Raises:
            ModelError: If there was no input.
        """
        if not self.count:
            raise ModelError("no input was seen: the calibration data is empty")
        self._multiply()
        hessian = self._sum
        self._waiting = self._sum = np.empty((0, 0), np.float32)
        hessian *= np.float32(2.0 / self.count)
        for rows, columns in below(tiles(len(hessian))):
            if rows != columns:
                hessian[columns, rows] = hessian[rows, columns].T
            else:
                upper = np.triu(hessian[rows, columns])
                hessian[rows, columns] = upper + np.triu(upper, 1).T
        return hessian
