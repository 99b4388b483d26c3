"""Find the residual stream of a decoder, with everything that writes to it and everything that reads it.

The stream is followed from the norm before the head through whatever treats all its channels alike. What reads or
writes it in any other way is an error that names the node, because nothing can be said of the channels behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.linears import Linear, find_linear
from passopt.ir.graph.lm_head import head_path
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant

_NORM = "RMSNormalization"
#: What to do about operators that are a norm, or a part of one.
_FUSE = "run the pipeline fuse first, which writes a norm as one operator"


class Unproven(Exception):
    """Raised with a node of which it is not proven what it does with the channels of the stream, and what to do."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear that reads the stream; `norm` is the norm before it, or None if it reads the stream itself."""

    linear: Linear
    norm: onnx_ir.Node | None


@dataclasses.dataclass
class ResidualStream:
    """The residual stream of a decoder, `width` channels wide.

    `tables` are the look-ups of embeddings, `writers` the linears that add to the stream, `vectors` the inputs of nodes
    that are a constant vector added to it, `norms` and `readers` what reads it. `values` are all values that hold the
    stream or, behind a norm, the stream divided by its length and multiplied by the norm's weight.
    """

    width: int
    tables: list[onnx_ir.Node] = dataclasses.field(default_factory=list)
    writers: list[Linear] = dataclasses.field(default_factory=list)
    vectors: list[tuple[onnx_ir.Node, int]] = dataclasses.field(default_factory=list)
    norms: list[onnx_ir.Node] = dataclasses.field(default_factory=list)
    readers: list[Reader] = dataclasses.field(default_factory=list)
    values: list[onnx_ir.Value] = dataclasses.field(default_factory=list)


def find_residual_stream(model: onnx_ir.Model) -> ResidualStream:
    """Return the stream of a decoder whose types are complete.

    Raises:
        Unproven: If there is no head behind a norm, or something reads or writes the stream in an unknown way.
    """
    norm = _last_norm(model)
    source = norm.inputs[0]
    assert source is not None
    width = _width(source)
    if not isinstance(width, int):
        raise Unproven(f"{called(norm)} reads {source.name}, whose number of channels is unknown")
    return _Walk(model.graph, width).run(source)


def _last_norm(model: onnx_ir.Model) -> onnx_ir.Node:
    """Return the norm from which the head reads."""
    path = head_path(model)
    if not path:
        raise Unproven("found no head: the output logits does not come from a linear")
    value = path[0].inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == _NORM and not node.domain:
            return node
        if node.op_type not in {"Cast", "Identity", "Slice", "Gather", "Mul", "Div"}:
            hint = _hint(node) if node.op_type == "LayerNormalization" else _FUSE
            raise Unproven(f"the head reads {called(node)}, expected an {_NORM}; {hint}")
        value = next((item for item in node.inputs if item is not None and item.producer() is not None), None)
    raise Unproven(f"{called(path[0])} is the head and reads no {_NORM}; {_FUSE}")


def _hint(node: onnx_ir.Node) -> str:
    if node.op_type == "LayerNormalization":
        return "LayerNormalization subtracts the mean of the channels, which a rotation does not keep"
    if node.op_type in {"Pow", "ReduceMean", "ReduceSumSquare", "Sqrt", "Mul", "Div"}:
        return _FUSE
    if node.op_type in {"Add", "Sub"}:
        return "it adds neither parts of the stream nor a constant of its width"
    if node.op_type in {"Abs", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}:
        return "rotate before int8"
    if node.domain:
        return "if it is an operator of onnxruntime, run decompose-contrib first"
    return "nothing is known of what it does with channels that are rotated: leave the pass out"


class _Walk:
    """Follows the stream from value to value, forwards and backwards."""

    def __init__(self, graph: onnx_ir.Graph, width: int) -> None:
        self._graph = graph
        self._found = ResidualStream(width)
        #: The norm that a value has passed, by the value.
        self._norms: dict[onnx_ir.Value, onnx_ir.Node | None] = {}
        self._left: list[onnx_ir.Value] = []
        self._vectors: dict[tuple[onnx_ir.Node, int], None] = {}

    def run(self, start: onnx_ir.Value) -> ResidualStream:
        self._visit(start, None, None)
        while self._left:
            value = self._left.pop()
            self._check(value)
            producer = value.producer()
            if producer is None:
                raise Unproven(f"{value.name} holds the stream and is an input of the graph")
            if not self._passes(value, producer):
                self._written(value, producer)
            for node, index in value.uses():
                if node.graph is not self._graph:
                    raise Unproven(f"{called(node)} reads {value.name} inside of a body; inline it first")
                if not self._passes(value, node):
                    self._read(value, node, index)
        self._found.vectors = list(self._vectors)
        self._found.values = list(self._norms)
        return self._found

    def _visit(self, value: onnx_ir.Value, norm: onnx_ir.Node | None, by: onnx_ir.Node | None) -> None:
        if value not in self._norms:
            self._norms[value] = norm
            self._left.append(value)
        elif self._norms[value] is not norm:
            raise Unproven(f"{value.name} is used both behind a norm and without it, by {_called(by)}")

    def _check(self, value: onnx_ir.Value) -> None:
        """Raise Unproven unless the last axis of a value holds the channels, and only nodes read it."""
        if value.is_graph_output():
            raise Unproven(f"{value.name} is an output of the graph: callers would see rotated channels")
        if _width(value) != self._found.width or value.dtype not in MODEL_FLOATS:
            kind = value.dtype.name if value.dtype is not None else "unknown"
            raise Unproven(
                f"{value.name} has the shape {dimensions(value)} and the dtype {kind}, expected floats with "
                f"{self._found.width} channels on the last axis"
            )

    def _passes(self, value: onnx_ir.Value, node: onnx_ir.Node) -> bool:
        """Visit all values that one node makes of another channel by channel; False if `value` is none of them."""
        norm = self._norms[value]
        joined = self._joined(node)
        if value not in joined:
            return False
        if norm is not None and node.op_type in {"Add", "Sub"}:
            raise Unproven(
                f"{called(node)} adds {value.name}, which is behind {called(norm)}, whose weight cannot be folded"
            )
        for item in joined:
            self._visit(item, norm, node)
        return True

    def _joined(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Return the operands and the result of a node that treats all channels alike; [] of any other node."""
        result = node.outputs[0] if node.outputs else None
        if result is None or node.domain not in {"", MICROSOFT}:
            return []
        inputs = list(node.inputs)
        first = inputs[0] if inputs else None
        if first is None:
            return []
        if node.domain:
            return [first, result] if node.op_type == "AllReduce" else []
        if node.op_type in {"Identity", "Cast"}:
            return [first, result]
        if node.op_type in {"Add", "Sub"}:
            return self._summands(node)
        if node.op_type in {"Mul", "Div"}:
            return self._multiplied(node)
        if node.op_type == "Where" and _is_zero(inputs[2]) and inputs[1] is not None and _width(first) == 1:
            return [inputs[1], result]
        picks = node.op_type in {"Slice", "Gather"} and constant_tensor(first) is None
        return [first, result] if picks and _keeps_channels(node, first) else []

    def _summands(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        values = [value for value in node.inputs if value is not None]
        for index, value in enumerate(values):
            if constant_tensor(value) is None:
                continue
            if dimensions(value) != [self._found.width] or value.dtype not in MODEL_FLOATS:
                return []
            self._vectors[node, index] = None
        return [*(value for value in values if constant_tensor(value) is None), node.outputs[0]]

    def _multiplied(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Return operand and result of a product with one number per position, or one number for all."""
        one, other = node.inputs
        if other is not None and one is not None and _width(other) in {1, ()} and _width(one) == self._found.width:
            return [one, node.outputs[0]]
        if one is not None and other is not None and node.op_type == "Mul" and _width(one) in {1, ()}:
            return [other, node.outputs[0]]
        return []

    def _written(self, value: onnx_ir.Value, node: onnx_ir.Node) -> None:
        norm = self._norms[value]
        if norm is node:
            return
        if node.op_type == _NORM and not node.domain:
            raise Unproven(
                f"{called(node)} makes {value.name}, which is added to the stream: its weight cannot be folded"
            )
        if norm is None and _looks_up(node):
            self._found.tables.append(node)
            return
        linear = find_linear(node)
        if norm is None and linear is not None and linear.output is value:
            self._found.writers.append(self._plain(linear, node, value))
            return
        raise Unproven(
            f"{called(node)} makes {value.name} of the stream, expected a linear, the look-up of an embedding, or a "
            f"sum; {_hint(node)}",
        )

    def _read(self, value: onnx_ir.Value, node: onnx_ir.Node, index: int) -> None:
        norm = self._norms[value]
        if node.op_type == "Shape" and not node.domain:
            return
        if node.op_type == _NORM and not node.domain and index == 0 and norm is None:
            self._check_norm(node, value)
            self._found.norms.append(node)
            self._visit(node.outputs[0], node, node)
            return
        linear = find_linear(node)
        if linear is not None and linear.input is value and index == 0:
            self._found.readers.append(Reader(self._plain(linear, node, value), norm))
            return
        behind = "the stream" if norm is None else f"{called(norm)} of the stream"
        wanted = f"an {_NORM}, a linear or a sum" if norm is None else "a linear"
        reason = _of_weight(node) if node.op_type in {"MatMul", "Gemm"} else _hint(node)
        raise Unproven(f"{called(node)} reads {value.name}, {behind}, expected {wanted}; {reason}")

    def _plain(self, linear: Linear, node: onnx_ir.Node, value: onnx_ir.Value) -> Linear:
        """Return a linear with a float weight of as many channels as the stream has; raise Unproven for any other."""
        if linear.weight.scales is not None or linear.rows is not None:
            raise Unproven(f"{called(node)} has the quantised weight {linear.weight.value.name}; rotate before int8")
        bias = linear.bias
        if linear.output is value and bias is not None:
            if constant_tensor(bias) is None or dimensions(bias) != [self._found.width]:
                raise Unproven(f"{called(node)} adds {bias.name} {dimensions(bias)}, expected a constant vector")
            self._vectors[node, 2] = None
        return linear

    def _check_norm(self, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        if axis not in {-1, len(value.shape or ()) - 1}:
            raise Unproven(f"{called(node)} normalises from axis {axis} on, expected the last axis")
        if scale is None or constant_tensor(scale) is None or dimensions(scale) != [self._found.width]:
            name = "no weight" if scale is None else f"{scale.name} {dimensions(scale)}"
            raise Unproven(
                f"{called(node)} has {name}, expected a constant [{self._found.width}]; run fold-constants first",
            )


def _of_weight(node: onnx_ir.Node) -> str:
    """Say what to do about a product whose weight is no constant matrix."""
    weight = node.inputs[1]
    maker = weight.producer() if weight is not None else None
    if maker is not None and maker.op_type == "Transpose":
        weight = maker.inputs[0]
        maker = weight.producer() if weight is not None else None
    if maker is None:
        return "it is no plain product with a constant matrix"
    fold = "fold-norm-head" if maker.op_type == "Div" else "fold-constants"
    return f"its weight is computed by {called(maker)}; run {fold} first"


def _looks_up(node: onnx_ir.Node) -> bool:
    """Return whether the node looks up rows of a constant table of floats."""
    table = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if table is None or constant_tensor(table) is None or axis:
        return False
    return len(table.shape or ()) == 2 and table.dtype in MODEL_FLOATS


def _called(node: onnx_ir.Node | None) -> str:
    return "the graph" if node is None else called(node)


def _width(value: onnx_ir.Value) -> int | str | tuple[()] | None:
    """Return the length of the last axis; () for a scalar, None if it is unknown."""
    dims = dimensions(value)
    return None if dims is None else dims[-1] if dims else ()


def _is_zero(value: onnx_ir.Value | None) -> bool:
    array = small_constant(value)
    return array is not None and array.size == 1 and bool(np.all(array == 0))


def _keeps_channels(node: onnx_ir.Node, data: onnx_ir.Value) -> bool:
    """Return whether a Slice or Gather is proven to leave the last axis whole."""
    ndim = len(data.shape or ())
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return axis % max(ndim, 1) != ndim - 1
    axes = small_constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is not None and all(int(axis) % ndim != ndim - 1 for axis in axes.reshape(-1))
