"""Find the language-model head: the linear that makes the logits, even if other operators stand behind it."""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.decoder import LOGITS
from passopt.ir.graph.linears import find_dynamic_linear

#: Operators behind which the logits of a position are still the logits of that position.
_AFTER_HEAD = frozenset({"Add", "Cast", "Identity", "AllGather", "Slice", "Mul", "Div", "Tanh"})


def head_path(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the nodes from the head's MatMul or Gemm to the logits, in order; empty if the graph has no such head.

    If the head has dynamic activations, the first node is its last Mul, which stands for the whole linear.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    value: onnx_ir.Value | None = outputs.get(LOGITS)
    path: list[onnx_ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        path.append(node)
        if node.op_type in {"MatMul", "Gemm"} or find_dynamic_linear(node) is not None:
            return path[::-1]
        if node.op_type not in _AFTER_HEAD:
            return []
        value = next((item for item in node.inputs if item is not None and item.producer() is not None), None)
    return []


def is_head(node: onnx_ir.Node) -> bool:
    """Return whether only `_AFTER_HEAD` operators stand between this linear and the logits."""
    value = node.outputs[0]
    while True:
        if value.is_graph_output():
            return value.name == LOGITS
        users = value.consumers()
        if len(users) != 1 or users[0].op_type not in _AFTER_HEAD:
            return False
        value = users[0].outputs[0]
