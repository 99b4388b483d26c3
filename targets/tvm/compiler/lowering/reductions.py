"""Lower operators over an axis: sums, means, norms other than RMS norm, and softmax outside of attention."""

from __future__ import annotations

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.targets.tvm.compiler.lowering.movement import given_axes
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import Delegated, Unsupported, Values

_REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min", "ReduceProd": "prod"}


@lowers(*_REDUCTIONS)
def reduce(at: Values, node: onnx_ir.Node) -> None:
    """Lower ReduceMean, ReduceSum, ReduceMax, ReduceMin and ReduceProd; a product of known lengths stays a length."""
    from tvm import relax

    numbers, axes = at.numbers(node.inputs[0]), given_axes(at, node, 1)
    if numbers is not None and node.op_type == "ReduceProd":
        total = numbers.items[0]
        for item in numbers.items[1:]:
            total = total * item
        at.set_numbers(node.outputs[0], [total], scalar=not attribute(node, "keepdims", 1))
        return
    if axes is None and attribute(node, "noop_with_empty_axes", 0):
        raise Unsupported("a reduction over no axis")
    keeps = bool(attribute(node, "keepdims", 1))
    compute = getattr(relax.op, _REDUCTIONS[node.op_type])
    at.set(node.outputs[0], compute(at.tensor(node.inputs[0]), list(axes) if axes else None, keeps))


@lowers("ReduceL2")
def reduce_l2(at: Values, node: onnx_ir.Node) -> None:
    """Lower ReduceL2 as the square root of the sum of squares."""
    from tvm import relax

    found, axes = at.tensor(node.inputs[0]), given_axes(at, node, 1)
    squares = at.emit(relax.op.multiply(found, found))
    total = at.emit(relax.op.sum(squares, list(axes) if axes else None, bool(attribute(node, "keepdims", 1))))
    at.set(node.outputs[0], relax.op.sqrt(total))


@lowers("Softmax")
def softmax(at: Values, node: onnx_ir.Node) -> None:
    """Lower Softmax outside of a fused attention."""
    from tvm import relax

    at.set(node.outputs[0], relax.op.nn.softmax(at.tensor(node.inputs[0]), attribute(node, "axis", -1)))


@lowers("LayerNormalization")
def layer_normalization(at: Values, node: onnx_ir.Node) -> None:
    """Lower LayerNormalization, with a bias of zeros if it has none."""
    from tvm import relax

    found, weight = at.tensor(node.inputs[0]), at.tensor(node.inputs[1])
    axis = attribute(node, "axis", -1)
    rank = len(found.ty.shape.values)
    axes = list(range(axis % rank, rank))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = at.tensor(node.inputs[2])
    else:
        bias = at.emit(relax.op.zeros(at.shape_of(weight), str(weight.ty.dtype)))
    at.set(node.outputs[0], relax.op.nn.layer_norm(found, weight, bias, axes, attribute(node, "epsilon", 1e-5)))


@lowers("CumSum")
def cumulative_sum(at: Values, node: onnx_ir.Node) -> None:
    """Lower CumSum over a constant axis; other forms are left to TVM's importer."""
    from tvm import relax

    axis = at.constant(node.inputs[1])
    if axis is None or attribute(node, "reverse", 0):
        raise Delegated("a cumulative sum over a computed axis, or backwards")
    found = at.tensor(node.inputs[0])
    at.set(
        node.outputs[0],
        relax.op.cumsum(found, int(np.asarray(axis).reshape(-1)[0]), exclusive=bool(attribute(node, "exclusive", 0))),
    )
