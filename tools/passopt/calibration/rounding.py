"""Make the codes of one weight: round to the nearest, choose scales of least squared error, or round as GPTQ does."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np

from passopt.calibration.codes import Order, round_weight
from passopt.calibration.inverse_factor import InverseFactor
from passopt.calibration.targets import Target
from passopt.calibration.tiles import TileRunner, tiles
from passopt.ir.errors import ModelError
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.row_math import absmax, quantize_values, scales_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Method: TypeAlias = Literal["gptq", "rtn", "mse"]

METHODS: tuple[Method, ...] = ("gptq", "rtn", "mse")
#: The rows of a weight that are in memory at once; whole tiles of `round_weight`.
_ROWS = 4096
#: The parts of the largest magnitude that a scale of least squared error may cover.
_CLIPS = tuple(1 - step / 200 for step in range(1, 25))
#: The largest codes by their bits.
LARGEST = {8: 127, 4: 7}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What codes are made.

    Attributes:
        bits: 8 or 4.
        group: The inputs that share a scale; 0 for all of an output channel.
    """

    bits: int = 8
    group: int = 0

    @property
    def largest(self) -> int:
        """Return the largest code."""
        return LARGEST[self.bits]


EIGHT_BITS = Kind()


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes [n, k] of a weight, and scales in its dtype: [n], or [n, groups]."""

    codes: Array
    scales: Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the weights that read one value are rounded by GPTQ: the factor of its inverse Hessian, and its columns."""

    factor: InverseFactor
    order: Order


def round_target(
    target: Target, method: Method, plan: Plan | None, runner: TileRunner, kind: Kind = EIGHT_BITS
) -> Codes:
    """Return the codes of a weight.

    Args:
        target: The weight, which is read in parts.
        method: How to choose scales and codes.
        plan: The factor and the order, for gptq.
        runner: Runs the rows.
        kind: The bits and groups of the codes; a group divides the inputs of the weight.

    Raises:
        ModelError: If the weight holds NaN or infinity, or cannot be read.
    """
    count, width = target.weight.shape
    codes = np.empty((count, width), np.int8)
    group = kind.group or width
    scales = np.empty((count, width // group), target.weight.dtype.numpy())
    with Evaluator() as evaluator:
        for rows in tiles(count, _ROWS):
            part = evaluator.read(target.weight, ((rows.start, rows.stop), (0, width))).astype(np.float32)
            if not np.isfinite(part).all():
                row = int(np.nonzero(~np.isfinite(part))[0][0]) + rows.start
                raise ModelError(f"weight {target.name!r} holds NaN or infinity in output channel {row}")
            found = scales_of_rows(part.reshape(-1, group), target.weight.dtype, method, kind.largest)
            wide = found.astype(np.float32)
            scales[rows] = found.reshape(len(part), -1)
            if plan is None:
                made = quantize_values(part.reshape(-1, group), wide[:, None], kind.largest)
                codes[rows] = made.reshape(part.shape)
            else:
                ordered = np.ascontiguousarray(part[:, plan.order.columns])
                del part
                steps = wide.reshape(len(ordered), -1)
                codes[rows] = round_weight(ordered, steps, plan.factor, plan.order, kind.largest, runner)
    return Codes(codes, scales if kind.group else scales[:, 0])


def scales_of_rows(rows: Array, dtype: DataType, method: Method, most: int = 127) -> Array:
    """Return a scale for each row or group of a weight: of its largest magnitude, or of least squared error for mse.

    Args:
        rows: The numbers in fp32.
        dtype: The dtype of the scales.
        method: How codes are made.
        most: The largest code.
    """
    largest = absmax(rows, 0)
    best = scales_of(largest, dtype, most)
    if method != "mse":
        return best
    least = _squared_error(rows, best, most)
    for clip in _CLIPS:
        scales = scales_of(largest * np.float32(clip), dtype, most)
        error = _squared_error(rows, scales, most)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _squared_error(rows: Array, scales: Array, most: int) -> Array:
    wide = scales.astype(np.float32)[:, None]
    errors = quantize_values(rows.copy(), wide, most) * wide - rows
    found: Array = np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
    return found


def dequantised(found: Codes) -> Array:
    """Return the numbers that codes stand for, as a graph computes them: rounded to the dtype of the scales."""
    wide = found.codes.astype(np.float32, order="C")
    factors = found.scales.reshape(len(wide), -1).astype(np.float32)
    wide.reshape(*factors.shape, -1)[...] *= factors[:, :, None]
    kind = found.scales.dtype
    return wide if kind == np.float32 else wide.astype(kind).astype(np.float32)
