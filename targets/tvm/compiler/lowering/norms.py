"""Lower RMS norm, rotary embedding and SwiGLU to native kernels."""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.targets.tvm.compiler.kernels.rms_norm import RmsNorm
from passopt.targets.tvm.compiler.kernels.rotary import rotary
from passopt.targets.tvm.compiler.kernels.swiglu import Swiglu
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import RowsToCome, Tvm, Unsupported, Values, product


@lowers("RMSNormalization")
def rms_normalization(at: Values, node: onnx_ir.Node) -> None:
    """Lower RMSNormalization over the last axis; its reader decides whether rows go to memory or are quantised."""
    found, weight = at.tensor(node.inputs[0]), at.stored(node.inputs[1])
    dims, isa = at.shape_of(found), at.machine.isa
    width, dtype = dims[-1], str(weight.ty.dtype)
    if attribute(node, "axis", -1) not in (-1, len(dims) - 1) or not isinstance(width, int):
        raise Unsupported("a norm over other axes than the last one")
    if len(weight.ty.shape.values) != 1:
        raise Unsupported("a norm whose weight is no vector")
    rows = at.simplified(product(dims[:-1]))
    kernel = RmsNorm(width, dtype, attribute(node, "epsilon", 1e-5), isa)
    at.set_rows(RowsToCome(node.outputs[0], kernel, (at.view(found, [rows, width]), weight), rows), dims)


@lowers("RotaryEmbedding")
def rotary_embedding(at: Values, node: onnx_ir.Node) -> None:
    """Lower RotaryEmbedding on [b, h, s, d], with tables that are looked up once for all layers."""
    source = node.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        raise Unsupported("a rotary embedding of other than four axes")
    found, isa = at.heads(source), at.machine.isa
    dims = at.shape_of(found)
    heads, width = dims[2], dims[3]
    part, interleaved = attribute(node, "rotary_embedding_dim", 0) or width, bool(attribute(node, "interleaved", 0))
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    tables = [_table(at, value, positions) for value in node.inputs[1:3]]
    name = f"rotary_{heads}_{width}_{part}" + ("_interleaved" if interleaved else "")
    make = lambda: rotary(heads, width, part, interleaved, isa)  # noqa: E731
    at.set_heads(node.outputs[0], at.call(name, make, [found, *tables], dims))


def _table(at: Values, table: onnx_ir.Value | None, positions: onnx_ir.Value | None) -> Tvm:
    """Return cos or sin as fp32 [1 or b, s, d/2], looked up once for all layers that share table and positions."""
    from tvm import relax

    found = at.stored(table)
    if positions is None:
        return at.once(("table", found), lambda: at.widened(found))

    def make() -> Tvm:
        return at.widened(at.emit(relax.op.take(found, at.tensor(positions), 0, mode="clip")))

    return at.once(("table", found, at.tensor(positions)), make)


def find_swiglu(node: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value] | None:
    """Return (gate, up) if a node computes gate · sigmoid(gate) · up, in either order of the factors; else None."""
    if node.op_type != "Mul" or node.domain:
        return None
    for position in (0, 1):
        activated, up = node.inputs[position], node.inputs[1 - position]
        gate = _silu_of(activated)
        if gate is None or gate.shape is None or up is None or up.shape is None:
            continue
        if len(gate.shape) == len(up.shape) and isinstance(gate.shape[-1], int):
            return gate, up
    return None


def _silu_of(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "Swish" and attribute(node, "alpha", 1.0) == 1.0:
        return node.inputs[0]
    if node.op_type != "Mul":
        return None
    for gate, other in (node.inputs, reversed(node.inputs)):
        sigmoid = other.producer() if other is not None else None
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is gate:
            return gate
    return None


def lower_swiglu(at: Values, gate: onnx_ir.Value, up: onnx_ir.Value, output: onnx_ir.Value) -> None:
    """Lower gate · sigmoid(gate) · up to `output`, in one kernel if both tensors have the same shape.

    Only here are the shapes compared: in the graph, two unknown lengths cannot be told apart.
    """
    from tvm import relax

    first, second = at.tensor(gate), at.tensor(up)
    dims, isa = at.shape_of(first), at.machine.isa
    if not at.same_lengths(dims, at.shape_of(second)):
        activated = at.emit(relax.op.nn.silu(first))
        at.set(output, relax.op.multiply(activated, second))
        return
    width = dims[-1]
    rows = at.simplified(product(dims[:-1]))
    flat = tuple(at.view(item, [rows, width]) for item in (first, second))
    at.set_rows(RowsToCome(output, Swiglu(width, isa), flat, rows), dims)
