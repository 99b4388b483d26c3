"""Decompose Gelu and Swish into the arithmetic that they stand for (the decompose-activations pass)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.passes.decomposition.decompose_pass import DecomposePass, required
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class DecomposeActivations(DecomposePass):
    """Give targets without Gelu (any opset below 20) or Swish (below 24) the operators they are made of.

    Before: ``y = Gelu(x)`` or ``y = Gelu(x, approximate="tanh")`` or ``y = Swish(x)``
    After:  ``y = Mul(Mul(x, Add(Erf(Div(x, √2)), 1)), 0.5)``, with Tanh(0.7979 · (x + 0.0447 · x³)) for Erf(…), or
            ``y = Mul(x, Sigmoid(x))``
    """

    name = "decompose-activations"
    accuracy = REASSOCIATED
    decomposes = ("Gelu", "Swish")

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        x = required(node, 0)
        if node.op_type == "Swish":
            alpha = float(attribute(node, "alpha", 1.0))
            return [op.Mul(x, op.Sigmoid(x if alpha == 1 else op.Mul(x, alpha)))]
        if attribute(node, "approximate", "none") == "tanh":
            cubic = op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715))
            step = op.Tanh(op.Mul(cubic, math.sqrt(2 / math.pi)))
        else:
            step = op.Erf(op.Div(x, math.sqrt(2)))
        return [op.Mul(op.Mul(x, op.Add(step, 1.0)), 0.5)]
