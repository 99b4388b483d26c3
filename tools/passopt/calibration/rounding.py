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
from passopt.ir.weights.row_math import quantize_values, scales_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Method: TypeAlias = Literal["gptq", "rtn", "mse"]

METHODS: tuple[Method, ...] = ("gptq", "rtn", "mse")
#: The rows of a weight that are in memory at once; whole tiles of `round_weight`.
_ROWS = 2048
#: The parts of the largest magnitude that a scale of least squared error may cover.
_CLIPS = tuple(1 - step / 200 for step in range(1, 25))
LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes [n, k] and scales [n] of a weight, which the scales have the dtype of."""

    codes: Array
    scales: Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the weights that read one value are rounded by GPTQ: the factor of its inverse Hessian, and its columns."""

    factor: InverseFactor
    order: Order


def round_target(target: Target, method: Method, plan: Plan | None, runner: TileRunner) -> Codes:
    """Return the codes of a weight.

    Args:
        target: The weight, which is read in parts.
        method: How to choose scales and codes.
        plan: The factor and the order, for gptq.
        runner: Runs the rows.

    Raises:
        ModelError: If the weight holds NaN or infinity, or cannot be read.
    """
    count, width = target.weight.shape
    codes = np.empty((count, width), np.int8)
    scales = np.empty(count, target.weight.dtype.numpy())
    with Evaluator() as evaluator:
        for rows in tiles(count, _ROWS):
            part = evaluator.read(target.weight, ((rows.start, rows.stop), (0, width)))
            if part.dtype != np.float32 or not part.flags.writeable:
                part = part.astype(np.float32)
            largest = np.maximum(part.max(axis=1, initial=0), -part.min(axis=1, initial=0))
            if not np.isfinite(largest).all():
                row = int(np.nonzero(~np.isfinite(part))[0][0]) + rows.start
                raise ModelError(f"weight {target.name!r} holds NaN or infinity in output channel {row}")
            found = scales_of_rows(part, largest, target.weight.dtype, method)
            scales[rows] = found
            wide = found.astype(np.float32)
            if plan is None:
                codes[rows] = quantize_values(part, wide[:, None])
            else:
                ordered = np.ascontiguousarray(part[:, plan.order.columns])
                del part
                codes[rows] = round_weight(ordered, wide[:, None], plan.factor, plan.order, LARGEST, runner)
    return Codes(codes, scales)


def scales_of_rows(rows: Array, largest: Array, dtype: DataType, method: Method) -> Array:
    """Return a scale for each row of a weight in fp32, of its largest magnitude, or of least squared error for mse."""
    best = scales_of(largest, dtype)
    if method != "mse":
        return best
    least = _squared_error(rows, best)
    for clip in _CLIPS:
        scales = scales_of(largest * np.float32(clip), dtype)
        error = _squared_error(rows, scales)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _squared_error(rows: Array, scales: Array) -> Array:
    wide = scales.astype(np.float32)[:, None]
    errors = quantize_values(rows.copy(), wide) * wide - rows
    found: Array = np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
    return found


def dequantised(found: Codes) -> Array:
    """Return the numbers [k, n] that codes stand for, as a graph computes them: rounded to the dtype of the scales."""
    wide = np.ascontiguousarray(found.codes.T).astype(np.float32)
    wide *= found.scales.astype(np.float32)
    kind = found.scales.dtype
    return wide if kind == np.float32 else wide.astype(kind).astype(np.float32)
