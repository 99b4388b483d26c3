"""Expand products that onnxruntime fused with transposes, factors, activations or dequantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.passes.decomposition.contrib.activations import activated
from passopt.passes.decomposition.contrib.registry import Values, expands, ndim
from passopt.passes.decomposition.decompose_pass import operand, required

_GEMM = ("alpha", "beta", "transA", "transB")
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_FLOAT = onnx_ir.DataType.FLOAT.value


@expands(
    "FusedMatMul",
    "TransposeMatMul",
    attributes=("alpha", "transA", "transB", "transBatchA", "transBatchB"),
    inputs=2,
)
def _fused_matmul(op: Any, node: onnx_ir.Node) -> Values:
    sides = [_turned(op, node, required(node, index), side) for index, side in enumerate("AB")]
    product, alpha = op.MatMul(*sides), float(attribute(node, "alpha", 1.0))
    return [product if alpha == 1 else op.Mul(product, alpha)]


def _turned(op: Any, node: onnx_ir.Node, value: onnx_ir.Value, side: str) -> Any:
    """Return an operand with its axes in the order of a MatMul.

    With transBatch, the first axis is that of the rows (or of the columns, with trans), and the batch comes behind it.
    """
    swapped, batched = (bool(attribute(node, f"{name}{side}", 0)) for name in ("trans", "transBatch"))
    if not swapped and not batched:
        return value
    axes = list(range(ndim(value)))
    if len(axes) < 2:
        return value
    if batched:
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if swapped:
        axes = [*axes[:-2], axes[-1], axes[-2]]
    return op.Transpose(value, perm=axes)


@expands(
    "FusedGemm",
    attributes=(*_GEMM, "activation", "activation_alpha", "activation_beta", "activation_gamma"),
    inputs=3,
)
def _fused_gemm(op: Any, node: onnx_ir.Node) -> Values:
    kept = {name: node.attributes[name].value for name in _GEMM if name in node.attributes}
    product = op.Gemm(required(node, 0), required(node, 1), operand(node, 2), **kept)
    name = attribute(node, "activation", "")
    numbers = [attribute(node, f"activation_{part}", None) for part in ("alpha", "beta", "gamma")]
    return [activated(op, product, name, [number for number in numbers if number is not None])]


@expands("FusedConv", attributes=(*_CONV, "activation", "activation_params"), inputs=4)
def _fused_conv(op: Any, node: onnx_ir.Node) -> Values:
    kept = {name: node.attributes[name].value for name in _CONV if name in node.attributes}
    result, added = op.Conv(required(node, 0), required(node, 1), operand(node, 2), **kept), operand(node, 3)
    result = result if added is None else op.Add(result, added)
    return [activated(op, result, attribute(node, "activation", ""), attribute(node, "activation_params", []))]


@expands("DynamicQuantizeMatMul", inputs=5)
def _dynamic_quantize_matmul(op: Any, node: onnx_ir.Node) -> Values:
    codes, scale, zero = op.DynamicQuantizeLinear(required(node, 0), outputs=3)
    sums = op.MatMulInteger(codes, required(node, 1), zero, operand(node, 3))
    return [_scaled(op, sums, scale, required(node, 2), operand(node, 4))]


@expands("MatMulIntegerToFloat", inputs=7)
def _matmul_integer_to_float(op: Any, node: onnx_ir.Node) -> Values:
    sums = op.MatMulInteger(required(node, 0), required(node, 1), operand(node, 4), operand(node, 5))
    return [_scaled(op, sums, required(node, 2), required(node, 3), operand(node, 6))]


def _scaled(op: Any, sums: Any, first: Any, second: Any, bias: onnx_ir.Value | None) -> Any:
    """Return integer sums as floats: multiplied by the scales of both sides, plus the bias."""
    result = op.Mul(op.Cast(sums, to=first.dtype.value if first.dtype else _FLOAT), op.Mul(first, second))
    return result if bias is None else op.Add(result, bias)


@expands("ExpandDims", inputs=2)
def _expand_dims(op: Any, node: onnx_ir.Node) -> Values:
    return [op.Unsqueeze(required(node, 0), np.array([int(op.number(required(node, 1)))]))]


@expands("Trilu", attributes=("upper",), inputs=2, opset=14)
def _trilu(op: Any, node: onnx_ir.Node) -> Values:
    return [op.Trilu(required(node, 0), operand(node, 1), upper=attribute(node, "upper", 1))]


@expands("Range", inputs=3)
def _range(op: Any, node: onnx_ir.Node) -> Values:
    step = operand(node, 2)
    first = required(node, 0)
    if step is None:
        assert first.dtype is not None
        step = op.literal(np.asarray(1, first.dtype.numpy()))
    return [op.Range(first, required(node, 1), step)]


@expands("Pad", attributes=("mode",), inputs=3)
def _pad(op: Any, node: onnx_ir.Node) -> Values:
    mode = attribute(node, "mode", "constant")
    return [op.Pad(required(node, 0), op.Reshape(required(node, 1), [-1]), operand(node, 2), mode=mode)]


@expands("GatherND", inputs=2)
def _gather_nd(op: Any, node: onnx_ir.Node) -> Values:
    return [op.GatherND(required(node, 0), op.Cast(required(node, 1), to=onnx_ir.DataType.INT64.value))]
