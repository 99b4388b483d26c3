"""Tell values that are sampled from values that are computed: masks, positions and shapes are never sampled.

A cut reaches back through such cheap values to the graph's inputs, so that what is sampled there is consistent.
"""

from __future__ import annotations

import enum

import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.operators import RANDOM
from passopt.ir.weights.lazy_weight import SMALL_BYTES

_GRAPHS = {onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS}
_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulInteger", "Conv", "Einsum"})


class Kind(enum.IntEnum):
    """The kind of data a value depends on; an operator's result has the largest kind of its inputs."""

    CONSTANT = 0
    #: Computed from masks, positions and lengths.
    CONTROL = 1
    #: Computed from token ids, before they are looked up in an embedding or multiplied.
    TOKENS = 2
    #: Activations, which are sampled where a cut ends.
    DATA = 3


class Kinds:
    """Find what a value holds, such as token ids or activations, and remember it.

    This is safe while a graph is rewritten, because a rewrite keeps the kind of what it replaces.
    """

    def __init__(self) -> None:
        self._known: dict[onnx_ir.Value, Kind] = {}

    def of(self, value: onnx_ir.Value) -> Kind:
        """Return the kind of a value."""
        stack = [value]
        while stack:
            current = stack[-1]
            node = current.producer()
            if current in self._known:
                stack.pop()
            elif node is None:
                self._known[current] = _kind_of_leaf(current)
            else:
                waiting = [item for item in node.inputs if item is not None and item not in self._known]
                stack += waiting
                if not waiting:
                    kind = self._kind_of_result(node)
                    self._known.update(dict.fromkeys(node.outputs, kind))
        return self._known[value]

    def _kind_of_result(self, node: onnx_ir.Node) -> Kind:
        if node.op_type in RANDOM or has_subgraph(node):
            return Kind.DATA
        inputs = numbers_read(node)
        kind = max((self._known[item] for item in inputs), default=Kind.CONSTANT)
        if not inputs and node.inputs:  # such as a Shape, which reads no numbers
            return Kind.CONTROL
        if kind == Kind.TOKENS and (node.op_type in _PRODUCTS or _looks_up(node)):
            return Kind.DATA
        return kind


def numbers_read(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Return the inputs whose numbers the node reads; of its other inputs it reads only the shape or the dtype."""
    inputs = node.inputs
    if not node.domain and node.op_type in {"Shape", "Size"}:
        inputs = ()
    elif not node.domain and node.op_type == "CastLike":
        inputs = inputs[:1]
    return [item for item in inputs if item is not None]


def is_control_name(name: str) -> bool:
    """Return whether a graph input of this name says where tokens stand, not which tokens they are."""
    return "mask" in name.lower() or "position" in name.lower()


def has_subgraph(node: onnx_ir.Node) -> bool:
    """Return whether the node has a subgraph, as If, Loop and Scan do, and so reads values that are not its inputs."""
    return any(attribute.type in _GRAPHS for attribute in node.attributes.values())


def _kind_of_leaf(value: onnx_ir.Value) -> Kind:
    if value.is_initializer() and not value.is_graph_input():
        return Kind.CONSTANT
    if is_control_name(value.name or ""):
        return Kind.CONTROL
    return Kind.DATA if value.dtype in FLOATS else Kind.TOKENS


def _looks_up(node: onnx_ir.Node) -> bool:
    """Return whether the node is an embedding, which takes rows of a float or int8 table that is no small constant."""
    table = node.inputs[0] if node.op_type.startswith("Gather") and node.inputs else None
    if table is None or table.dtype not in FLOATS | {onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8}:
        return False
    tensor = table.const_value
    return tensor is None or len(tensor.shape) > 1 or tensor.nbytes > SMALL_BYTES
