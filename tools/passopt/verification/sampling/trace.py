"""Run a graph on samples, and record the true shape of every value and the numbers of small ones.

What the graph states about its values is not believed: shapes come from runs alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.hints import computed_integers, hints_of
from passopt.verification.sampling.lengths import (
    Lengths,
    around,
    assignments,
    can_be_joined,
    free_inputs,
    symbols_of,
    tied,
)
from passopt.verification.sampling.samples import Sample, Unsampled, hides_a_row, length_of, made
from passopt.verification.sampling.traced_graph import Run, TracedGraph, is_finite, without_bf16
from passopt.verification.sampling.values import INTEGERS, STYLES, Style, index_bounds, is_natural

#: The number of samples that are kept, of a model with its weights and of one without, and how many may be tried.
_ENOUGH, _ENOUGH_LARGE, _TRIED = 10, 4, 64
#: With fewer lengths than this, others are looked for among those that tie some symbols.
_FEW = 3
#: The number of samples at lengths that the graph compares with, and the most elements of their inputs.
_HINTED, _CHEAP = 9, 1 << 15
#: The number of samples near numbers that the graph compares with, since there may be more of these than elements.
_TURNS = 3


@dataclasses.dataclass(frozen=True)
class Trace:
    """The runs of one graph on all samples that are legal for it.

    `problem` says why there are none, if so. `real` is true if the graph ran with its own weights. `unknown` are
    operators that onnxruntime does not know, without which and without what follows from them the graph ran. `unrun`
    are the bodies that ran in none of the runs, in words.
    """

    runs: tuple[Run, ...]
    problem: str = ""
    real: bool = True
    unknown: tuple[str, ...] = ()
    unrun: tuple[str, ...] = ()

    def has(self, name: str | None) -> bool:
        """Return whether a run can start from the value: its shape is known in every run, and its type can be fed."""
        return bool(self.runs) and all(name in run.shapes and name not in run.narrow for run in self.runs)


def trace(model: onnx_ir.Model, samples: Sequence[Sample] = (), seed: int = 0) -> Trace:
    """Run the graph on samples of its inputs, and record what it computes.

    Args:
        model: The graph. A graph of ranks runs as rank 0, alone: that shows its shapes.
        samples: The samples to run; by default, samples are made, and those on which the graph fails are dropped.
        seed: The seed of samples that are made.
    """
    try:
        traced = TracedGraph(model)
    except ModelError as error:
        return Trace((), f"the graph does not run by itself: {error}")
    if samples:
        found = [run for sample in samples if (run := traced.run(sample)) is not None]
    else:
        try:
            found = _legal(model, traced, seed)
        except Unsampled as reason:
            return Trace((), str(reason))
    problem = "" if found else f"the graph runs on none of the inputs that were tried: {traced.problem}"
    return Trace(tuple(found), problem, traced.real, tuple(traced.unknown), traced.body_runs.unrun())


def legal_samples(model: onnx_ir.Model, session: Session, seed: int = 0) -> tuple[list[Sample], str]:
    """Return samples on which a session of the graph runs, or else the first error of a run.

    Args:
        model: The graph.
        session: The graph in onnxruntime.
        seed: The seed of the samples.
    """
    runner = _Outputs(session)
    try:
        return [run.sample for run in _legal(model, runner, seed)], runner.problem
    except Unsampled as reason:
        return [], str(reason)


class _Runner(Protocol):
    """Runs a graph on samples; `problem` is the first error, and `real` is true if the graph has its own weights."""

    problem: str
    real: bool

    def run(self, sample: Sample) -> Run | None:
        """Return what the graph computes of the sample, or None if it fails on it."""


class _Outputs:
    """Runs a session, and records its outputs."""

    def __init__(self, session: Session) -> None:
        self.problem = ""
        self.real = True
        self._session = session

    def run(self, sample: Sample) -> Run | None:
        try:
            outputs = self._session.run(without_bf16(sample.feeds))
        except ModelError as error:
            self.problem = self.problem or str(error)
            return None
        arrays = {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}
        finite = all(is_finite(value) for value in arrays.values())
        return Run(sample, {name: value.shape for name, value in arrays.items()}, {}, finite=finite)


def _legal(model: onnx_ir.Model, traced: _Runner, seed: int) -> list[Run]:
    """Return runs on all samples that the graph runs on: with other lengths as far as possible, and in each style."""
    search = _Search(model, traced, seed, _ENOUGH if traced.real else _ENOUGH_LARGE)
    for lengths in assignments(model):
        search.add(lengths)
    runs = search.runs or search.doubtful
    if runs and _are_tied(runs) and len(symbols_of(model)) > 1:
        del runs[_FEW:]
        search.tried = 0
        for lengths in tied(model, runs[0].sample.lengths):
            search.add(lengths)
    for _ in STYLES if runs else ():
        search.add(runs[0].sample.lengths)
    if traced.real and (search.runs or search.doubtful):
        _add_hinted(model, search)
    return search.runs or search.doubtful


def _add_hinted(model: onnx_ir.Model, search: _Search) -> None:
    """Add samples where results may change: at numbers and lengths that the graph compares with, and ends of tables."""
    first_sample = (search.runs or search.doubtful)[0].sample
    lengths_of = [run.sample.lengths for run in search.runs or search.doubtful]
    first, largest = lengths_of[0], max(lengths_of, key=lambda lengths: math.prod(lengths.known.values()))
    hints = hints_of(model)
    near = (*hints.floats, *hints.integers)
    turns = range(_TURNS if near else 1)
    styles = [Style("left", "near", near=near, turn=turn) for turn in turns if hints.floats]
    if hints.infinite:
        styles += [Style("left", "near", near=(math.inf, -math.inf, math.nan))]
    if computed_integers(model):
        styles += [Style("left", "large", "near", near=near, turn=turn) for turn in turns]
        styles.append(Style("left", "large", "wide"))
    if index_bounds(free_inputs(model), length_of):
        styles.append(Style("none", last=True))
    if hides_a_row(first_sample.feeds):
        styles.append(Style("none"))
    for style in styles:
        search.add_sample(largest, style)
    if hints.steep:
        search.add_sample(largest, Style("none", "steep"), finite=True)
    smallest = min(lengths_of, key=lambda lengths: math.prod(lengths.known.values()) or math.inf)
    for turn in range(_TURNS) if hints.repeats else ():
        for lengths in (largest, smallest):
            search.add_sample(lengths, Style("left", "near" if near else "normal", "rounds", near=near, turn=turn))
    truths = [value.name or "" for value in free_inputs(model) if value.dtype == onnx_ir.DataType.BOOL]
    for turn, name in enumerate(truths[:_FEW] if len(truths) > 1 else (), start=1):
        for truth in (True, False):
            search.add_sample(first, Style("none", truth=truth, flipped=frozenset({name}), turn=turn))
    for turn in range(1, _TURNS) if not first.known else ():  # other numbers where no lengths bring them
        for truth in (True, False):
            search.add_sample(first, Style(truth=truth, turn=turn))
    added = 0
    for lengths in around(model, first, hints.lengths):
        if added < _HINTED and _is_cheap(model, lengths):
            added += search.add_sample(lengths, STYLES[0])


def _is_cheap(model: onnx_ir.Model, lengths: Lengths) -> bool:
    shapes = [lengths.shape_of(value) for value in free_inputs(model)]
    return all(shape is not None and math.prod(shape) <= _CHEAP for shape in shapes)


def _are_tied(runs: Sequence[Run]) -> bool:
    """Return whether hardly any lengths were found, or only such in which all symbols are equal."""
    found = {tuple(run.sample.lengths.known.values()) for run in runs}
    return len(found) < _FEW or all(len(set(lengths)) == 1 for lengths in found)


class _Search:
    """The samples that a graph ran on; `doubtful` ones gave outputs of other shapes than the graph states."""

    def __init__(self, model: onnx_ir.Model, traced: _Runner, seed: int, enough: int) -> None:
        self.runs: list[Run] = []
        self.doubtful: list[Run] = []
        self.tried = 0
        self._model = model
        self._traced = traced
        self._seed = seed
        self._enough = enough
        self._seen: set[tuple[object, ...]] = set()
        #: Huge numbers show what narrowing makes of them. Elsewhere they only show where kernels overflow.
        self._narrows = any(_narrows(node) for node in model.graph.all_nodes())
        self._has_integers = any(
            value.dtype is not None and value.dtype.is_integer() and not is_natural(value.name or "")
            for value in model.graph.inputs
        )

    def add(self, lengths: Lengths) -> None:
        """Try lengths, in the style that is next; with plain integers, if those of the style are refused."""
        if not can_be_joined(self._model, lengths):
            return
        found = self.runs or self.doubtful
        style = STYLES[len(found) % len(STYLES)]
        if style.floats == "large" and self._narrows:
            style = dataclasses.replace(style, floats="huge")
        kinds = (style.integers, "natural", *INTEGERS) if self._has_integers else (style.integers,)
        for kind in dict.fromkeys(kinds):
            sample = made(self._model, lengths, dataclasses.replace(style, integers=kind), self._seed)
            if len(found) >= self._enough or self.tried >= _TRIED or _kind(sample) in self._seen:
                return
            self.tried += 1
            run = self._traced.run(sample)
            if run is not None:
                self._seen.add(_kind(sample))
                (self.runs if _keeps_outputs(self._model, run) else self.doubtful).append(run)
                return

    def add_sample(self, lengths: Lengths, style: Style, *, finite: bool = False) -> bool:
        """Try one more sample, beyond those that are enough; return whether the graph ran on it.

        With `finite`, it must compute nothing but finite numbers, since another graph may overflow elsewhere.
        """
        sample = made(self._model, lengths, style, self._seed)
        if _kind(sample) in self._seen or not can_be_joined(self._model, lengths):
            return False
        self._seen.add(_kind(sample))
        run = self._traced.run(sample)
        if run is None or bool(self.runs) != _keeps_outputs(self._model, run) or (finite and not run.finite):
            return False
        (self.runs or self.doubtful).append(run)
        return True


def _narrows(node: onnx_ir.Node) -> bool:
    if node.op_type in {"CastLike", "QuantizeLinear"}:
        return True
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and not to.is_ref() and _is_narrow(onnx_ir.DataType(to.as_int()))


def _is_narrow(dtype: onnx_ir.DataType) -> bool:
    return dtype != onnx_ir.DataType.STRING and dtype.bitwidth < 16 and dtype != onnx_ir.DataType.BOOL


def _kind(sample: Sample) -> tuple[object, ...]:
    return tuple(sorted(sample.lengths.known.items())), sample.lengths.ndim, sample.style


def _keeps_outputs(model: onnx_ir.Model, run: Run) -> bool:
    """Return whether the outputs have the lengths that the model states; inputs that change these are not meant."""
    for value in model.graph.outputs:
        shape = run.shapes.get(value.name or "")
        if shape is None or value.shape is None or not isinstance(value.type, onnx_ir.TensorType):
            continue
        dims = list(value.shape.dims)
        if len(dims) != len(shape) or any(
            isinstance(dim, int) and dim != n for dim, n in zip(dims, shape, strict=True)
        ):
            return False
    return True
