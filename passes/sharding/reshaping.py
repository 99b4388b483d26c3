"""Define the sharding rules of Reshape and Expand.

They find where the sharded axis ends up, and let the target shape state its length on one rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir

from passopt.ir.shapes.elements import ConstantElement, elements
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.sharding.axes import ndim_of, products, reshaped_axis
from passopt.passes.sharding.placement import REPLICATED, LocalDims, Product, Sharded, Spec
from passopt.passes.sharding.propagate import Conflict, Propagation
from passopt.passes.sharding.rank_lengths import local_dims, piece_of_target, sharded_by_target

#: Operators that pick elements of their first input, and operators that compute counts from counts.
_PICKS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Gather", "Slice"})
_GROWS = frozenset({"Concat", "Mul", "Add"})


def reshape_forward(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a Reshape's output; raise Conflict if the sharded axis is torn apart."""
    spec, target = state.spec(node, 0), state.spec(node, 1)
    if not isinstance(spec, Sharded):
        if isinstance(target, LocalDims):
            raise Conflict("gives a replicated value the length of a sharded axis")
        return local_dims(state, node) if isinstance(spec, LocalDims) else REPLICATED
    before, after = products(node.inputs[0]), products(node.outputs[0])
    result = _landing(state, before, after, spec)
    if result is None:
        shapes = f"{[str(p) for p in before]} → {[str(p) for p in after]}"
        raise Conflict(f"tears apart axis {spec.axis}, which is {spec}: {shapes}")
    _fit_target(state, node, result, target)
    return result


def reshape_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand the input that a Reshape needs for an output sharded as `wanted`; raise Conflict if there is none."""
    source = _landing(state, products(node.outputs[0]), products(node.inputs[0]), wanted)
    if source is None:
        raise Conflict(f"{node.outputs[0].name} must be {wanted}, which its input cannot be")
    state.demand(node, 0, source)
    _fit_target(state, node, wanted, state.spec(node, 1))


def _landing(
    state: Propagation, before: Sequence[Product | None], after: Sequence[Product | None], spec: Sharded
) -> Sharded | None:
    """Return what `spec` becomes in the shape `after`; None if its units fall apart.

    Units that are finer than the axis on which they land become coarser.
    """
    found = reshaped_axis(before, after, spec.axis, spec.segments, spec.units)
    if found is not None:
        return dataclasses.replace(spec, axis=found[0], segments=found[1])
    if spec.seed is None:
        return None
    for units in range(spec.units // 2, 1, -1):
        found = reshaped_axis(before, after, spec.axis, spec.segments, units) if spec.units % units == 0 else None
        if found is not None:
            state.divide_into(spec, units, "parts")
            return dataclasses.replace(spec, axis=found[0], segments=found[1], units=units)
    return None


def _fit_target(state: Propagation, node: onnx_ir.Node, result: Sharded, target: Spec) -> None:
    """Let the target shape state the length on one rank at the sharded axis; raise Conflict if it cannot be done."""
    found = elements(node.inputs[1])
    if found is None:
        raise Conflict("the target shape cannot be followed")
    item = found[result.axis]
    if isinstance(target, LocalDims) and target.positions != {result.axis}:
        raise Conflict(f"the target is {target}, the sharded axis is {result.axis}")
    if isinstance(item, ConstantElement):
        if item.number > 0:
            state.shrink_target(node, result.axis, result)
        return
    if isinstance(target, LocalDims):
        return
    piece = piece_of_target(node.inputs[1], result.axis)
    if item is not None or piece is None or not _is_length(piece[1]):
        raise Conflict(f"the length of axis {result.axis} is computed, and not from a sharded axis")
    # A length such as batch · heads, which is computed from whole lengths, is the whole length of this axis.
    state.shrink_target(node, result.axis, result)


def _is_length(value: onnx_ir.Value | None) -> bool:
    """Return True if the value is computed only as products and sums of lengths and counts, so that it is never -1."""
    array = small_constant(value)
    if array is not None:
        return bool((array >= 0).all())
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return False
    if node.op_type in _PICKS:
        return _is_length(node.inputs[0])
    return node.op_type == "Shape" or (node.op_type in _GROWS and all(_is_length(item) for item in node.inputs))


def expand_forward(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of an Expand's output: sharded as its input, or else as its target shape is."""
    spec = state.spec(node, 0)
    if isinstance(spec, LocalDims):
        raise Conflict("repeats the length of a sharded axis")
    if not isinstance(spec, Sharded):
        local = sharded_by_target(state, node)
        if local is not None:
            state.demand_broadcast(node, 0, local)
            return local
        known = state.specs.get(node.outputs[0], REPLICATED)
        return known if isinstance(known, Sharded) else REPLICATED
    result = spec.at(spec.axis + ndim_of(node.outputs[0]) - ndim_of(node.inputs[0]))
    _expand_target(state, node, result)
    return result


def expand_backward(state: Propagation, node: onnx_ir.Node, wanted: Sharded) -> None:
    """Demand the input that an Expand needs for an output sharded as `wanted`, and fit its target shape."""
    state.demand_broadcast(node, 0, wanted)
    _expand_target(state, node, wanted)


def _expand_target(state: Propagation, node: onnx_ir.Node, result: Sharded) -> None:
    """Let the target of an Expand state the length on one rank at the sharded axis, unless it keeps the input's."""
    found, position = elements(node.inputs[1]), result.axis
    if found is None:
        raise Conflict("the target shape cannot be followed")
    position -= ndim_of(node.outputs[0]) - len(found)
    target = state.spec(node, 1)
    if isinstance(target, LocalDims) and target.positions != {position}:
        raise Conflict(f"the target is {target}, the sharded axis is {result.axis}")
    if position < 0:
        return
    item = found[position]
    if isinstance(item, ConstantElement):
        if item.number != 1:
            state.shrink_target(node, position, result)
        return
    if not isinstance(target, LocalDims):
        raise Conflict(f"the length of axis {result.axis} is computed, and not from a sharded axis")
