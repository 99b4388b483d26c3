"""Run a graph on samples, and record the true shape of every value and the numbers of small ones.

What the graph states about its values is not believed: shapes come from runs alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
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
from passopt.verification.sampling.lengths import Lengths, assignments, symbols_of, tied
from passopt.verification.sampling.samples import Sample, Unsampled, made
from passopt.verification.sampling.values import INTEGERS, STYLES, is_natural

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Models with more bytes of weights than this run with zeros as weights, which take no memory, and show shapes only.
_LARGEST = 96 << 20
#: The most elements of a value whose numbers are kept.
_KEPT = 1 << 16
#: How onnxruntime names an operator that it does not know, and how many of them a graph may have.
_NOT_KNOWN = re.compile(
    r"(?:implementation for |Op \(|No Op registered for |:)([A-Za-z_]\w*)"
    r"(?:\(-?\d+\)|\) \[TypeInferenceError\]| with domain)"
)
_UNKNOWN = 6
#: The number of samples that are kept, of a model with its weights and of one without, and how many may be tried.
_ENOUGH, _ENOUGH_LARGE, _TRIED = 10, 4, 64

_BF16 = onnx_ir.DataType.BFLOAT16.numpy()


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of a graph computed: the shape of each tensor by name, and the numbers of those that are small.

    `narrow` are the values of less than 8 bits or in 8-bit floats, which numpy does not hold: their numbers are given
    as wider ones.
    """

    sample: Sample
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]
    narrow: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Trace:
    """The runs of one graph on all samples that are legal for it.

    `problem` says why there are none, if so. `real` is true if the graph ran with its own weights. `unknown` are
    operators that onnxruntime does not know, without which and without what follows from them the graph ran.
    """

    runs: tuple[Run, ...]
    problem: str = ""
    real: bool = True
    unknown: tuple[str, ...] = ()

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
    return Trace(tuple(found), problem, traced.real, tuple(traced.unknown))


def _legal(model: onnx_ir.Model, traced: _Traced, seed: int) -> list[Run]:
    """Return runs on all samples that the graph runs on: with other lengths as far as possible, and in each style."""
    search = _Search(model, traced, seed, _ENOUGH if traced.real else _ENOUGH_LARGE)
    for lengths in assignments(model):
        search.add(lengths)
    runs = search.runs or search.doubtful
    if runs and len({tuple(run.sample.lengths.known.items()) for run in runs}) < 3 and symbols_of(model):
        search.tried = 0
        for lengths in tied(model, runs[0].sample.lengths):
            search.add(lengths)
    for _ in STYLES if runs else ():
        search.add(runs[0].sample.lengths)
    return search.runs or search.doubtful


class _Search:
    """The samples that a graph ran on; `doubtful` ones gave outputs of other shapes than the graph states."""

    def __init__(self, model: onnx_ir.Model, traced: _Traced, seed: int, enough: int) -> None:
        self.runs: list[Run] = []
        self.doubtful: list[Run] = []
        self.tried = 0
        self._model = model
        self._traced = traced
        self._seed = seed
        self._enough = enough
        self._seen: set[tuple[object, ...]] = set()
        self._has_integers = any(
            value.dtype is not None and value.dtype.is_integer() and not is_natural(value.name or "")
            for value in model.graph.inputs
        )

    def add(self, lengths: Lengths) -> None:
        """Try lengths, in the style that is next; with plain integers, if those of the style are refused."""
        found = self.runs or self.doubtful
        style = STYLES[len(found) % len(STYLES)]
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
        self._narrow = _widen_narrow(twin)
        self.unknown: list[str] = []
        self._session = self._opened(twin)
        self._session.leave_out_narrow()

    def _opened(self, twin: onnx_ir.Model) -> Session:
        """Return a session of the graph, without wrongly stated types and what onnxruntime does not know."""
        for attempt in range(_UNKNOWN):
            try:
                return Session(twin, optimize=False)
            except ModelError as error:
                match = _NOT_KNOWN.search(str(error))
                if match is None and attempt:
                    raise
                if match is None:
                    _forget_types(twin)
                elif not _leave_out(twin, match[1]):
                    raise
                else:
                    self.unknown.append(match[1])
        raise ModelError(f"onnxruntime does not know the operators {', '.join(self.unknown)} and more")

    def run(self, sample: Sample) -> Run | None:
        """Return what the graph computes of the sample, or None if it fails on it."""
        try:
            outputs = self._session.run({**_without_bf16(sample.feeds), **self._given})
        except ModelError as error:
            self.problem = self.problem or str(error)
            return None
        fed = {name: value for name, value in sample.feeds.items() if not isinstance(value, list)}
        shapes = {**self._constants, **{name: value.shape for name, value in fed.items()}}
        arrays = dict(fed)
        narrow = set()
        for name, value in outputs.items():
            if name in self._narrow:
                name = self._narrow[name]
                narrow.add(name)
            if name in self._shapes:
                shapes[self._shapes[name]] = tuple(int(length) for length in value)
            elif isinstance(value, np.ndarray):
                shapes[name] = value.shape
                if value.size <= _KEPT:
                    arrays[name] = value
        return Run(sample, shapes, arrays, frozenset(narrow))


def _without_bf16(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those in bf16 as fp32, which is what the twin of a bf16 graph takes."""
    return {
        name: value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == _BF16 else value
        for name, value in feeds.items()
    }


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


def _widen_narrow(model: onnx_ir.Model) -> dict[str, str]:
    """Add outputs that hold the numbers of narrow values as wide ones; return what each of them stands for."""
    widened = {}
    for value in list(model.graph.outputs):
        kind = wide_type(value.dtype)
        if kind is None or not value.name:
            continue
        cast = onnx_ir.node("Cast", [value], {"to": int(kind)})
        cast.outputs[0].name = f"{value.name}.traced-numbers"
        widened[cast.outputs[0].name] = value.name
        model.graph.append(cast)
        model.graph.outputs.append(cast.outputs[0])
    return widened


def wide_type(dtype: onnx_ir.DataType | None) -> onnx_ir.DataType | None:
    """Return the type that holds the numbers of a narrow type for numpy; None for types that numpy holds."""
    if dtype is None or dtype in {onnx_ir.DataType.STRING, onnx_ir.DataType.BOOL}:
        return None
    if dtype.is_integer():
        return onnx_ir.DataType.INT32 if dtype.bitwidth < 8 else None
    return onnx_ir.DataType.FLOAT if dtype.bitwidth <= 8 else None


def _leave_out(model: onnx_ir.Model, op_type: str) -> bool:
    """Drop the nodes of an operator, and all that is computed from them; return whether anything is left."""
    gone: set[onnx_ir.Node] = set()
    for node in model.graph:
        inside = [item.op_type for graph in _bodies(node) for item in graph.all_nodes()]
        if op_type in (node.op_type, *inside) or any(
            value is not None and value.producer() in gone for value in (*node.inputs, *_captured(node))
        ):
            gone.add(node)
    kept = [value for value in model.graph.outputs if value.producer() not in gone]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    model.graph.remove(gone, safe=False)
    return bool(gone and kept)


def _bodies(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    graphs = []
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
    return graphs


def _captured(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    return [value for graph in _bodies(node) for item in graph.all_nodes() for value in item.inputs]


def _forget_types(model: onnx_ir.Model) -> None:
    """Drop the types that the main graph states of what its nodes compute, which onnxruntime finds by itself."""
    for node in model.graph:
        for value in node.outputs:
            value.type = value.shape = None


def _is_float(value: onnx_ir.Value) -> bool:
    return value.dtype is None or not (value.dtype.is_integer() or value.dtype == onnx_ir.DataType.BOOL)
