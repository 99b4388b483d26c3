"""Let the constant matrices that linears read look like weights of a checkpoint while they are quantised.

A self-contained model.onnx holds its weights inline or in Constant nodes, and exporters put Identity, Cast or Transpose
behind a weight that several layers share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import onnx_ir

from passopt.ir.dtypes import FLOATS, MODEL_FLOATS
from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.editor import Editor, is_read
from passopt.ir.weights.concat import Concat
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.lazy_weight import LazyWeight, expression_of, is_checkpoint_weight

#: A constant of at most so many numbers is arithmetic, such as a rotation in the plane, and no weight.
_LEAST = 16
#: Where each operator reads a matrix of weights.
_PLACES = {"MatMul": 1, "Gemm": 1, "Gather": 0}


@dataclasses.dataclass(frozen=True)
class _Lent:
    """A value whose readers read the initializer `weight` for a while; for an initializer, both are the same value.

    `tensor` is what an initializer held before. `detached` are the nodes that computed the value, with their inputs:
    they must not count as readers of the weight behind them.
    """

    value: onnx_ir.Value
    weight: onnx_ir.Value
    tensor: onnx_ir.TensorProtocol | None = None
    detached: tuple[tuple[onnx_ir.Node, onnx_ir.Value], ...] = ()


@contextlib.contextmanager
def inline_weights_as_lazy(editor: Editor) -> Iterator[None]:
    """Lend a lazy weight to every linear that reads another constant matrix of floats, within the block.

    What still reads such a weight at the end of the block reads its own constant again, so that the graph shows nothing
    of it. What nothing reads any more is removed.
    """
    lent: list[_Lent] = []
    for node in list(editor.graph):
        value = _operand(node)
        found = _lend(editor, value) if value is not None else None
        if found is not None:
            lent.append(found)
    try:
        yield
    finally:
        for item in lent:
            _take_back(editor, item)
        makers = [item.value.producer() for item in lent]
        editor.remove_dead(node for node in makers if node is not None)


def content_of(weight: Expression) -> Expression:
    """Return the expression without the names of its tensors: equal results hold equal numbers, whatever their names.

    Args:
        weight: The expression of a weight.
    """
    if isinstance(weight, Source):
        return dataclasses.replace(weight, name="")
    if isinstance(weight, Concat):
        return dataclasses.replace(weight, parts=tuple(content_of(part) for part in weight.parts))
    if len(weight.operands) == 1:
        return dataclasses.replace(weight, operand=content_of(weight.operands[0]))  # type: ignore[call-arg]
    return weight


def _operand(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """Return the matrix that a linear or a look-up reads, in front of the Transpose that the pass's own rules take."""
    place = _PLACES.get(node.op_type)
    if place is None or node.domain or place >= len(node.inputs):
        return None
    value = node.inputs[place]
    turn = value.producer() if value is not None else None
    if turn is not None and turn.op_type == "Transpose" and not turn.domain and "perm" in turn.attributes:
        value = turn.inputs[0] if _turns_matrix(turn) else value
    return value


def _turns_matrix(turn: onnx_ir.Node) -> bool:
    return list(attribute(turn, "perm", [1, 0])) == [1, 0]


def _lend(editor: Editor, value: onnx_ir.Value) -> _Lent | None:
    if is_checkpoint_weight(value) or value.is_graph_output():
        return None
    weight = _expression(value)
    if weight is None or weight.dtype not in MODEL_FLOATS or len(weight.shape) != 2:
        return None
    if math.prod(weight.shape) <= _LEAST:
        return None
    lazy = LazyWeight(weight, value.name)
    if value.is_initializer():
        tensor, value.const_value = value.const_value, lazy
        return _Lent(value, value, tensor)
    kind, shape = onnx_ir.TensorType(weight.dtype), onnx_ir.Shape(weight.shape)
    made = onnx_ir.Value(name=value.name, type=kind, shape=shape, const_value=lazy)
    editor.graph.register_initializer(made)
    value.replace_all_uses_with(made)
    return _Lent(value, made, detached=tuple(_detach(value)))


def _detach(value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, onnx_ir.Value]]:
    """Take away the inputs of the nodes that computed a value which nothing reads any more, and yield both."""
    node = value.producer()
    while node is not None and node.op_type != "Constant" and not is_read(node.outputs[0]):
        source = node.inputs[0]
        assert source is not None
        node.replace_input_with(0, None)
        yield node, source
        node = source.producer()


def _expression(value: onnx_ir.Value | None) -> Expression | None:
    """Return the expression of a constant behind any Identity, Cast between floats and Transpose; None otherwise."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is None or node.op_type == "Constant":
        return expression_of(value)
    if node.domain or node.op_type not in {"Identity", "Cast", "Transpose"}:
        return None
    source = _expression(node.inputs[0])
    if source is None or source.dtype not in FLOATS or len(source.shape) != 2:
        return None
    if node.op_type == "Transpose":
        return source.transpose([1, 0]) if _turns_matrix(node) else source
    if node.op_type == "Identity":
        return source
    target = onnx_ir.DataType(attribute(node, "to", 0))
    return source.cast(target) if target in FLOATS else None


def _take_back(editor: Editor, item: _Lent) -> None:
    for node, source in item.detached:
        node.replace_input_with(0, source)
    if item.value is item.weight:
        item.value.const_value = item.tensor
        return
    item.weight.replace_all_uses_with(item.value)
    editor.remove_unused_initializer(item.weight)
