"""Compare one output of two graphs of any kind: tensors, strings and sequences, dtypes included.

Floats may differ by a tolerance. Everything else is equal, but for integers that a graph picks among numbers which are
nearly equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.relative_error import operator_error
from passopt.ir.weights.expressions import DataType
from passopt.verification.quantised_weights import channel_errors, rounding_errors
from passopt.verification.report import Row
from passopt.verification.sampling.shaken import LAST_BITS, TURNS, movement, shaken_feeds, shaken_model

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: Runs a model on inputs by name; an opener opens one for that.
Runner: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Opener: TypeAlias = Callable[[onnx_ir.Model], Runner]

#: Inputs by name, with the name of their scenario.
Samples: TypeAlias = Sequence[tuple[str, dict[str, Any]]]

COMPARISON = "against the original"

#: Weights and inputs move an output by so many times their last bits where nothing cancels; where something does, the
#: tolerance grows with it, but not to more than so many times.
_USUAL, _CONDITION = 4, 30
#: The notes of outputs that show nothing, since they are empty or hold NaN only.
NOTHING = ("empty", "no number")


def weight_rows(reference: onnx_ir.Model, candidate: onnx_ir.Model, *, bf16: bool = False) -> list[Row]:
    """Return rows for the weight whose codes, and the one whose rounded numbers, differ most from the original's."""
    rounded = rounding_errors(reference, candidate, bf16=bf16)
    rows = []
    if rounded:
        name = max(rounded, key=lambda item: rounded[item])
        rows.append(
            Row(COMPARISON, "weights", name, rounded[name], 0.0, f"{len(rounded)} differ by more than rounding")
        )
    errors = channel_errors(reference, candidate)
    if not errors:
        return rows
    worst = max(errors, key=lambda item: item.steps / item.allowed)
    note = f"output channel {worst.channel}, in steps of its codes; {len(errors)} weights"
    return [*rows, Row(COMPARISON, "codes", worst.weight, worst.steps, worst.allowed, note)]


class Ties:
    """Find integers of the original that the last bits of weights and inputs decide, when first asked for them."""

    def __init__(self, model: onnx_ir.Model, opened: Opener, step: float | None) -> None:
        """Take the original, how to open a model, and the relative change that a lossy candidate declares."""
        self._model = model
        self._opened = opened
        self._step = step
        self._runners: list[Callable[[Mapping[str, Any]], Mapping[str, Any]]] | None = None

    def unsure(self, output: str, reference: Array, feeds: Mapping[str, Any]) -> Array:
        """Return which elements of an output move if weights and inputs are shaken."""
        return movement(reference, self._shaken(output, feeds)) > 0

    def room(self, output: str, reference: Array, feeds: Mapping[str, Any]) -> float:
        """Return by what factor an output moves more than weights and inputs do; 1 for a lossy candidate."""
        if self._step is not None or reference.dtype != np.float32:
            return 1.0
        moved = [item for item in self._shaken(output, feeds) if item.shape == reference.shape]
        condition = max((operator_error(reference, item) for item in moved), default=0.0)
        return max(1.0, condition / (_USUAL * LAST_BITS[DataType.FLOAT]))

    def _shaken(self, output: str, feeds: Mapping[str, Any]) -> list[Array]:
        """Return the output with shaken weights and inputs."""
        if self._runners is None:
            self._runners = [self._opened(shaken_model(self._model, turn, self._step)) for turn in range(TURNS)]
        moved = []
        for turn, run in enumerate(self._runners):
            try:
                found = run(shaken_feeds(feeds, turn, self._step))[output]
            except ModelError:
                continue
            if isinstance(found, np.ndarray):
                moved.append(found)
        return moved


@dataclasses.dataclass(frozen=True)
class Judge:
    """How outputs are compared: the tolerance of floats, whether floats may have other dtypes, and ties of integers.

    `comparison` is the title of the rows.
    """

    tolerance: float
    narrows: bool
    ties: Ties
    comparison: str = COMPARISON

    def row(self, scenario: str, output: str, reference: Any, found: Any, feeds: Mapping[str, Any]) -> Row:
        """Return the row of one output in one scenario."""
        if problem := self._problem(reference, found):
            return Row(self.comparison, scenario, output, math.inf, self.tolerance, problem)
        if isinstance(reference, np.ndarray) and reference.dtype.kind in "iub":
            return self._integers(scenario, output, reference, found, feeds)
        error, allowed, note = _error(reference, found), self.tolerance, _nothing(reference)
        if allowed < error <= _CONDITION * allowed and isinstance(reference, np.ndarray):
            room = min(_CONDITION, self.ties.room(output, reference, feeds))
            allowed, note = allowed * room, note or (f"numbers cancel, {room:.0f} times the room" if room > 1 else "")
        return Row(self.comparison, scenario, output, error, allowed, note)

    def _integers(self, scenario: str, output: str, reference: Array, found: Array, feeds: Mapping[str, Any]) -> Row:
        wrong = reference != found
        excused = wrong & self.ties.unsure(output, reference, feeds) if wrong.any() else wrong
        wrong = wrong & ~excused
        notes = [f"{int(wrong.sum())} of {wrong.size} differ"] if wrong.any() else []
        notes += [f"{int(excused.sum())} of {wrong.size} at ties"] if excused.any() else []
        notes += [NOTHING[0]] if not wrong.size else []
        error = float(wrong.mean()) if wrong.any() else 0.0
        return Row(self.comparison, scenario, output, error, 0.0, ", ".join(notes))

    def _problem(self, reference: Any, found: Any) -> str:
        """Return in words how kind, length, dtype or shape differ, "" if they do not."""
        if reference is None or found is None:
            return "" if reference is found else "an optional value is empty in one of the two"
        if isinstance(reference, list) or isinstance(found, list):
            if not isinstance(reference, list) or not isinstance(found, list):
                return "a sequence in one of the two only"
            if len(reference) != len(found):
                return f"a sequence of {len(found)}, expected {len(reference)}"
            return next((text for both in zip(reference, found, strict=True) if (text := self._problem(*both))), "")
        if not isinstance(reference, np.ndarray) or not isinstance(found, np.ndarray):
            return "" if type(reference) is type(found) else f"{type(found).__name__}, not {type(reference).__name__}"
        if reference.dtype != found.dtype and not (self.narrows and is_float(reference) and is_float(found)):
            return f"dtype {found.dtype}, expected {reference.dtype}"
        if reference.shape != found.shape:
            return f"shape {list(found.shape)}, expected {list(reference.shape)}"
        return ""


def compare_outputs(judge: Judge, first: Runner, second: Runner, samples: Samples) -> list[Row]:
    """Return the rows of all outputs of two models, of which the first one is right."""
    rows = []
    for name, feeds in samples:
        try:
            expected, found = first(feeds), second(feeds)
        except ModelError:  # it was told of the candidate itself
            continue
        rows += [judge.row(name, output, value, found[output], feeds) for output, value in expected.items()]
    return rows


def _nothing(reference: Any) -> str:
    """Return in words why a value shows nothing, "" if it shows something."""
    if not isinstance(reference, np.ndarray):
        return ""
    if not reference.size:
        return NOTHING[0]
    return NOTHING[1] if is_float(reference) and np.isnan(reference.astype(np.float64)).all() else ""


def is_float(value: Any) -> bool:
    """Return whether a value is an array of floats, those of numpy's extensions included."""
    return isinstance(value, np.ndarray) and value.dtype != object and _dtype(value) in FLOATS


def _dtype(array: Array) -> DataType | None:
    try:
        return DataType.from_numpy(array.dtype)
    except TypeError:
        return None


def _error(reference: Any, found: Any) -> float:
    """Return the relative error of floats; 0 or infinity for anything else, which is equal or is not."""
    if isinstance(reference, list):
        return max((_error(*both) for both in zip(reference, found, strict=True)), default=0.0)
    if is_float(reference):
        return operator_error(reference, found)
    if isinstance(reference, np.ndarray) and reference.dtype.kind == "c":
        return max(operator_error(reference.real, found.real), operator_error(reference.imag, found.imag))
    same = np.array_equal(reference, found) if isinstance(reference, np.ndarray) else reference == found
    return 0.0 if same else math.inf


def random_outputs(opened: Opener, model: onnx_ir.Model, feeds: Mapping[str, Any]) -> set[str]:
    """Return the outputs that differ between two runs of the same graph."""
    run = opened(model)
    first, second = run(feeds), run(feeds)
    return {name for name, value in first.items() if not _same(value, second[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(_same(*both) for both in zip(one, other, strict=True))
    if is_float(one):
        return one.shape == other.shape and np.array_equal(
            one.astype(np.float64), other.astype(np.float64), equal_nan=True
        )
    return bool(np.array_equal(one, other))
