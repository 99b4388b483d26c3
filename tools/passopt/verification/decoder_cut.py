"""Cut a decoder at its residual stream, one piece per layer, so that a check needs one layer's weights at a time.

A boundary of layer i is the single value through which everything from layer i on depends on tokens and on the caches
of the layers before. Names and operators do not matter; only the contract's past.i inputs and present.i outputs do.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import INPUT_IDS, LOGITS, decoder_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_GRAPHS = {onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS}


class _Kind(enum.IntEnum):
    """The kind of data a value depends on; an operator's result has the largest kind of its inputs."""

    CONSTANT = 0
    #: Masks, positions and shapes, which are computed once for all layers without tokens or caches.
    SHARED = 1
    CACHE = 2
    TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a decoder that runs as a model of its own.

    `carried` is the value it takes from the piece before, `result` the value it hands on; "" where there is none.
    `targets` are all its outputs.
    """

    name: str
    carried: str
    result: str
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The places where a model may be cut.

    `boundaries[i]` is the name of the value that enters layer i, the last one enters the head; "" means no boundary.
    `shared` names values that the prelude computes and all pieces may read.
    """

    model: onnx_ir.Model
    boundaries: tuple[str, ...]
    shared: tuple[str, ...]

    def pieces(self, kept: Collection[int]) -> list[Piece]:
        """Return the embedding, the layers and the head as pieces, cut only at the boundaries in `kept`.

        Parts between which no boundary is kept are joined in one piece.
        """
        parts = ["embedding", *(f"layer {layer}" for layer in range(len(self.boundaries) - 1)), "head"]
        found, first = [], 0
        for end in [*sorted(kept), len(self.boundaries)]:
            members = parts[first : end + 1]
            name = members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}"
            carried = self.boundaries[first - 1] if first else ""
            result = self.boundaries[end] if end < len(self.boundaries) else ""
            present = [name for part in members if part.startswith("layer") for name in self._present(part)]
            found.append(Piece(name, carried, result, (result or LOGITS, *present)))
            first = end + 1
        return found

    def _present(self, part: str) -> list[str]:
        prefix = f"present.{part.removeprefix('layer ')}."
        return [name for value in self.model.graph.outputs if (name := value.name or "").startswith(prefix)]

    def prelude(self) -> onnx_ir.Model | None:
        """Return the graph that computes the shared values, or None if there are none."""
        return extract(self.model, self.shared, {}) if self.shared else None

    def graph(self, piece: Piece, given: Mapping[str, Array]) -> onnx_ir.Model:
        """Return the piece as a model that starts from the values in `given`; its inputs have the arrays' dtypes."""
        stops = {name: array for name, array in given.items() if name in {piece.carried, *self.shared}}
        return extract(self.model, piece.targets, stops)


def cut_decoder(model: onnx_ir.Model) -> Cut:
    """Find the values at which a decoder can be cut into layers.

    Raises:
        ModelError: If two layers are not connected through a single value, or if a node has a subgraph.
    """
    kinds = _kinds(model)
    layers = decoder_of(model).layers
    chains = [_bottlenecks(model, kinds, layer) for layer in range(layers + 1)]
    for layer in range(1, layers):
        if not chains[layer]:
            raise ModelError(
                f"cannot cut the graph before layer {layer}: no single value connects it with the layers before. "
                f"Verify without `layerwise`."
            )
    starts = [chain[-1] if chain else "" for chain in chains[:-1]]
    return Cut(model, (*starts, _end(chains)), _shared(model, kinds))


def _end(chains: Sequence[Sequence[str]]) -> str:
    """Return the name of the value at which the last layer ends, or "" if it is unknown.

    The last layer ends after as many bottlenecks behind its attention as the other layers have.
    """
    depths = {len(chain) for chain in chains[1:-1]}
    if len(depths) != 1:
        return ""
    depth, last = depths.pop(), chains[-1]
    return last[depth - 1] if len(last) > depth else ""


def _kinds(model: onnx_ir.Model) -> dict[onnx_ir.Value, _Kind]:
    kinds: dict[onnx_ir.Value, _Kind] = {}
    for value in model.graph.initializers.values():
        kinds[value] = _Kind.CONSTANT
    for value in model.graph.inputs:
        name = value.name or ""
        kinds[value] = _Kind.SHARED
        if name == INPUT_IDS:
            kinds[value] = _Kind.TOKENS
        elif name.startswith("past."):
            kinds[value] = _Kind.CACHE
    inputs = set(model.graph.inputs)
    for node in model.graph:
        if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            raise ModelError(f"cannot cut the graph: {node.op_type} {node.name!r} has a subgraph")
        kind = max((kinds[value] for value in node.inputs if value is not None), default=_Kind.CONSTANT)
        only_shape = node.op_type in {"Shape", "Size"} and not node.domain
        if only_shape and (kind <= _Kind.CACHE or node.inputs[0] in inputs):
            kind = min(kind, _Kind.SHARED)
        for value in node.outputs:
            kinds[value] = kind
    return kinds


def _bottlenecks(model: onnx_ir.Model, kinds: Mapping[onnx_ir.Value, _Kind], layer: int) -> list[str]:
    """Return the names of the values that every path into `layer` runs through.

    The paths lead from tokens and the caches before `layer` to the outputs of `layer`, of later layers and the logits.
    In a topological order of the values on such paths, the bottlenecks are the values that no edge skips.
    """
    graph = model.graph
    sources = [value for value in graph.inputs if value.name == INPUT_IDS or _layer_of(value, "past.") < layer]
    sources = [value for value in sources if kinds[value] >= _Kind.CACHE]
    sinks = {value for value in graph.outputs if value.name == LOGITS or _layer_of(value, "present.") >= layer}
    nodes = list(graph)
    reached = set(sources)
    for node in nodes:
        if any(value in reached for value in node.inputs):
            reached.update(value for value in node.outputs if kinds[value] >= _Kind.CACHE)
    useful = {value for value in sinks if value in reached}
    for node in reversed(nodes):
        if any(value in useful for value in node.outputs):
            useful.update(value for value in node.inputs if value in reached)
    ordered = [value for value in sources if value in useful]
    ordered += [value for node in nodes for value in node.outputs if value in useful]
    positions = {value: index for index, value in enumerate(ordered)}
    found = []
    furthest = max((positions[value] for value in sources if value in positions), default=0)
    for index, value in enumerate(ordered):
        if furthest <= index and value.producer() is not None:
            found.append(value.name or "")
        uses = [positions[out] for node in value.consumers() for out in node.outputs if out in positions]
        furthest = max(furthest, *uses, len(ordered) if value in sinks else 0)
    return found


def _layer_of(value: onnx_ir.Value, prefix: str) -> int:
    """Return the number of the layer in a name such as `past.3.key`.

    For any other name the result is out of range: large for the prefix `past.`, negative for `present.`.
    """
    name = value.name or ""
    if not name.startswith(prefix):
        return -1 if prefix == "present." else 1 << 30
    return int(name.split(".")[1])


def _shared(model: onnx_ir.Model, kinds: Mapping[onnx_ir.Value, _Kind]) -> tuple[str, ...]:
    """Return the names of shared values that operators combine with tokens or caches, in graph order."""
    found: dict[str, None] = {}
    for node in model.graph:
        if all(kinds[value] < _Kind.CACHE for value in node.outputs):
            continue
        for value in node.inputs:
            if value is not None and kinds[value] == _Kind.SHARED and value.producer() is not None:
                found[value.name or ""] = None
    return tuple(found)


def extract(
    model: onnx_ir.Model,
    targets: Iterable[str],
    stops: Mapping[str, Array],
) -> onnx_ir.Model:
    """Return a model of the nodes that compute `targets` from `stops` and the graph's inputs; its weights stay lazy."""
    graph = model.graph
    wanted = set(targets)
    ends = [value for node in graph for value in node.outputs if value.name in wanted]
    needed = _ancestors(ends, stops)
    made: dict[onnx_ir.Value | None, onnx_ir.Value | None] = {None: None}
    inputs, weights = [], []
    for value in needed:
        copy = made[value] = _copied(value)
        given = stops.get(value.name or "")
        if given is not None:
            copy.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(given.dtype))
            copy.shape = onnx_ir.Shape([None] * given.ndim)
            inputs.append(copy)
        elif value.is_initializer():
            copy.const_value = value.const_value
            weights.append(copy)
        elif value.producer() is None:
            inputs.append(copy)
    nodes = []
    for node in graph:
        computed = [made.get(value) if value.name not in stops else None for value in node.outputs]
        if all(value is None for value in computed):
            continue
        nodes.append(
            onnx_ir.Node(
                node.domain,
                node.op_type,
                [made[value] for value in node.inputs],
                node.attributes.values(),
                overload=node.overload,
                outputs=[copy or _unused(value) for value, copy in zip(node.outputs, computed, strict=True)],
                name=node.name,
            )
        )
    outputs = [made[value] for value in ends]
    piece = onnx_ir.Graph(
        inputs,
        outputs,  # type: ignore[arg-type]
        nodes=nodes,
        initializers=weights,
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    functions = [function.clone() for function in model.functions.values()]
    return onnx_ir.Model(piece, ir_version=model.ir_version, functions=functions)


def _ancestors(ends: Sequence[onnx_ir.Value], stops: Collection[str]) -> list[onnx_ir.Value]:
    """Return `ends` and all values that they are computed from, without looking behind `stops`."""
    found: dict[onnx_ir.Value, None] = {}
    work = list(ends)
    while work:
        value = work.pop()
        if value in found:
            continue
        found[value] = None
        node = value.producer()
        if node is not None and value.name not in stops:
            work.extend(operand for operand in node.inputs if operand is not None)
    return list(found)


def _unused(value: onnx_ir.Value) -> onnx_ir.Value:
    """Return a value for an output that nothing reads.

    It has a name unless the original has none, because operators such as Split count their named outputs.
    """
    return onnx_ir.Value(name=f"{value.name}.unused" if value.name else "")


def _copied(value: onnx_ir.Value) -> onnx_ir.Value:
    shape = None if value.shape is None else onnx_ir.Shape(value.shape.dims)
    return onnx_ir.Value(name=value.name, type=value.type, shape=shape)
