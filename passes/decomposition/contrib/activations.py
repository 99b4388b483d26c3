"""Expand Gelu and its kin, with and without a bias, and activations that onnxruntime fused into a product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.passes.decomposition.contrib.registry import Values, expands
from passopt.passes.decomposition.decompose_pass import operand, required
from passopt.passes.framework.base import Decline

_OPSET_OF_GELU = 20

#: The activations that fused products may have, with the parameters that each takes.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


@expands("Gelu", inputs=1)
def _gelu(op: Any, node: onnx_ir.Node) -> Values:
    return [gelu(op, required(node, 0))]


@expands("BiasGelu", inputs=2)
def _bias_gelu(op: Any, node: onnx_ir.Node) -> Values:
    return [gelu(op, op.Add(required(node, 0), required(node, 1)))]


@expands("FastGelu", inputs=2)
def _fast_gelu(op: Any, node: onnx_ir.Node) -> Values:
    x, bias = required(node, 0), operand(node, 1)
    x = x if bias is None else op.Add(x, bias)
    if op.opset >= _OPSET_OF_GELU:
        return [op.Gelu(x, approximate="tanh")]
    cubic = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
    step = op.Tanh(op.Mul(cubic, math.sqrt(2 / math.pi)))
    return [op.Mul(op.Mul(x, op.Add(step, 1.0)), 0.5)]


@expands("QuickGelu", attributes=("alpha",), inputs=1)
def _quick_gelu(op: Any, node: onnx_ir.Node) -> Values:
    x, alpha = required(node, 0), float(attribute(node, "alpha", 1.702))
    return [op.Mul(x, op.Sigmoid(x if alpha == 1 else op.Mul(x, alpha)))]


def gelu(op: Any, x: onnx_ir.Value) -> Any:
    """Return x · Φ(x), by the operator if the opset has it."""
    if op.opset >= _OPSET_OF_GELU:
        return op.Gelu(x)
    step = op.Erf(op.Div(x, math.sqrt(2)))
    return op.Mul(op.Mul(x, op.Add(step, 1.0)), 0.5)


def activated(op: Any, x: onnx_ir.Value, name: str, parameters: Sequence[float]) -> Any:
    """Return an activation of `x` with its parameters in order; those that are missing keep their defaults.

    Raises:
        Decline: If the activation, or one of its parameters, is unknown.
    """
    if not name:
        return x
    if name == "Clip" and len(parameters) == 2:
        return op.Clip(x, *(float(bound) for bound in parameters))
    known = _FUSED.get(name)
    if known is None or len(parameters) > len(known):
        raise Decline(f"the activation {name} with parameters {list(parameters)} has no standard form")
    return op.node(name, x, **dict(zip(known, map(float, parameters), strict=False)))
