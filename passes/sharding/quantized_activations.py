"""Define the sharding rules of linears with dynamic int8 activations.

In a row-parallel linear every rank quantises the part of a row that it holds, with a scale of its own. So everything
from the codes of the row to the product with its scale differs between ranks, and only the sum of the fp32 products is
the same on all of them. The pass `quantize-activations` says what that means for the numbers.
"""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.linears import Linear, linear_of_sums, linears_of_rows, quantized_rows_of, reads_scales
from passopt.passes.sharding.matmul import linear_forward
from passopt.passes.sharding.placement import REPLICATED, Replicated, Spec
from passopt.passes.sharding.propagate import Conflict, Propagation, Use

_HALVES = frozenset({onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16})


def integer_matmul_forward(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a MatMulInteger: that of a linear, whose partial sums are added up once they are fp32."""
    linear = linear_of_sums(node)
    if linear is not None:
        return linear_forward(state, node, linear.output, _reduced(linear))
    if all(isinstance(state.spec(node, index), Replicated) for index in range(len(node.inputs))):
        return REPLICATED
    raise Conflict("expected rows quantised as quantize-activations does, with a weight of codes; found other integers")


def reduces_local_rows(node: onnx_ir.Node) -> bool:
    """Return True for the ReduceMax of a quantisation by rows, which may reduce just the part that a rank holds.

    Raises:
        Conflict: If anything but linears with dynamic activations reads a value that then differs between ranks.
    """
    magnitudes = node.inputs[0].producer() if node.inputs[0] is not None else None
    data = magnitudes.inputs[0] if magnitudes is not None and magnitudes.op_type == "Abs" else None
    rows = quantized_rows_of(data) if data is not None else None
    if rows is None or magnitudes is None or node not in rows.nodes:
        return False
    inside = {*rows.nodes, *(each for linear in linears_of_rows(rows) for each in linear.nodes)}
    local = [each for each in inside if each is not magnitudes]
    ends = {linear.output for linear in linears_of_rows(rows)}
    for value in (output for each in local for output in each.outputs if output not in ends):
        outside = [user for user in value.consumers() if user not in inside]
        if outside or value.is_graph_output():
            who = f"{outside[0].op_type} {outside[0].name!r}" if outside else "the caller"
            raise Conflict(f"{who} reads {value.name}, which each rank computes of its own part of a row")
    return True


def scale_uses(state: Propagation) -> frozenset[Use]:
    """Return the uses of sharded constants as scales of codes, which are not padded with zeros."""
    return frozenset(use for use in state.constant_uses if reads_scales(use.node, use.index))


def _reduced(linear: Linear) -> onnx_ir.Value:
    """Return the value that is summed over the ranks: the fp32 products, or the Cast to 16 bits that reads them."""
    users = linear.output.consumers()
    if len(users) == 1 and users[0].op_type == "Cast" and not linear.output.is_graph_output():
        cast = users[0].outputs[0]
        return cast if cast.dtype in _HALVES else linear.output
    return linear.output
