"""Run both sides of a cut on the same sampled inputs, and measure how much their results differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.passes.framework.accuracy import Accuracy
from passopt.targets.onnxruntime.session import Session
from passopt.verification.rewrites.array_error import array_error, held_in_narrow, shape_problem
from passopt.verification.rewrites.region_models import LARGEST_WEIGHT, Runnable, runnable, shortened_axes
from passopt.verification.rewrites.regions import Cut, Unchecked
from passopt.verification.rewrites.sample_weights import SampledEvaluator
from passopt.verification.rewrites.value_kinds import is_control_name
from passopt.verification.sampling.lengths import takes_empty
from passopt.verification.sampling.samples import Sample
from passopt.verification.sampling.shaken import LAST_BITS, TURNS, shaken_feeds
from passopt.verification.sampling.traced_graph import Run
from passopt.verification.sampling.values import Sampler, index_bounds

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: A cut with a weight of more elements than this is run on the first two samples only, to save time.
_LARGE = 1 << 22
#: Operators whose kernels refuse empty inputs that the operators they stand for accept.
_NEVER_EMPTY = frozenset({"Attention"})
#: Errors of more than this many times the budget are errors, however the numbers cancel.
_CONDITION = 30


@dataclasses.dataclass(frozen=True)
class Draw:
    """Values for the leaves of a cut: of one sample of the graph, with the graph's own numbers or with random ones."""

    sample: Sample
    random: bool
    leaves: Mapping[str, Array]

    def __str__(self) -> str:
        return f"{self.sample}; {'random numbers' if self.random else 'numbers that the graph computed'}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The error and the budget of the worst root in the worst draw; `problem` says why there is no number, if so."""

    error: float
    budget: float
    root: str
    draw: Draw
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Return whether the error is within the budget."""
        return self.error <= self.budget

    def __str__(self) -> str:
        measured = f"max|Δ|/max|reference| = {self.error:.2e}, allowed {self.budget:.0e}"
        return f"{self.problem or measured} (sampled: {self.draw})"

    def is_worse_than(self, other: Outcome) -> bool:
        """Return whether this outcome exceeds its budget by more than the other one does."""
        return self.error * other.budget > other.error * self.budget or (self.error > self.budget and other.ok)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both sides of a cut, ready to run.

    `shortened` maps the lengths of axes of weights that are too large to run whole to what is kept of them.
    """

    cut: Cut
    before: Runnable
    after: Runnable
    accuracy: Accuracy
    shortened: Mapping[int, int]
    draws: Sequence[Draw]

    def run(self, *, real: bool) -> Outcome:
        """Return the worst outcome over the draws.

        Weights are evaluated from their files if `real`, otherwise they are random.

        Raises:
            Unchecked: If the original side runs on no draw, or the replacement on none of those.
        """
        feeds = [draw.leaves for draw in self.draws]
        expected = _results(self.before, feeds, real)
        if all(isinstance(results, ModelError) for results in expected):
            raise Unchecked(f"the original does not run alone: {expected[0]}")
        found = _results(self.after, feeds, real)
        worst: Outcome | None = None
        for draw, one, other in zip(self.draws, expected, found, strict=True):
            if isinstance(one, ModelError) or (isinstance(other, ModelError) and self._refuses_empty(draw)):
                continue
            outcome = self._outcome(draw, one, other)
            if not outcome.ok and self._is_ill_conditioned(outcome, one, real):
                outcome = dataclasses.replace(outcome, error=outcome.budget)
            if worst is None or outcome.is_worse_than(worst):
                worst = outcome
        if worst is None:
            raise Unchecked("only samples with empty axes run, which the kernel of the replacement refuses")
        return worst

    def _is_ill_conditioned(self, outcome: Outcome, expected: Sequence[Array], real: bool) -> bool:
        """Return whether the last bits of what the original reads move it so much that they explain the error.

        So it is where numbers cancel, or where a Clip keeps small ones of large ones. Errors that are many times what
        the pass declares are never explained in this way.
        """
        roots = [root.name or "" for root in self.cut.before.roots]
        reference = expected[roots.index(outcome.root)]
        is_float = isinstance(reference, np.ndarray) and reference.dtype == np.float32
        if self.accuracy.budget is not None or outcome.problem or not is_float:
            return False
        if outcome.error > _CONDITION * outcome.budget:
            return False
        shaken = [shaken_feeds(outcome.draw.leaves, turn) for turn in range(TURNS)]
        moved = [item for item in _results(self.before, shaken, real) if not isinstance(item, ModelError)]
        arrays = [item[roots.index(outcome.root)] for item in moved]
        condition = max((array_error(reference, item) for item in arrays if item.shape == reference.shape), default=0.0)
        return outcome.error <= outcome.budget * condition / LAST_BITS[DataType.FLOAT]

    def _refuses_empty(self, draw: Draw) -> bool:
        """Return whether the replacement has an operator whose kernel refuses the empty axes of the draw."""
        if not any(not all(array.shape) for array in draw.leaves.values()):
            return False
        nodes = [*self.after.model.graph, *(node for item in self.after.model.functions.values() for node in item)]
        return any(node.op_type in _NEVER_EMPTY for node in nodes) or not takes_empty(self.after.model)

    def has_blank_weight(self) -> bool:
        """Return whether all weights are zero everywhere, as in a sparse file without data; a bias may be."""
        with Evaluator() as evaluator:
            weights = [item for side in (self.before, self.after) for item in side.weights.values()]
            vectors = [weight for weight in weights if math.prod(weight.shape) > 1] or weights
            return bool(vectors) and not any(
                any(chunk.any() for chunk in evaluator.chunks(weight)) for weight in vectors
            )

    def inputs(self, draw: Draw, *, real: bool) -> dict[str, Array]:
        """Return all inputs of both models in one draw by name, weights included."""
        return {**_feeds(self.before, draw.leaves, real), **_feeds(self.after, draw.leaves, real)}

    def _outcome(self, draw: Draw, expected: Sequence[Array], found: Sequence[Array] | ModelError) -> Outcome:
        worst: Outcome | None = None
        for index, root in enumerate(self.cut.before.roots):
            # Not every graph states the dtype of a root, such as one of a function that was inlined.
            array, stated = expected[index], root.dtype or self.cut.after.roots[index].dtype
            dtype = stated or (DataType.from_numpy(array.dtype) if isinstance(array, np.ndarray) else DataType.FLOAT)
            name, budget = root.name or "", self.accuracy.budget_of(dtype)
            if isinstance(found, ModelError):
                return Outcome(float("inf"), budget, name, draw, f"the replacement does not run: {found}")
            problem = shape_problem(expected[index], found[index])
            both = expected[index], found[index]
            if self.accuracy.budget is not None and not problem:
                both = held_in_narrow(*both)
            error = float("inf") if problem else array_error(*both)
            outcome = Outcome(error, budget, name, draw, problem)
            if worst is None or outcome.is_worse_than(worst):
                worst = outcome
        assert worst is not None
        return worst


def prepare(
    cut: Cut,
    runs: Sequence[Run],
    name_of: Callable[[onnx_ir.Value], str],
    accuracy: Accuracy,
    largest: int = LARGEST_WEIGHT,
) -> Comparison:
    """Return both sides as models, with values for their leaves from every run of the graph.

    Args:
        cut: The regions before and after.
        runs: What the graph computed on its samples.
        name_of: A function that returns the name by which `runs` know a leaf.
        accuracy: What the pass declares.
        largest: Axes of weights with more elements than this are shortened.

    Raises:
        Unchecked: If a weight is too large to shorten, or no leaf can be given a value.
    """
    shortened = shortened_axes(cut, largest)
    leaves = {leaf.name or "": leaf for leaf in (*cut.after.leaves, *cut.before.leaves)}
    types = _true_types(leaves, runs, name_of)
    # One side may not state the dtype of a root, which decides how its numbers are handed out.
    pairs = zip(cut.before.roots, cut.after.roots, strict=True)
    known = [one.dtype if one.dtype is not None else other.dtype for one, other in pairs]
    before, after = (_fp32(runnable(region, shortened, types, known)) for region in (cut.before, cut.after))
    weights = [*before.weights.values(), *after.weights.values()]
    count = len(runs)
    if any(weight.nbytes // weight.dtype.itemsize > _LARGE for weight in weights):
        count = 2
    if not leaves:
        count = 1  # only weights are read, and they are the same in every draw
    draws = [draw for run in runs[:count] for draw in _draws(leaves, types, run, name_of, shortened)]
    return Comparison(cut, before, after, accuracy, shortened, draws)


def _true_types(
    leaves: Mapping[str, onnx_ir.Value], runs: Sequence[Run], name_of: Callable[[onnx_ir.Value], str]
) -> dict[str, DataType]:
    """Return the dtypes that leaves had in the runs, for those whose dtype the graph does not state."""
    found = {}
    for name, leaf in leaves.items():
        array = runs[0].arrays.get(name_of(leaf)) if runs else None
        if leaf.dtype is None and array is not None:
            found[name] = DataType.from_numpy(array.dtype)
    return found


def _draws(
    leaves: Mapping[str, onnx_ir.Value],
    types: Mapping[str, DataType],
    run: Run,
    name_of: Callable[[onnx_ir.Value], str],
    shortened: Mapping[int, int],
) -> list[Draw]:
    """Return the draw with the numbers that the graph computed, if they are known, and one with random numbers."""
    own = {name: run.arrays.get(name_of(leaf)) for name, leaf in leaves.items()}
    shapes = {
        name: tuple(shortened.get(length, length) for length in run.shapes[name_of(leaf)])
        for name, leaf in leaves.items()
    }

    def length_of(value: onnx_ir.Value, axis: int) -> int | None:
        shape = run.shapes.get(name_of(value))
        length = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        return None if length is None else shortened.get(length, length)

    style = run.sample.style
    if style.integers in {"near", "wide", "rounds"}:  # an integer inside of the graph may be a length
        style = dataclasses.replace(style, integers="natural")
    if style.floats == "steep":  # the original may overflow inside on numbers that it never computes
        style = dataclasses.replace(style, floats="large")
    sampler = Sampler(style, run.sample.lengths.past, index_bounds(list(leaves.values()), length_of))
    drawn: dict[str, Array] = {}
    for name, leaf in leaves.items():
        array = own[name]
        dtype = leaf.dtype if leaf.dtype is not None else types.get(name)
        if array is not None and (array.dtype not in _FLOATS or is_control_name(name)) and array.shape == shapes[name]:
            drawn[name] = array
        elif dtype is None:
            raise Unchecked("the dtype of a value that it reads is unknown")
        else:
            drawn[name] = sampler.sample(name, dtype, shapes[name])
    draws = [Draw(run.sample, True, drawn)]
    given = {name: array for name, array in own.items() if array is not None and array.shape == shapes[name]}
    if leaves and len(given) == len(leaves):
        draws.insert(0, Draw(run.sample, False, given))
    return draws


_FLOATS = frozenset(dtype.numpy() for dtype in FLOATS)


def _fp32(side: Runnable) -> Runnable:
    """Return the side with everything in bf16 turned to fp32, because onnxruntime has no bf16 kernels on a CPU."""
    weights = {
        name: weight.cast(DataType.FLOAT) if weight.dtype == DataType.BFLOAT16 else weight
        for name, weight in side.weights.items()
    }
    return Runnable(fp32_twin(side.model), weights)


def _results(side: Runnable, feeds: Sequence[Mapping[str, Array]], real: bool) -> list[Sequence[Array] | ModelError]:
    """Return the roots on each draw in order, or the error that kept them from being computed."""
    try:
        session = Session(side.model, optimize=False)
    except ModelError as error:
        return [error] * len(feeds)
    weights = _weights(side, real)
    empties = takes_empty(side.model)
    results: list[Sequence[Array] | ModelError] = []
    for leaves in feeds:
        if not empties and not all(array.size for array in leaves.values()):
            results.append(ModelError("kernels of onnxruntime may not survive empty axes"))
            continue
        try:
            results.append(list(session.run({**_given(side, leaves), **weights}).values()))
        except ModelError as error:
            results.append(error)
    return results


def _feeds(side: Runnable, leaves: Mapping[str, Array], real: bool) -> dict[str, Array]:
    return {**_given(side, leaves), **_weights(side, real)}


def _given(side: Runnable, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Return the leaves that the side reads, in the dtypes of that side, because a pass may have changed these."""
    wanted = {value.name or "": value.dtype for value in side.model.graph.inputs}
    return {name: _as(leaves[name], dtype) for name, dtype in wanted.items() if name in leaves}


def _weights(side: Runnable, real: bool) -> dict[str, Array]:
    with (Evaluator if real else SampledEvaluator)() as evaluator:
        return {name: _evaluated(evaluator, weight) for name, weight in side.weights.items()}


def _evaluated(evaluator: Evaluator, weight: Expression) -> Array:
    """Return the whole weight, computed in chunks of rows to save memory.

    Computed at once, the working copies of a large weight would take several times its size.
    """
    result = np.empty(weight.shape, weight.dtype.numpy())
    start = 0
    for chunk in evaluator.chunks(weight):
        if not weight.shape:
            return chunk
        result[start : start + len(chunk)] = chunk
        start += len(chunk)
    return result


def _as(array: Array, dtype: DataType | None) -> Array:
    if dtype is None:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy(), copy=False)
