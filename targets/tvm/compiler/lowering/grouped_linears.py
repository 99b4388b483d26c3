"""Recognise linear layers whose weight is codes of 4 bits with a scale per group of inputs."""

from __future__ import annotations

import dataclasses

import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.graph.attributes import attribute
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.groups import FOUR_BITS
from passopt.ir.weights.lazy_weight import constant_tensor, expression_of


@dataclasses.dataclass(frozen=True)
class GroupedLinear:
    """A linear: `output` `[.., n]` = `input` `[.., k]` · dequantised weightᵀ (+ `bias`).

    Attributes:
        input: The activations.
        output: The result.
        codes: The codes, `[n, k]` if `transposed`, else `[k, n]`.
        scales: The scales, `[n, groups]` or `[groups, n]`.
        zeros: The zero points, as the scales; None for zeros.
        group: The inputs that share a scale.
        transposed: Whether codes are stored by output channel.
        bias: The bias of a Gemm, or None.
        nodes: All nodes that compute it.
    """

    input: onnx_ir.Value
    output: onnx_ir.Value
    codes: onnx_ir.Value
    scales: onnx_ir.Value
    zeros: onnx_ir.Value | None
    group: int
    transposed: bool
    bias: onnx_ir.Value | None
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def channels(self) -> int:
        """Return n, the number of output channels."""
        return self.expression(self.codes).shape[0]

    def expression(self, value: onnx_ir.Value) -> Expression:
        """Return codes, scales or zero points by output channel, however they are stored."""
        found = expression_of(value)
        assert found is not None, value.name
        return found if self.transposed else found.transpose()


def find_grouped_linear(node: onnx_ir.Node) -> GroupedLinear | None:
    """Return the linear that a MatMul or plain Gemm computes from codes of 4 bits in groups of inputs, else None."""
    if node.domain or node.op_type not in {"MatMul", "Gemm"}:
        return None
    if node.op_type == "Gemm" and (
        attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0)
    ):
        return None
    operand, turned = node.inputs[1], node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    nodes = [node]
    turn = _producer(operand, "Transpose")
    if turn is not None:
        if list(attribute(turn, "perm", [1, 0])) != [1, 0]:
            return None
        operand, turned = turn.inputs[0], not turned
        nodes.append(turn)
    dequantize = _producer(operand, "DequantizeLinear")
    data = node.inputs[0]
    if dequantize is None or data is None or not _is_by_groups(dequantize, 1 if turned else 0):
        return None
    codes, scales = dequantize.inputs[:2]
    zeros = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    assert codes is not None
    assert scales is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    group, path = attribute(dequantize, "block_size", 0), (dequantize, *reversed(nodes))
    return GroupedLinear(data, node.outputs[0], codes, scales, zeros, group, turned, bias, path)


def _is_by_groups(dequantize: onnx_ir.Node, contracted: int) -> bool:
    """Return whether constant codes of 4 bits have scales along the axis that is summed over, in full groups."""
    given = [value for value in dequantize.inputs if value is not None]
    if any(constant_tensor(value) is None or value.shape is None or len(value.shape) != 2 for value in given):
        return False
    codes, scales = given[:2]
    assert codes.shape is not None
    assert scales.shape is not None
    group, axis = attribute(dequantize, "block_size", 0), attribute(dequantize, "axis", 1) % 2
    full = isinstance(codes.shape[axis], int) and group and codes.shape[axis] == scales.shape[axis] * group
    return bool(full) and axis == contracted and codes.dtype in FOUR_BITS and scales.dtype in MODEL_FLOATS


def _producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None
