"""Lower collectives to calls of global functions, which the process that runs a rank registers, on fp32 tensors."""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.builder import MICROSOFT
from passopt.targets.tvm.compiled_folder import ALL_GATHER, ALL_REDUCE
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import Length, Tvm, Unsupported, Values


@lowers("AllReduce", domain=MICROSOFT)
def all_reduce(at: Values, node: onnx_ir.Node) -> None:
    """Lower AllReduce, the sum over all ranks."""
    found = at.tensor(node.inputs[0])
    _call(at, node, ALL_REDUCE, found, at.shape_of(found))


@lowers("AllGather", domain=MICROSOFT)
def all_gather(at: Values, node: onnx_ir.Node) -> None:
    """Lower AllGather, which concatenates the tensors of all ranks along an axis."""
    found = at.tensor(node.inputs[0])
    dims = at.shape_of(found)
    axis, ranks = attribute(node, "axis", 0) % len(dims), attribute(node, "group_size", 1)
    if ranks < 2:
        raise Unsupported(f"it gathers from {ranks} ranks, expected at least two")
    _call(at, node, ALL_GATHER, found, [*dims[:axis], dims[axis] * ranks, *dims[axis + 1 :]])


def _call(at: Values, node: onnx_ir.Node, function: str, operand: Tvm, shape: list[Length]) -> None:
    """Call a registered function with the operand and a tensor for the result.

    The function needs no other arguments, since the two shapes tell it along which axis to work.
    """
    from tvm import relax

    if str(operand.ty.dtype) != "float32":
        raise Unsupported(f"it joins {operand.ty.dtype}, expected floats")
    kind = relax.TensorType(shape, "float32")
    at.set(node.outputs[0], relax.call_dps_packed(function, [operand], out_ty=kind))
    at.note(f"collective: {function.rpartition('.')[2]}")
