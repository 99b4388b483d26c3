"""Build the graph that gives all its values, or their shapes, and run it in onnxruntime."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.attributes import bodies
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.decoder import degree_of
from passopt.ir.graph.fp32_twin import fp32_twin
from passopt.ir.weights.lazy_weight import SMALL_BYTES, LazyWeight
from passopt.targets.onnxruntime.joined_ranks import rank_models
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.body_runs import PREFIX, BodyRuns
from passopt.verification.sampling.lengths import agree, takes_empty
from passopt.verification.sampling.samples import Sample

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
    #: Whether all numbers that it computed are finite.
    finite: bool = True


class TracedGraph:
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
        self._takes_empty = takes_empty(twin)
        self._joins = [
            (node.attributes["axis"].as_int(), [value.name or "" for value in node.inputs if value is not None])
            for node in twin.graph
            if node.op_type == "Concat" and not node.domain and "axis" in node.attributes
        ]
        self.body_runs = BodyRuns(twin)
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
        if not self._takes_empty and any(
            isinstance(item, np.ndarray) and not item.size for item in sample.feeds.values()
        ):
            self.problem = self.problem or "kernels of onnxruntime may not survive its empty inputs"
            return None
        try:
            outputs = self._session.run({**without_bf16(sample.feeds), **self._given})
        except ModelError as error:
            self.problem = self.problem or str(error)
            return None
        self.body_runs.take(outputs)
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
        for axis, names in self._joins:
            if not agree([shapes[name] for name in names if name in shapes], axis):
                self.problem = self.problem or f"{names[0]} and others are joined, and disagree in other axes"
                return None
        finite = all(is_finite(value) for value in arrays.values())
        return Run(sample, shapes, arrays, frozenset(narrow), finite)


def is_finite(array: Array) -> bool:
    """Return whether an array holds neither infinity nor NaN."""
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def without_bf16(feeds: Mapping[str, Any]) -> dict[str, Any]:
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
            if value.name.startswith(PREFIX):
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
        inside = [item.op_type for graph in bodies(node) for item in graph.all_nodes()]
        if op_type in (node.op_type, *inside) or any(
            value is not None and value.producer() in gone for value in (*node.inputs, *_captured(node))
        ):
            gone.add(node)
    kept = [value for value in model.graph.outputs if value.producer() not in gone]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    model.graph.remove(gone, safe=False)
    return bool(gone and kept)


def _captured(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    return [value for graph in bodies(node) for item in graph.all_nodes() for value in item.inputs]


def _forget_types(model: onnx_ir.Model) -> None:
    """Drop the types that the main graph states of what its nodes compute, which onnxruntime finds by itself."""
    for node in model.graph:
        for value in node.outputs:
            value.type = value.shape = None


def _is_float(value: onnx_ir.Value) -> bool:
    return value.dtype is None or not (value.dtype.is_integer() or value.dtype == onnx_ir.DataType.BOOL)
