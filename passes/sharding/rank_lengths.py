"""Follow lengths on one rank through shape vectors, element by element, to the target shapes that use them."""

from __future__ import annotations

import onnx_ir

from passopt.ir.shapes.elements import DimOf, elements
from passopt.passes.sharding.axes import ndim_of
from passopt.passes.sharding.placement import REPLICATED, LocalDims, Sharded, Spec
from passopt.passes.sharding.propagate import Conflict, Propagation

#: Operators that make shape vectors of shape vectors.
SHAPE_ARITHMETIC = frozenset(
    {"Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity", "Where"}
)
#: Operators that may read a shape vector with lengths on one rank, since they are followed element by element.
READS_LOCAL_DIMS = SHAPE_ARITHMETIC | {"Shape", "Expand"}
_INTEGERS = frozenset({onnx_ir.DataType.INT64, onnx_ir.DataType.INT32})


def local_dims(state: Propagation, node: onnx_ir.Node) -> Spec:
    """Return the spec of a computed shape vector: which of its elements are lengths on one rank.

    Raises:
        Conflict: If such a length is computed with in a way that cannot be followed.
    """
    found, dtype = elements(node.outputs[0]), node.outputs[0].dtype
    local = [index for index in range(len(node.inputs)) if isinstance(state.spec(node, index), LocalDims)]
    # A value that was cast to floats or booleans and back may hold another number.
    if local and dtype is not None and dtype not in _INTEGERS:
        raise Conflict("computes with the length of a sharded axis, which is no longer an integer")
    if found is None or (local and (None in found or ndim_of(node.outputs[0]) > 1)):
        raise Conflict("computes with the length of a sharded axis in a way that cannot be followed")
    positions = set()
    for position, item in enumerate(found):
        if isinstance(item, DimOf):
            spec = state.specs.get(item.value, REPLICATED)
            if isinstance(spec, Sharded) and spec.axis == item.axis:
                positions.add(position)
    return LocalDims(frozenset(positions)) if positions else REPLICATED


def sharded_by_target(state: Propagation, node: onnx_ir.Node) -> Sharded | None:
    """Return how an Expand's output is sharded by a target with a length on one rank; None if it has none.

    Raises:
        Conflict: If the target has several such lengths.
    """
    target, found = state.spec(node, 1), elements(node.inputs[1])
    if not isinstance(target, LocalDims) or found is None:
        return None
    if len(target.positions) != 1:
        raise Conflict(f"expected a target with one local length, found {target}")
    (position,) = target.positions
    item = found[position]
    assert isinstance(item, DimOf)
    spec = state.specs[item.value]
    assert isinstance(spec, Sharded)
    return spec.at(position + ndim_of(node.outputs[0]) - len(found))


def piece_of_target(target: onnx_ir.Value | None, position: int) -> tuple[int, onnx_ir.Value] | None:
    """Find the input of a target shape's Concat that holds just the element at `position`.

    Returns:
        The number of the input and its value; None if the target is not made by a Concat, or has no such input.
    """
    concat = target.producer() if target is not None else None
    if concat is None or concat.op_type != "Concat":
        return None
    offset = 0
    for index, piece in enumerate(concat.inputs):
        found = elements(piece)
        if found is None or piece is None:
            return None
        if offset == position and len(found) == 1:
            return index, piece
        offset += len(found)
    return None
