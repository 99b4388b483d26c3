"""Decompose RMSNormalization into the arithmetic that it stands for (the decompose-rms-norm pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.passes.decomposition.decompose_pass import DecomposePass, cast, required
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class DecomposeRmsNorm(DecomposePass):
    """Give targets without RMSNormalization (any opset below 23) the operators it is made of.

    Before: ``y = RMSNormalization(x, w, epsilon=eps)``
    After:  ``y = Mul(w, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), eps)))))``
    In half precision the mean is computed in fp32, as stash_type says, and cast back before the weight.
    """

    name = "decompose-rms-norm"
    accuracy = REASSOCIATED
    after = ("fuse-rms-norm",)
    decomposes = ("RMSNormalization",)

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        x, weight = required(node, 0), required(node, 1)
        wide = cast(op, x, onnx_ir.DataType(attribute(node, "stash_type", 1)))
        squares = op.ReduceMean(op.Pow(wide, 2.0), _axes(x, attribute(node, "axis", -1)), keepdims=1)
        inverse = op.Reciprocal(op.Sqrt(op.Add(squares, float(attribute(node, "epsilon", 1e-5)))))
        return [op.Mul(weight, cast(op, op.Mul(wide, inverse), weight.dtype))]


def _axes(x: onnx_ir.Value, axis: int) -> list[int]:
    """Return the axes from `axis` to the last, counted from the back.

    Raises Decline if `axis` counts from the front and the number of axes is unknown.
    """
    if axis >= 0:
        if x.shape is None:
            raise Decline(f"normalises from axis {axis} on, and the number of axes of {x.name} is unknown")
        axis -= len(x.shape)
    return list(range(axis, 0))
