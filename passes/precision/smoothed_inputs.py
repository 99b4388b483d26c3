"""Find the inputs of linears whose channels can be scaled by weights that stand before them, and by those behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.graph.linears import Linear, find_linear
from passopt.ir.graph.lm_head import is_head
from passopt.ir.graph.provenance import called
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.lazy_weight import constant_tensor
from passopt.passes.framework.base import Refusal

_NORMS = frozenset({"RMSNormalization", "LayerNormalization"})


@dataclasses.dataclass(frozen=True)
class SmoothedInput:
    """A value whose channels can be scaled.

    `readers` are all linears that read it. `vectors` are the inputs of nodes, and `writer` the linear, whose output
    channels become these channels one by one. `values` are all values between them, which scale with them. `kind` is
    "norm" or "down"; `is_head` says that only the head reads it.
    """

    kind: str
    readers: tuple[Linear, ...]
    vectors: tuple[tuple[onnx_ir.Node, int], ...]
    writer: Linear | None
    values: tuple[onnx_ir.Value, ...]
    is_head: bool = False


class _No(Exception):
    """Raised with the reason why a value cannot be smoothed."""


def smoothed_inputs(model: onnx_ir.Model) -> Iterator[SmoothedInput | Refusal]:
    """Yield the values that can be smoothed, and refusals of norms and gated products that cannot."""
    for node in model.graph:
        if node.domain or node.op_type not in {*_NORMS, "Mul"}:
            continue
        try:
            found = _behind_norm(node) if node.op_type in _NORMS else _behind_gate(node)
        except _No as reason:
            yield Refusal(node, str(reason))
        else:
            if found is not None:
                yield found


def _behind_norm(node: onnx_ir.Node) -> SmoothedInput | None:
    """Return the input of linears behind a norm; None if no linear reads it."""
    data = node.inputs[0]
    dims = None if data is None else dimensions(data)
    readers, values = _readers(node.outputs[0])
    if not readers:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if not dims or axis not in {-1, len(dims) - 1}:
        raise _No(f"{called(node)} normalises from axis {axis} on, expected the last axis")
    vectors = [(node, index) for index, value in enumerate(node.inputs) if index and value is not None]
    for _, index in vectors:
        _check_vector(node, node.inputs[index], dims[-1])
    return SmoothedInput(
        "norm", readers, tuple(vectors), None, values, all(is_head(item.nodes[-1]) for item in readers)
    )


def _behind_gate(node: onnx_ir.Node) -> SmoothedInput | None:
    """Return the input of linears that is a product, one factor of which comes from a linear; None if it is not."""
    writers = [found for value in node.inputs if value is not None and (found := _writer(value)) is not None]
    if not writers or dimensions(node.outputs[0]) is None:
        return None
    try:
        readers, values = _readers(node.outputs[0])
    except _No:
        return None  # A product that others read, such as one inside of an activation, is no input of linears.
    if not readers:
        return None
    writer, vectors, between = writers[-1]
    width = writer.weight.channels
    if width is None or any(linear.weight.contracted != width for linear in readers):
        raise _No(f"{called(node)} has not as many channels as {called(writer.nodes[-1])}")
    for other, index in vectors:
        _check_vector(other, other.inputs[index], width)
    return SmoothedInput("down", readers, vectors, writer, (*between, *values))


def _writer(
    value: onnx_ir.Value,
) -> tuple[Linear, tuple[tuple[onnx_ir.Node, int], ...], tuple[onnx_ir.Value, ...]] | None:
    """Return the linear whose output is this value, with its bias and the values between, if nothing else reads them.

    An Add of a constant, a Cast and an Identity may stand between.
    """
    vectors: list[tuple[onnx_ir.Node, int]] = []
    values: list[onnx_ir.Value] = []
    while True:
        node = value.producer()
        if node is None or node.domain or value.is_graph_output() or len(value.uses()) != 1:
            return None
        if value.dtype not in MODEL_FLOATS:
            return None  # A number that was rounded to an integer does not scale.
        values.append(value)
        linear = find_linear(node)
        if linear is not None and linear.output is value:
            if linear.rows is not None or linear.weight.scales is not None:
                return None
            if linear.bias is not None:
                vectors.append((node, 2))
            return linear, tuple(vectors), tuple(values)
        constants = [index for index, item in enumerate(node.inputs) if item is not None and constant_tensor(item)]
        if node.op_type == "Add" and len(constants) == 1:
            vectors.append((node, constants[0]))
            found = node.inputs[1 - constants[0]]
        elif node.op_type in {"Cast", "Identity"}:
            found = node.inputs[0]
        else:
            return None
        if found is None:
            return None
        value = found


def _readers(value: onnx_ir.Value) -> tuple[tuple[Linear, ...], tuple[onnx_ir.Value, ...]]:
    """Return the linears that read a value, through casts too, and these values.

    Raises _No if anything else reads it, and a linear does; returns nothing if no linear does.
    """
    readers: list[Linear] = []
    values, work, others = [], [value], []
    while work:
        item = work.pop()
        values.append(item)
        if item.is_graph_output():
            others.append(f"{item.name} is an output of the graph")
        for node, index in item.uses():
            linear = find_linear(node) if index == 0 else None
            if linear is not None and linear.input is item and linear.weight.scales is None:
                readers.append(linear)
            elif node.op_type in {"Cast", "Identity"} and not node.domain and node.outputs[0].dtype in MODEL_FLOATS:
                work.append(node.outputs[0])
            elif node.op_type != "Shape" or node.domain:
                others.append(f"{called(node)} reads {item.name}, expected a linear with a float weight")
    if readers and others:
        raise _No(others[0])
    return tuple(readers), tuple(values)


def _check_vector(node: onnx_ir.Node, value: onnx_ir.Value | None, width: object) -> None:
    if value is None or constant_tensor(value) is None or dimensions(value) != [width]:
        name = "nothing" if value is None else f"{value.name} {dimensions(value)}"
        raise _No(f"{called(node)} reads {name}, expected a constant of shape [{width}]")
