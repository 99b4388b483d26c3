"""Compare the codes of a quantised model with the weights that they stand for, channel by channel.

On an untrained or tiny model a wrong scale hardly moves the predictions; the weights show it, and where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import expression_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The largest root mean square error of a channel, in steps of absmax / 127. Rounding to the nearest makes 0.3.
LARGEST = 1.0
#: What the names of codes and scales of a weight end with.
CODES, SCALES = ".codes", ".scales"


@dataclasses.dataclass(frozen=True)
class ChannelError:
    """The output channel of a weight whose codes differ most from it: root mean square, in steps of absmax / 127."""

    weight: str
    channel: int
    steps: float


def channel_errors(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> list[ChannelError]:
    """Return the worst channel of every weight whose codes the candidate holds under the name that the reference has.

    The result is empty if most weights differ: then the candidate quantised other weights, as after a rotation.
    """
    found = list(_errors(reference, candidate))
    if not found or float(np.median([item.steps for item in found])) > LARGEST:
        return []
    return found


def _errors(reference: onnx_ir.Model, candidate: onnx_ir.Model) -> Iterator[ChannelError]:
    given = candidate.graph.initializers
    for name, codes in given.items():
        weight = reference.graph.initializers.get(name.removesuffix(CODES))
        scales = given.get(name.removesuffix(CODES) + SCALES)
        if not name.endswith(CODES) or weight is None or scales is None or weight.dtype not in FLOATS:
            continue
        parts = [expression_of(value) for value in (weight, codes, scales)]
        if all(part is not None and not part.depends_on_rank for part in parts):
            error = _error(name.removesuffix(CODES), *parts)  # type: ignore[arg-type]
            if error is not None:
                yield error


def numbers_of_codes(weight: Expression, codes: Expression, scales: Expression) -> Array | None:
    """Return codes times scales, in the orientation of the weight that they stand for; None if they do not fit it."""
    if len(weight.shape) != 2 or sorted(weight.shape) != sorted(codes.shape) or len(scales.shape) != 1:
        return None
    with Evaluator() as evaluator:
        numbers, factors = (evaluator.array(part).astype(np.float32) for part in (codes, scales))
        original = evaluator.array(weight).astype(np.float32)
    best: Array | None = None
    apart = float("inf")
    for axis in (axis for axis in (0, 1) if numbers.shape[axis] == len(factors)):
        made = numbers * (factors[:, None] if axis == 0 else factors)
        rounded = made.astype(scales.dtype.numpy()).astype(np.float32)
        for one in (rounded, rounded.T):
            if one.shape == original.shape and (distance := float(np.abs(one - original).mean())) < apart:
                best, apart = one, distance
    return best


def _error(name: str, weight: Expression, codes: Expression, scales: Expression) -> ChannelError | None:
    if len(weight.shape) != 2 or sorted(weight.shape) != sorted(codes.shape) or len(scales.shape) != 1:
        return None
    with Evaluator() as evaluator:
        numbers, factors = (evaluator.array(part).astype(np.float32) for part in (codes, scales))
        original = evaluator.array(weight).astype(np.float32)
    best: ChannelError | None = None
    for axis in (axis for axis in (0, 1) if numbers.shape[axis] == len(factors)):
        made = numbers * (factors[:, None] if axis == 0 else factors)
        for one in (original, original.T):
            if one.shape == made.shape:
                found = _worst_channel(name, one, made, axis)
                best = found if best is None or found.steps < best.steps else best
    return best


def _worst_channel(name: str, original: Array, made: Array, axis: int) -> ChannelError:
    difference = np.sqrt(np.mean(np.square(original - made), axis=1 - axis))
    step = np.abs(original).max(axis=1 - axis) / 127
    # A channel of zeros has no step; it must have stayed zero.
    steps = np.where(step > 0, difference / np.where(step > 0, step, 1), np.where(difference > 0, np.inf, 0))
    channel = int(steps.argmax())
    return ChannelError(name, channel, float(steps[channel]))
