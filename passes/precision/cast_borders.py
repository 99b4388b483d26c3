"""Find what the pass `cast` leaves in the dtypes that it has, and where casts must stand around it.

These are nodes with bodies, calls of functions, operators of other domains or with values of unknown type, and whatever
makes or reads sequences and optional values: what happens inside of them is not known, so they must see no change.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import onnx
import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.graph.attributes import bodies
from passopt.ir.graph.collectives import is_collective
from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.ir.weights.lazy_weight import constant_tensor

DataType = onnx_ir.DataType

#: passopt's own attention functions, whose dtypes the pass knows.
_ALIBI = frozenset({ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE})
#: How many operators a note lists by name.
_SHOWN = 4


def is_float(value: onnx_ir.Value | None) -> bool:
    """Return True if the value is a tensor of one of the dtypes that the pass casts: fp32, fp16 or bf16."""
    return value is not None and isinstance(value.type, onnx_ir.TensorType) and value.dtype in MODEL_FLOATS


def is_alibi(node: onnx_ir.Node) -> bool:
    """Return True for a call of one of passopt's own attention functions."""
    return node.domain == DOMAIN and node.op_type in _ALIBI


class Borders:
    """The nodes of the main graph that keep their dtypes, and the dtypes of all that crosses their borders.

    Args:
        model: The model, whose values have types as far as they are known.

    Attributes:
        nodes: The nodes that keep their dtypes.
        given: The dtype of each floating output of these nodes.
        read: The dtype in which these nodes, and nodes inside of their bodies, read each floating value of the main
            graph, by node and input number.
        results: The outputs of bodies that are values of the main graph: the body, the number, and the dtype.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        self._functions = model.functions
        self._opset = model.graph.opset_imports.get("", 0)
        self._outer = {*model.graph.inputs, *model.graph.initializers.values()}
        self._outer.update(value for node in model.graph for value in node.outputs)
        self.nodes = {node for node in model.graph if self._keeps(node)}
        self.given: dict[onnx_ir.Value, DataType] = {}
        self.read: dict[tuple[onnx_ir.Node, int], DataType] = {}
        self.results: list[tuple[onnx_ir.Graph, int, DataType]] = []
        self._captured: dict[onnx_ir.Node, list[onnx_ir.Value]] = {}
        for node in model.graph:
            if node in self.nodes:
                self._keep(node)

    def sources(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Return the values of the main graph that a kept node reads, directly or inside of its bodies."""
        return [*(value for value in node.inputs if value is not None), *self._captured[node]]

    def note(self) -> str:
        """Say for the user which nodes keep floating values in the dtypes that they have; empty if there are none."""
        kept = [node for node in self.nodes if any(map(is_float, [*self.sources(node), *node.outputs]))]
        if not kept:
            return ""
        counts = collections.Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in kept)
        shown = ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())[:_SHOWN])
        calls = any(node.op_identifier() in self._functions for node in kept)
        hint = "; run inline-functions first to cast inside of calls" if calls else ""
        nodes = "1 node keeps the dtypes that it has" if len(kept) == 1 else f"{len(kept)} nodes keep their dtypes"
        return f"{nodes}: {shown}{', …' * (len(counts) > _SHOWN)}{hint}"

    def _keeps(self, node: onnx_ir.Node) -> bool:
        if is_alibi(node) or is_collective(node):
            return False
        if node.domain or node.op_identifier() in self._functions or next(bodies(node), None) is not None:
            return True
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        if not all(isinstance(value.type, onnx_ir.TensorType) for value in values):
            return True
        if node.op_type == "Constant" and constant_tensor(node.outputs[0]) is None:
            return True  # It is sparse.
        if node.op_type == "BitCast":
            return True  # The bits of another dtype are other numbers.
        return not onnx.defs.has(node.op_type, self._opset, "")

    def _keep(self, node: onnx_ir.Node) -> None:
        self.given.update((value, value.dtype) for value in node.outputs if is_float(value) and value.dtype)
        self._read(node)
        captured: dict[onnx_ir.Value, None] = {}
        for graph in _inner_graphs(node):
            for inner in graph:
                captured.update((value, None) for value in self._read(inner))
            for index, value in enumerate(graph.outputs):
                if value in self._outer and is_float(value) and value.dtype is not None:
                    self.results.append((graph, index, value.dtype))
                    captured[value] = None
        self._captured[node] = list(captured)

    def _read(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Note in which dtypes a node reads values of the main graph, and return these values."""
        found = [(index, value) for index, value in enumerate(node.inputs) if value in self._outer]
        for index, value in found:
            if is_float(value) and value is not None and value.dtype is not None:
                self.read[node, index] = value.dtype
        return [value for _, value in found if value is not None]


def _inner_graphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """Yield the bodies of a node, and the bodies of the nodes inside of them."""
    for body in bodies(node):
        yield body
        for inner in body:
            yield from _inner_graphs(inner)
