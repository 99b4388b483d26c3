"""Compare whole graphs before and after a pass, on the samples that both ran on, and check what they state of shapes.

This catches what no single rewrite shows: rewrites in bodies, rewrites that could not be cut out, and stated shapes and
dtypes that are wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.expressions import DataType
from passopt.passes.framework.accuracy import Accuracy
from passopt.verification.rewrites.array_error import array_error, held_in_narrow
from passopt.verification.sampling.samples import Sample
from passopt.verification.sampling.shaken import TURNS, movement, shaken_model, shaken_sample
from passopt.verification.sampling.trace import Trace, trace
from passopt.verification.sampling.traced_graph import Run

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: An output may differ by this many times what one rewrite may cause, since errors of many rewrites add up, and an
#: element by this many times what the last bits of weights and inputs move it.
_ROOM = 30
#: The same for what a lossy pass may move, if weights and inputs are shaken by as much as it declares for one value.
_LOSSY_ROOM = 4
#: No lossy pass may move a number by more than this part of the largest one, whatever its shaking shows.
_LARGEST_LOSS = 0.5


@dataclasses.dataclass(frozen=True)
class Difference:
    """What is wrong with a graph after a pass: the value that shows it, the sample, and the finding in words."""

    value: str
    sample: Sample
    finding: str


@dataclasses.dataclass(frozen=True)
class WholeResult:
    """The largest error of the outputs over `samples` samples, or the difference that is too large.

    `ties` counts the elements that were not compared, since the last bits of the inputs decide them.
    """

    samples: int = 0
    error: float = 0.0
    difference: Difference | None = None
    ties: int = 0


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
    after.
    """
    outputs = [value.name or "" for value in model.graph.outputs]
    found = {id(run.sample): run for run in after.runs}
    worst = WholeResult(len(before.runs))
    shaking = _Shaking(model, after, accuracy)
    for run in before.runs:
        other = found.get(id(pairs[id(run.sample)]))
        if other is None:
            if _is_empty(run):  # kernels differ in whether they take empty axes
                continue
            text = f"the graph no longer runs: {after.problem or 'onnxruntime fails on it'}"
            return dataclasses.replace(worst, difference=Difference(outputs[0], run.sample, text))
        for name in outputs:
            error, text = _difference(name, run, other, accuracy)
            if text:
                error, text = shaking.without_ties(name, run, other, (error, text))
            if text:
                place = _first_difference(model, run, other, accuracy) or name
                return dataclasses.replace(worst, difference=Difference(place, run.sample, f"{name}: {text}"))
            worst = dataclasses.replace(worst, error=max(worst.error, error))
    return dataclasses.replace(worst, ties=shaking.ties)


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
    if accuracy.budget is not None and _is_float(before) and _is_float(after):
        before, after = held_in_narrow(before, after.astype(before.dtype))  # a lossy pass may narrow the interface
    if before.dtype != after.dtype:
        return float("inf"), f"the dtype {before.dtype} became {after.dtype}"
    error = array_error(before, after)
    kind = DataType.from_numpy(before.dtype) if before.dtype != object else DataType.STRING
    allowed = accuracy.budget_of(kind) * (1 if accuracy.budget is not None else _ROOM)
    if not _is_float(before):
        allowed = 0.0
    return error, "" if error <= allowed else f"max|Δ|/max|reference| = {error:.2e}, allowed {allowed:.0e}"


def _first_difference(model: onnx_ir.Model, one: Run, other: Run, accuracy: Accuracy) -> str | None:
    for node in model.graph:
        for value in node.outputs:
            if value.name in one.shapes and _difference(value.name or "", one, other, accuracy)[1]:
                return value.name
    return None


def _is_float(array: Array) -> bool:
    return array.dtype != object and DataType.from_numpy(array.dtype) in FLOATS


class _Shaking:
    """Runs the graph after a pass on shaken weights and inputs, once a difference asks for it.

    `ties` counts the elements that differ only where the graph picks among numbers that are nearly equal.
    """

    def __init__(self, model: onnx_ir.Model, found: Trace, accuracy: Accuracy) -> None:
        self.ties = 0
        self._model = model
        self._found = found
        self._step = accuracy.budget
        self._accuracy = accuracy
        self._moved: dict[int, list[Run]] | None = None

    def _runs(self, sample: Sample) -> list[Run]:
        """Return the runs of one sample with shaken weights and inputs."""
        if self._moved is None:
            self._moved = {}
            for turn in range(TURNS) if self._found.real else ():
                samples = {id(run.sample): shaken_sample(run.sample, turn, self._step) for run in self._found.runs}
                moved = trace(shaken_model(self._model, turn, self._step), list(samples.values()))
                by_sample = {id(run.sample): run for run in moved.runs}
                for original, shaken in samples.items():
                    if id(shaken) in by_sample:
                        self._moved.setdefault(original, []).append(by_sample[id(shaken)])
        return self._moved.get(id(sample), [])

    def without_ties(self, name: str, one: Run, other: Run, found: tuple[float, str]) -> tuple[float, str]:
        """Return the error of an output and what is wrong with it, without the elements that stand at a tie.

        A length that changed is excused only if a shaken run has the same one.
        """
        moved = [run for run in self._runs(other.sample) if name in run.shapes]
        if one.shapes[name] != other.shapes[name]:
            same = any(run.shapes[name] == one.shapes[name] for run in moved)
            return (0.0, "") if same and self._picks_lengths(name, other, moved) else found
        before, after = one.arrays.get(name), other.arrays.get(name)
        if before is None or after is None or before.dtype.kind not in "fiub" or not _comparable(before, after):
            return found
        if self._step is not None:
            before, after = held_in_narrow(before, after)
        arrays = [run.arrays[name] for run in moved if name in run.arrays]
        moves = movement(after, arrays)
        loose = self._allowance(before, moves)
        with np.errstate(invalid="ignore"):
            apart = np.abs(before.astype(np.float64) - after.astype(np.float64))
        excused = np.isfinite(apart) & (apart > 0) & (apart <= loose)
        rest = array_error(np.where(excused, after.astype(before.dtype), before), after.astype(before.dtype))
        kind = DataType.from_numpy(before.dtype)
        allowed = self._accuracy.budget_of(kind) if _is_float(before) else 0.0
        allowed *= 1 if self._step is not None else _ROOM
        if rest > allowed:
            return rest, f"max|Δ|/max|reference| = {rest:.2e}, allowed {allowed:.0e}"
        self.ties += int(excused.sum())
        return rest, ""

    def _allowance(self, before: Array, moves: Array) -> Array:
        """Return how far each element may move: integers by anything if they move at all, numbers by some times more.

        Half of the elements of a graph that only computes move by about as much; what only some do is a tie of theirs.
        """
        if not _is_float(before):
            anything: Array = np.where(moves > 0, np.inf, 0.0)
            return anything
        common = float(np.median(moves)) if moves.size else 0.0
        if self._step is None:
            return np.asarray(_ROOM * np.maximum(moves, common))
        wide = before.astype(np.float64)
        largest = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
        top = float(moves.max(initial=0.0)) if moves.size else 0.0
        return np.asarray(np.maximum(_LOSSY_ROOM * moves, min(_LOSSY_ROOM * top, _LARGEST_LOSS * largest)))

    def _picks_lengths(self, name: str, run: Run, moved: Sequence[Run]) -> bool:
        """Return whether the length of an output hangs on numbers, as of NonZero."""
        return any(item.shapes[name] != run.shapes[name] for item in moved)


def _comparable(before: Array, after: Array) -> bool:
    return before.dtype == after.dtype or (_is_float(before) and _is_float(after))
