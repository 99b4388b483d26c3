"""Shake a graph's weights and inputs, to see which of its numbers hang on their last bits.

Where a graph rounds to integers or picks the largest of equal numbers, a right rewrite may move a result by much. Which
elements those are is found for every output of every sample by itself: no sample excuses another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import expression_of, is_checkpoint_weight
from passopt.verification.sampling.samples import Sample

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: How many times a graph is shaken: an element that stands at a tie falls to either side.
TURNS = 3
#: The relative change of the last bits of a number, by dtype.
LAST_BITS: Mapping[DataType, float] = {DataType.DOUBLE: 1e-7, DataType.FLOAT: 1e-6, DataType.FLOAT16: 1e-3}
_COARSE = 8e-3
_NUDGED = frozenset({DataType.FLOAT16, DataType.FLOAT, DataType.DOUBLE})
_NUDGED_BYTES = 1 << 20


def shaken_model(model: onnx_ir.Model, turn: int, step: float | None = None) -> onnx_ir.Model:
    """Return a clone whose floating weights differ in their last bits, or by up to `step` of their largest number."""
    random = np.random.default_rng([7, turn])
    shaken = model.clone()
    for value in shaken.graph.initializers.values():
        expression = expression_of(value)
        if expression is not None and expression.dtype in LAST_BITS and not expression.depends_on_rank:
            with Evaluator() as evaluator:
                array = _shaken(evaluator.array(expression), random, step)
            value.const_value = onnx_ir.tensor(array, name=value.name)
    return shaken


def nudged_model(model: onnx_ir.Model, turn: int) -> onnx_ir.Model:
    """Return a clone whose smaller weights, such as those of norms, differ by one rounding each.

    What such a clone computes is as right as what the model computes. Large weights stay lazy.
    """
    random = np.random.default_rng([9, turn])
    nudged = model.clone()
    for value in nudged.graph.initializers.values():
        expression = expression_of(value)
        # Constants of the graph, such as the 1 of `1 - mask`, are no rounded numbers.
        if expression is None or expression.dtype not in _NUDGED or not is_checkpoint_weight(value):
            continue
        if expression.nbytes <= _NUDGED_BYTES and not expression.depends_on_rank:
            with Evaluator() as evaluator:
                array = _nudged(evaluator.array(expression), random)
            value.const_value = onnx_ir.tensor(array, name=value.name)
    return nudged


def _nudged(array: Array, random: np.random.Generator) -> Array:
    """Return each number replaced by a neighbour; zeros, largest numbers and infinities stay, which may be masks."""
    away = np.where(random.integers(0, 2, array.shape) > 0, np.inf, -np.inf).astype(array.dtype)
    with np.errstate(over="ignore", under="ignore"):
        moved = np.nextafter(array, away)
    stays = (array == 0) | ~np.isfinite(array) | ~np.isfinite(moved)
    nudged: Array = np.where(stays, array, moved).astype(array.dtype)
    return nudged


def shaken_feeds(feeds: Mapping[str, Any], turn: int, step: float | None = None) -> dict[str, Any]:
    """Return the inputs with floats that differ in their last bits, or by up to `step` of the largest number."""
    random = np.random.default_rng([8, turn])
    return {
        name: [_shaken(item, random, step) for item in fed] if isinstance(fed, list) else _shaken(fed, random, step)
        for name, fed in feeds.items()
    }


def shaken_sample(sample: Sample, turn: int, step: float | None = None) -> Sample:
    """Return the sample with shaken inputs."""
    return dataclasses.replace(sample, feeds=shaken_feeds(sample.feeds, turn, step))


def _shaken(array: Array, random: np.random.Generator, step: float | None) -> Array:
    if not isinstance(array, np.ndarray) or array.dtype == object or DataType.from_numpy(array.dtype) not in FLOATS:
        return array
    bits = LAST_BITS.get(DataType.from_numpy(array.dtype), _COARSE)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = array.astype(np.float64) * (1 + bits * random.uniform(-1, 1, array.shape))
        if step is not None:
            finite = np.abs(wide[np.isfinite(wide)])
            wide = wide + step * float(finite.max(initial=0.0)) * random.uniform(-1, 1, array.shape)
        shaken: Array = np.asarray(wide, array.dtype)
    return shaken


def movement(reference: Array, moved: Sequence[Array]) -> Array:
    """Return how far each element moves at most, as [reference.shape] of float64; 0 where it stops being a number."""
    result = np.zeros(reference.shape)
    for other in moved:
        if other.shape == reference.shape:
            with np.errstate(invalid="ignore", over="ignore"):
                apart = np.abs(reference.astype(np.float64) - other.astype(np.float64))
            result = np.maximum(result, np.where(np.isfinite(apart), apart, 0))
    return result
