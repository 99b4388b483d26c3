"""Run a graph on samples, and record the true shape of every value and the numbers of small ones.

What the graph states about its values is not believed: shapes come from runs alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.weights.lazy_weight import SMALL_BYTES, LazyWeight
from passopt.targets.onnxruntime.joined_ranks import rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.lengths import Lengths, symbols_of, tied
from passopt.verification.sampling.samples import Sample, Unsampled, candidates, made

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Models with more bytes of weights than this run with zeros as weights, which take no memory, and show shapes only.
_LARGEST = 96 << 20
#: The most elements of a value whose numbers are kept.
_KEPT = 1 << 16
#: The number of samples that are kept, of a model with its weights and of one without, and how many may be tried.
_ENOUGH, _ENOUGH_LARGE, _TRIED = 10, 4, 48


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of a graph computed: the shape of each tensor by name, and the numbers of those that are small."""

    sample: Sample
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The runs of one graph on all samples that are legal for it.

    `problem` says why there are none, if so. `real` is true if the graph ran with its own weights.
    """

    runs: tuple[Run, ...]
    problem: str = ""
    real: bool = True

    def has(self, name: str | None) -> bool:
        """Return whether the shape of the value is known in every run."""
        return bool(self.runs) and all(name in run.shapes for run in self.runs)


def trace(model: onnx_ir.Model, samples: Sequence[Sample] = (), seed: int = 0) -> Trace:
    """Run the graph on samples of its inputs, and record what it computes.

    Args:
        model: The graph. A graph of ranks runs as rank 0, alone: that shows its shapes.
        samples: The samples to run; by default, samples are made, and those on which the graph fails are dropped.
        seed: The seed of samples that are made.
    """
    try:
        traced = _Traced(model)
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
    return Trace(tuple(found), problem, traced.real)


def _legal(model: onnx_ir.Model, traced: _Traced, seed: int) -> list[Run]:
    enough = _ENOUGH if traced.real else _ENOUGH_LARGE
    runs: list[Run] = []
    doubtful: list[Run] = []
    seen: set[tuple[object, ...]] = set()
    for count, sample in enumerate(candidates(model, seed)):
        if len(runs) >= enough or count >= _TRIED:
            break
        run = traced.run(sample)
        if run is not None and (key := _kind(sample)) not in seen:
            seen.add(key)
            (runs if _keeps_outputs(model, run) else doubtful).append(run)
    runs = runs or doubtful[:enough]
    return runs + list(_untied(model, traced, runs, seed))


def _keeps_outputs(model: onnx_ir.Model, run: Run) -> bool:
    """Return whether the outputs have the lengths that the model states; inputs that change these are not meant."""
    for value in model.graph.outputs:
        shape = run.shapes.get(value.name or "")
        if shape is None or value.shape is None or not isinstance(value.type, onnx_ir.TensorType):
            continue
        dims = list(value.shape.dims)
        if len(dims) != len(shape) or any(isinstance(dim, int) and dim != n for dim, n in zip(dims, shape, strict=True)):
            return False
    return True


def _kind(sample: Sample) -> tuple[object, ...]:
    return tuple(sorted(sample.lengths.known.items())), sample.lengths.ndim, sample.style


def _untied(model: onnx_ir.Model, traced: _Traced, runs: Sequence[Run], seed: int) -> Iterator[Run]:
    """Yield runs in which symbols differ as far as the graph allows, where it runs only with all symbols equal."""
    equal = [run for run in runs if len(set(run.sample.lengths.known.values())) < 2]
    if len(equal) < len(runs) or not runs or len(symbols_of(model)) < 2:
        return
    found = 0  # legal samples
    for lengths in tied(model, runs[0].sample.lengths):
        run = traced.run(made(model, lengths, runs[0].sample.style, seed))
        if run is not None:
            found += 1
            yield run
        if found >= 6:
            return


class _Traced:
    """A graph in onnxruntime that gives all its values; `problem` is the first error of a run."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.problem = ""
        twin = _alone(model)
        tensors = [item.const_value for item in twin.graph.initializers.values() if item.const_value is not None]
        self.real = sum(tensor.nbytes for tensor in tensors) <= _LARGEST
        self._given = {} if self.real else _blank_weights(twin)
        self._constants = {
            name: tuple(value.const_value.shape.numpy())
            for name, value in twin.graph.initializers.items()
            if value.const_value is not None
        }
        self._shapes = _expose(twin, shapes_only=not self.real)
        try:
            self._session = Session(twin, optimize=False)
        except ModelError:
            _forget_types(twin)
            self._session = Session(twin, optimize=False)

    def run(self, sample: Sample) -> Run | None:
        """Return what the graph computes of the sample, or None if it fails on it."""
        try:
            outputs = self._session.run({**sample.feeds, **self._given})  # type: ignore[dict-item]
        except ModelError as error:
            self.problem = self.problem or str(error)
            return None
        fed = {name: value for name, value in sample.feeds.items() if not isinstance(value, list)}
        shapes = {**self._constants, **{name: value.shape for name, value in fed.items()}}
        arrays = dict(fed)
        for name, value in outputs.items():
            if name in self._shapes:
                shapes[self._shapes[name]] = tuple(int(length) for length in value)
            elif isinstance(value, np.ndarray):
                shapes[name] = value.shape
                if value.size <= _KEPT:
                    arrays[name] = value
        return Run(sample, shapes, arrays)


def _alone(model: onnx_ir.Model) -> onnx_ir.Model:
    """Return a clone that runs on one CPU by itself: bf16 as fp32, and of a graph of ranks only rank 0."""
    twin = rank_models(model)[0] if degree_of(model) > 1 else model
    twin = fp32_twin(twin)
    for node in list(twin.graph):
        if is_collective(node):
            _replace_collective(twin.graph, node)
    return twin


def _replace_collective(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Let a rank meet only copies of itself: AllReduce hands on, AllGather joins equal parts."""
    value = node.inputs[0]
    if node.op_type == "AllGather":
        size, axis = (node.attributes[name].as_int() for name in ("group_size", "axis"))
        made = onnx_ir.node("Concat", [value] * size, {"axis": axis})
    else:
        made = onnx_ir.node("Identity", [value])
    made.outputs[0].name, node.outputs[0].name = node.outputs[0].name, f"{node.outputs[0].name}.collective"
    made.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _blank_weights(model: onnx_ir.Model) -> dict[str, Array]:
    """Turn large weights into inputs, and return zeros for them; pages that are only read take no memory."""
    given = {}
    inputs = {value.name for value in model.graph.inputs}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= SMALL_BYTES or not isinstance(tensor, LazyWeight):
            continue
        given[name] = np.zeros(tuple(tensor.shape.numpy()), tensor.dtype.numpy())
        del model.graph.initializers[name]
        value.const_value = None
        if name not in inputs:
            model.graph.inputs.append(value)
    return given


def _expose(model: onnx_ir.Model, *, shapes_only: bool) -> dict[str, str]:
    """Make every value an output, or the shape of every value of floats; return the outputs that are such shapes."""
    outputs = model.graph.outputs
    present = {value.name for value in outputs}
    shapes: dict[str, str] = {}
    for node in list(model.graph):
        for value in node.outputs:
            if not value.name or value.name in present or isinstance(value.type, onnx_ir.OptionalType):
                continue
            present.add(value.name)
            if not shapes_only or not _is_float(value):
                value.shape = None  # what the graph states may be wrong, and onnxruntime would complain
                outputs.append(value)
                continue
            shape = onnx_ir.node("Shape", [value])
            shape.outputs[0].name = f"{value.name}.traced-shape"
            shapes[shape.outputs[0].name] = value.name
            model.graph.append(shape)
            outputs.append(shape.outputs[0])
    return shapes


def _forget_types(model: onnx_ir.Model) -> None:
    """Drop the types that the main graph states of what its nodes compute, which onnxruntime finds by itself."""
    for node in model.graph:
        for value in node.outputs:
            value.type = value.shape = None


def _is_float(value: onnx_ir.Value) -> bool:
    return value.dtype is None or not (value.dtype.is_integer() or value.dtype == onnx_ir.DataType.BOOL)
