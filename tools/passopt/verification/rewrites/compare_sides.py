"""Run both sides of a cut on the same sampled inputs, and measure how much their results differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.errors import ModelError
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.relative_error import rewrite_error
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import DataType, Expression
from passopt.passes.framework.accuracy import Accuracy
from passopt.targets.onnxruntime.session import Session
from passopt.verification.rewrites.region_models import LARGEST_WEIGHT, Runnable, runnable, shortened_axes
from passopt.verification.rewrites.regions import Cut, Unchecked
from passopt.verification.rewrites.sample_inputs import Sampler, index_bounds
from passopt.verification.rewrites.sample_weights import SampledEvaluator
from passopt.verification.rewrites.symbol_lengths import DRAWS, Draw, Lengths

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: A cut with a weight of more elements than this is run on the first two draws only, to save time.
_LARGE = 1 << 22


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
        sizes = f"batch {self.draw.batch}, seq {self.draw.seq}, past {self.draw.past}"
        measured = f"max|Δ|/max|reference| = {self.error:.2e}, allowed {self.budget:.0e}"
        return f"{self.problem or measured} (sampled: {sizes})"

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
    draws: Sequence[tuple[Draw, Mapping[str, Array]]]

    def run(self, *, real: bool) -> Outcome:
        """Return the worst outcome over the draws.

        Weights are evaluated from their files if `real`, otherwise they are random.

        Raises:
            Unchecked: If the original side runs on no draw.
        """
        feeds = [leaves for _, leaves in self.draws]
        expected = _results(self.before, feeds, real)
        if all(isinstance(results, ModelError) for results in expected):
            raise Unchecked(f"the original does not run alone: {expected[0]}")
        found = _results(self.after, feeds, real)
        worst: Outcome | None = None
        for (draw, _), one, other in zip(self.draws, expected, found, strict=True):
            if isinstance(one, ModelError):
                continue
            outcome = self._outcome(draw, one, other)
            if worst is None or outcome.is_worse_than(worst):
                worst = outcome
        assert worst is not None
        return worst

    def has_blank_weight(self) -> bool:
        """Return whether some weight is zero everywhere, as in a sparse file without data."""
        with Evaluator() as evaluator:
            weights = [*self.before.weights.values(), *self.after.weights.values()]
            return not all(any(chunk.any() for chunk in evaluator.chunks(weight)) for weight in weights)

    def inputs(self, draw: Draw, *, real: bool) -> dict[str, Array]:
        """Return all inputs of both models in one draw by name, weights included."""
        leaves = next(leaves for other, leaves in self.draws if other == draw)
        return {**_feeds(self.before, leaves, real), **_feeds(self.after, leaves, real)}

    def _outcome(self, draw: Draw, expected: Sequence[Array], found: Sequence[Array] | ModelError) -> Outcome:
        worst: Outcome | None = None
        for index, root in enumerate(self.cut.before.roots):
            name, budget = root.name or "", self.accuracy.budget_of(root.dtype or DataType.FLOAT)
            if isinstance(found, ModelError):
                return Outcome(float("inf"), budget, name, draw, f"the replacement does not run: {found}")
            one, other = expected[index], found[index]
            problem = "" if one.shape == other.shape else f"shape {list(one.shape)} became {list(other.shape)}"
            error = float("inf") if problem else rewrite_error(one, other)
            outcome = Outcome(error, budget, name, draw, problem)
            if worst is None or outcome.is_worse_than(worst):
                worst = outcome
        assert worst is not None
        return worst


def prepare(cut: Cut, lengths: Sequence[Lengths], accuracy: Accuracy, largest: int = LARGEST_WEIGHT) -> Comparison:
    """Return both sides as models, with sampled values for their leaves.

    `lengths` belong to the draws, in order. Axes of weights with more than `largest` elements are shortened.

    Raises:
        Unchecked: If a weight is too large to shorten, or if the shape or dtype of a leaf is unknown.
    """
    shortened = shortened_axes(cut, largest)
    before, after = (_fp32(runnable(region, shortened)) for region in (cut.before, cut.after))
    weights = [*before.weights.values(), *after.weights.values()]
    count = len(DRAWS)
    if any(weight.nbytes // weight.dtype.itemsize > _LARGE for weight in weights):
        count = 2
    if not cut.before.leaves and not cut.after.leaves:
        count = 1  # only weights are read, and they are the same in every draw
    draws = [(DRAWS[index], _leaves(cut, lengths[index], shortened)) for index in range(count)]
    return Comparison(cut, before, after, accuracy, shortened, draws)


def _leaves(cut: Cut, lengths: Lengths, shortened: Mapping[int, int]) -> dict[str, Array]:
    bounds = index_bounds((*cut.before.nodes, *cut.after.nodes), shortened)
    sampler = Sampler(lengths, bounds)
    found: dict[str, Array] = {}
    for leaf in (*cut.before.leaves, *cut.after.leaves):
        shape = lengths.shape_of(leaf)
        if leaf.name in found:
            continue
        if shape is None or leaf.dtype is None:
            raise Unchecked(f"the shape or dtype of {leaf.name} is unknown")
        found[leaf.name or ""] = sampler.sample(leaf.name or "", leaf.dtype, tuple(shortened.get(n, n) for n in shape))
    return found


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
    results: list[Sequence[Array] | ModelError] = []
    for leaves in feeds:
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
    return array if dtype is None else array.astype(dtype.numpy(), copy=False)
