"""Compare whole graphs before and after a pass, on the samples that both ran on, and check what they state of shapes.

This catches what no single rewrite shows: rewrites in bodies, rewrites that could not be cut out, and stated shapes and
dtypes that are wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.framework.accuracy import Accuracy
from passopt.verification.rewrites.array_error import array_error
from passopt.verification.sampling.samples import Sample
from passopt.verification.sampling.trace import Trace, trace
from passopt.verification.sampling.traced_graph import Run

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: An output may differ by this many times what one rewrite may cause, since errors of many rewrites add up, and by this
#: many times what a relative change of weights and inputs in the last bits causes.
_ROOM = 30
_LAST_BITS: Mapping[DataType, float] = {DataType.DOUBLE: 1e-7, DataType.FLOAT: 1e-6, DataType.FLOAT16: 1e-3}


@dataclasses.dataclass(frozen=True)
class Difference:
    """What is wrong with a graph after a pass: the value that shows it, the sample, and the finding in words."""

    value: str
    sample: Sample
    finding: str


@dataclasses.dataclass(frozen=True)
class WholeResult:
    """The largest error of the outputs over `samples` samples, or the difference that is too large."""

    samples: int = 0
    error: float = 0.0
    difference: Difference | None = None


def stated_wrongly(model: onnx_ir.Model, found: Trace) -> dict[str, Difference]:
    """Return the values of the main graph whose stated shape or dtype is not the one that they have when it runs."""
    wrong: dict[str, Difference] = {}
    values = [value for node in model.graph for value in node.outputs]
    for run in found.runs:
        for value in values:
            shape, array = run.shapes.get(value.name or ""), run.arrays.get(value.name or "")
            if shape is not None and not _fits(value, shape):
                text = f"states the shape {_dims(value)}, it is {list(shape)}"
                wrong.setdefault(value.name or "", Difference(value.name or "", run.sample, text))
            if array is not None and not _has_dtype(value, array):
                text = f"states the dtype {value.dtype.name if value.dtype else '?'}, it is {array.dtype}"
                wrong.setdefault(value.name or "", Difference(value.name or "", run.sample, text))
    return wrong


def _fits(value: onnx_ir.Value, shape: Sequence[int]) -> bool:
    if value.shape is None or not isinstance(value.type, (onnx_ir.TensorType, type(None))):
        return True
    dims = list(value.shape.dims)
    return len(dims) == len(shape) and all(
        not isinstance(dim, int) or dim == length for dim, length in zip(dims, shape, strict=True)
    )


def _has_dtype(value: onnx_ir.Value, array: Array) -> bool:
    if value.dtype is None or value.dtype in {DataType.STRING, DataType.BFLOAT16} or array.dtype == object:
        return True
    if not isinstance(value.type, onnx_ir.TensorType):
        return True
    try:
        return bool(value.dtype.numpy() == array.dtype) or value.dtype.bitwidth < 16
    except TypeError:
        return True


def _dims(value: onnx_ir.Value) -> list[object]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape.dims]


def compare_whole(
    before: Trace, after: Trace, pairs: Mapping[int, Sample], model: onnx_ir.Model, accuracy: Accuracy
) -> WholeResult:
    """Return how far the outputs of the graph differ after a pass, on the samples that the graph before ran on.

    `model` is the graph after the pass, and `pairs` maps the identity of a sample before to the sample
    after. The numbers of a lossy pass are measured but not judged, since its errors add up.
    """
    outputs = [value.name or "" for value in model.graph.outputs]
    found = {id(run.sample): run for run in after.runs}
    worst = WholeResult(len(before.runs))
    noise: dict[str, float] | None = None
    for run in before.runs:
        other = found.get(id(pairs[id(run.sample)]))
        if other is None:
            if _is_empty(run):  # kernels differ in whether they take empty axes
                continue
            text = f"the graph no longer runs: {after.problem or 'onnxruntime fails on it'}"
            return dataclasses.replace(worst, difference=Difference(outputs[0], run.sample, text))
        for name in outputs:
            error, text = _difference(name, run, other, accuracy)
            if not text:
                worst = dataclasses.replace(worst, error=max(worst.error, error))
                continue
            if noise is None:
                noise = _noise(model, after, outputs)
            if error > _ROOM * noise.get(name, 0.0):
                place = _first_difference(model, run, other, accuracy) or name
                return dataclasses.replace(worst, difference=Difference(place, run.sample, f"{name}: {text}"))
    return worst


def _is_empty(run: Run) -> bool:
    return any(0 in value.shape for value in run.sample.feeds.values() if not isinstance(value, list))


def _difference(name: str, one: Run, other: Run, accuracy: Accuracy) -> tuple[float, str]:
    """Return the error of a value, and what is wrong with it, "" if nothing is."""
    first, second = one.shapes.get(name), other.shapes.get(name)
    if first is None or second is None:
        return 0.0, ""
    if first != second:
        return float("inf"), f"the shape {list(first)} became {list(second)}"
    before, after = one.arrays.get(name), other.arrays.get(name)
    if before is None or after is None:
        return 0.0, ""
    if accuracy.budget is not None:
        return array_error(before, after.astype(before.dtype)), ""
    if before.dtype != after.dtype:
        return float("inf"), f"the dtype {before.dtype} became {after.dtype}"
    error = array_error(before, after)
    kind = DataType.from_numpy(before.dtype) if before.dtype != object else DataType.STRING
    allowed = _ROOM * accuracy.budget_of(kind)
    return error, "" if error <= allowed else f"max|Δ|/max|reference| = {error:.2e}, allowed {allowed:.0e}"


def _first_difference(model: onnx_ir.Model, one: Run, other: Run, accuracy: Accuracy) -> str | None:
    for node in model.graph:
        for value in node.outputs:
            if value.name in one.shapes and _difference(value.name or "", one, other, accuracy)[1]:
                return value.name
    return None


def _noise(model: onnx_ir.Model, found: Trace, outputs: Iterable[str]) -> dict[str, float]:
    """Return how far the outputs move if weights and inputs change in their last bits.

    Where a graph rounds to integers or picks the largest of equal numbers, that may be much.
    """
    if not found.real:
        return {}
    random = np.random.default_rng(7)
    shaken = model.clone()
    for value in shaken.graph.initializers.values():
        expression = expression_of(value)
        if expression is not None and expression.dtype in _LAST_BITS and not expression.depends_on_rank:
            with Evaluator() as evaluator:
                array = _shaken(evaluator.array(expression), random)
            value.const_value = onnx_ir.tensor(array, name=value.name)
    samples = [
        dataclasses.replace(run.sample, feeds={name: _fed(fed, random) for name, fed in run.sample.feeds.items()})
        for run in found.runs
    ]
    moved = trace(shaken, samples).runs
    if len(moved) != len(found.runs):
        return {}
    return {
        name: max(
            array_error(one.arrays[name], other.arrays[name])
            for one, other in zip(found.runs, moved, strict=True)
            if name in one.arrays and name in other.arrays and one.shapes[name] == other.shapes[name]
        )
        for name in outputs
        if all(name in run.arrays for run in (*found.runs, *moved))
    }


def _fed(fed: Any, random: np.random.Generator) -> Any:
    return [_shaken(item, random) for item in fed] if isinstance(fed, list) else _shaken(fed, random)


def _shaken(array: Array, random: np.random.Generator) -> Array:
    if array.dtype == object or DataType.from_numpy(array.dtype) not in FLOATS:
        return array
    step = _LAST_BITS.get(DataType.from_numpy(array.dtype), 8e-3)
    with np.errstate(over="ignore", invalid="ignore"):
        return (array * (1 + step * random.uniform(-1, 1, array.shape))).astype(array.dtype)
