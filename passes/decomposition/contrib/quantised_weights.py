"""Expand quantisation, and products with and look-ups in weights of few bits, whose bytes stay those of the file."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.ir.graph.provenance import called
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.literals import Literal
from passopt.passes.decomposition.contrib.registry import Values, expands
from passopt.passes.decomposition.decompose_pass import operand, required
from passopt.passes.framework.base import Decline

DataType = onnx_ir.DataType
#: The dtype of the codes by their bits. The bytes hold them in the same order, the lowest bits first.
_CODES = {4: DataType.UINT4, 8: DataType.UINT8}


@expands(
    "MatMulNBits", attributes=("K", "N", "accuracy_level", "bits", "block_size", "weight_prepacked"), inputs=6, opset=21
)
def _matmul_nbits(op: Any, node: onnx_ir.Node) -> Values:
    """Multiply by the dequantised weight [N, K]; accuracy_level only allows a kernel to round more."""
    order = operand(node, 4)
    if order is not None:
        raise Decline(f"{called(node)} orders its channels by {order.name} (g_idx), which DequantizeLinear lacks")
    if attribute(node, "weight_prepacked", 0):
        raise Decline(f"{called(node)} has a weight that is packed for one device")
    x, rows, columns = required(node, 0), attribute(node, "N", 0), attribute(node, "K", 0)
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    if bits not in _CODES:
        raise Decline(f"{called(node)} has codes of {bits} bits, expected 4 or 8")
    blocks = -(-columns // block)
    wide = _dequantized(op, required(node, 1), required(node, 2), operand(node, 3), (rows, blocks, block), bits)
    if blocks * block != columns:
        wide = op.Slice(wide, [0], [columns], [1])
    result = op.MatMul(x, op.Transpose(wide, perm=[1, 0]))
    bias = operand(node, 5)
    return [result if bias is None else op.Add(result, bias)]


def _dequantized(
    op: Any,
    data: onnx_ir.Value,
    scales: onnx_ir.Value,
    zeros: onnx_ir.Value | None,
    sizes: tuple[int, int, int],
    bits: int,
) -> Any:
    """Return the floats [rows, blocks · block] of packed codes, whose blocks have a scale and a zero point each."""
    rows, blocks, block = sizes
    kind = _CODES[bits]
    codes = _view(op, data, kind, (rows, blocks * block))
    factors = _view(op, scales, scales.dtype, (rows, blocks))
    if zeros is None:
        middle = np.full(-(-rows * blocks * bits // 8), 0x88 if bits == 4 else 0x80, np.uint8)
        name = f"{data.name}.zero_points"
        points = op.initializer(name, Literal(kind, (rows, blocks), middle.tobytes()))
    elif zeros.dtype != DataType.UINT8:
        raise Decline(f"{zeros.name} holds zero points in {zeros.dtype}, expected the codes' own dtype")
    elif blocks * bits % 8:
        raise Decline(f"{zeros.name} fills up the bytes of a row of {blocks} zero points, which DequantizeLinear lacks")
    else:
        points = _view(op, zeros, kind, (rows, blocks))
    return op.DequantizeLinear(codes, factors, points, axis=1, block_size=block)


def _view(op: Any, value: onnx_ir.Value, kind: DataType | None, shape: tuple[int, int]) -> onnx_ir.Value:
    """Return an initializer of the same bytes with another dtype and shape, once for all that read it so."""
    weight: Expression = op.weight(value)
    assert kind is not None
    if not isinstance(weight, (Source, Literal)):
        raise Decline(f"{value.name} is computed, expected bytes of a file")
    viewed = dataclasses.replace(weight, dtype=kind, shape=shape)
    if viewed.nbytes != weight.nbytes:
        raise Decline(f"{value.name} has {weight.nbytes} bytes, expected {viewed.nbytes} of {kind.name}{list(shape)}")
    if (weight.dtype, weight.shape) == (kind, shape):
        return value
    made: onnx_ir.Value = op.shared(
        ("view", value, kind, shape), lambda: op.initializer(f"{value.name}.{kind.name.lower()}", viewed)
    )
    return made


@expands("GatherBlockQuantized", attributes=("bits", "block_size", "gather_axis", "quantize_axis"), inputs=4, opset=21)
def _gather_block_quantized(op: Any, node: onnx_ir.Node) -> Values:
    """Look up in the dequantised table; uint8 tables of fewer bits are packed along their last axis."""
    data, bits = required(node, 0), attribute(node, "bits", 4)
    gathered, along = attribute(node, "gather_axis", 0), attribute(node, "quantize_axis", 1)
    weight: Expression = op.weight(data)
    if bits not in _CODES or len(weight.shape) != 2 or gathered != 0 or along % 2 != 1:
        raise Decline(f"{called(node)} is no look-up of rows in a matrix of 4 or 8 bits, quantised along its rows")
    if data.dtype not in {DataType.UINT8, DataType.UINT4, DataType.INT4}:
        raise Decline(f"{data.name} holds {data.dtype}, expected uint8, uint4 or int4")
    rows, width = weight.shape
    width = width * 8 // bits if data.dtype == DataType.UINT8 else width
    block = attribute(node, "block_size", 128)
    if width % block:
        raise Decline(f"{data.name} has {width} columns, which {block} does not divide")
    scales, zeros = required(node, 2), operand(node, 3)
    if data.dtype == DataType.UINT8:
        wide = _dequantized(op, data, scales, zeros, (rows, width // block, block), bits)
    else:
        wide = op.DequantizeLinear(data, scales, zeros, axis=1, block_size=block)
    return [op.Gather(wide, required(node, 1), axis=0)]


@expands("QuantizeLinear", "DequantizeLinear", attributes=("axis",), inputs=3)
def _linear(op: Any, node: onnx_ir.Node) -> Values:
    """Quantise or dequantise with 8-bit codes by the standard operator, which has known more kinds of codes since."""
    x, scale, zero = required(node, 0), required(node, 1), operand(node, 2)
    codes = x.dtype if node.op_type == "DequantizeLinear" else DataType.UINT8 if zero is None else zero.dtype
    if codes not in {DataType.INT8, DataType.UINT8}:
        raise Decline(f"{called(node)} has codes of {codes}, expected 8 bits")
    if scale.dtype != DataType.FLOAT:
        raise Decline(f"{called(node)} has scales of {scale.dtype}, expected fp32")
    return [op.node(node.op_type, x, scale, zero, **{name: item.value for name, item in node.attributes.items()})]
