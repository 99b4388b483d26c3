"""Define the sharding rules of MatMul and Gemm.

A linear whose input is replicated is column-parallel, and so starts a sharding; one whose input is sharded along the
channels is row-parallel.
"""

from __future__ import annotations

import math

import onnx_ir

from passopt.passes.sharding.axes import ndim_of, products
from passopt.passes.sharding.output_channels import column_layout
from passopt.passes.sharding.placement import REPLICATED, LocalDims, Product, Replicated, Sharded, Spec
from passopt.passes.sharding.propagate import Conflict, Propagation, is_weight_side


def matmul_forward(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a product: of a linear, if the right operand is a weight, or of two computed operands."""
    left, right = state.spec(node, 0), state.spec(node, 1)
    if isinstance(left, LocalDims) or isinstance(right, LocalDims):
        raise Conflict("computes with the length of a sharded axis")
    if is_weight_side(node.inputs[1]) and ndim_of(node.inputs[1]) == 2:
        return linear_forward(state, node, node.outputs[0], node.outputs[0])
    if isinstance(left, Replicated) and isinstance(right, Replicated):
        return REPLICATED
    return _product(state, node, left, right)


def linear_forward(state: Propagation, node: onnx_ir.Node, output: onnx_ir.Value, reduced: onnx_ir.Value) -> Spec:
    """Return the spec of a product with a weight [in, out] on the right.

    Args:
        state: The propagation.
        node: The MatMul or MatMulInteger.
        output: The output of the whole linear, from whose uses the layout of its channels is read.
        reduced: The value behind which partial sums are added up, if the linear is row-parallel.
    """
    data = state.spec(node, 0)
    last = ndim_of(node.inputs[0]) - 1
    if isinstance(data, Sharded):
        if data.axis != last:
            # The data has all channels, so the weight must be whole; axis -1 is a spec that no weight has.
            state.demand_whole(node, 1, data.at(-1))
            return data
        state.demand(node, 1, data.at(0))
        state.reduce(reduced)
        return REPLICATED
    seed = _seed(state, node, output)
    if seed is None:
        return REPLICATED
    state.demand(node, 1, seed)
    return seed.at(ndim_of(node.outputs[0]) - 1)


def _seed(state: Propagation, node: onnx_ir.Node, output: onnx_ir.Value, channels: int = 1) -> Sharded | None:
    """Return how the weight of a linear with a replicated input is sharded by columns; None if it stays whole.

    The layout of its channels follows from how `output` is used. `channels` is the weight's axis of output channels. A
    layout of one unit, such as a key that all query heads share, stays whole on every rank.
    """
    if node not in state.seeds:
        width = products(node.inputs[1])[channels]
        if width is None or width.symbols:
            raise Conflict("the number of output channels is unknown")
        layout = column_layout(output, ndim_of(output) - 1, width.number)
        units = math.gcd(layout.units, state.units.get(node, 0))
        state.seeds[node] = Sharded(channels, Product(layout.segments), units, node)
    seed = state.seeds[node]
    return seed if seed.units > 1 else None


def gemm_forward(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a Gemm, alpha · A' · B' + beta · C, whose B' must be a weight.

    The bias C of a partial sum must be whole, since it is added after the AllReduce.
    """
    data = state.spec(node, 0)
    if not is_weight_side(node.inputs[1]):
        if all(isinstance(state.spec(node, index), Replicated) for index in range(len(node.inputs))):
            return REPLICATED
        raise Conflict(f"expected a constant weight, found {node.inputs[1].name if node.inputs[1] else 'none'}")
    contracted, channels = (1, 0) if _is_set(node, "transB") else (0, 1)
    if isinstance(data, Sharded):
        if data.axis == (0 if _is_set(node, "transA") else 1):
            state.demand(node, 1, data.at(contracted))
            _demand_bias_whole(state, node, data)
            state.reduce(node.outputs[0])
            return REPLICATED
        rows = data.at(0)
        state.demand_whole(node, 1, rows.at(-1))
        _demand_bias(state, node, rows)
        return rows
    seed = _seed(state, node, node.outputs[0], channels)
    if seed is None:
        return REPLICATED
    state.demand(node, 1, seed)
    _demand_bias(state, node, seed.at(1))
    return seed.at(1)


def _is_set(node: onnx_ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def _demand_bias(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    if len(node.inputs) > 2:
        state.demand_broadcast(node, 2, wanted)


def _demand_bias_whole(state: Propagation, node: onnx_ir.Node, alike: Sharded) -> None:
    if len(node.inputs) > 2:
        state.demand_whole(node, 2, alike.at(-1))


def _product(state: Propagation, node: onnx_ir.Node, left: Spec, right: Spec) -> Spec:
    """Return the spec of a product of two computed operands, such as scores and values."""
    ndim = ndim_of(node.outputs[0])
    if min(ndim_of(value) for value in node.inputs) < 2:
        raise Conflict(f"expected operands of at least two axes, found {left} and {right}, one of them a vector")
    for spec, index in ((left, 0), (right, 1)):
        if not isinstance(spec, Sharded):
            continue
        own = ndim_of(node.inputs[index])
        if spec.axis < own - 2:
            result = spec.at(spec.axis + ndim - own)
            _demand_batch(state, node, result)
            return result
        contracted = own - 1 if index == 0 else own - 2
        if spec.axis == contracted:
            other = ndim_of(node.inputs[1 - index])
            state.demand(node, 1 - index, spec.at(other - 2 if index == 0 else other - 1))
            state.reduce(node.outputs[0])
            return REPLICATED
        if not isinstance((left, right)[1 - index], Replicated):
            raise Conflict(f"its result would be sharded along two axes: it multiplies {left} with {right}")
        return spec.at(ndim - 2 if index == 0 else ndim - 1)
    return REPLICATED


def _demand_batch(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    for index in range(len(node.inputs)):
        state.demand_broadcast(node, index, wanted)


def matmul_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand operands that are sharded along a batch axis; a product cannot be made sharded along any other axis."""
    if wanted.axis >= ndim_of(node.outputs[0]) - 2:
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, which this MatMul does not give")
    _demand_batch(state, node, wanted)
