"""Fuse the arithmetic of a root mean square norm into one operator (the fuse-rms-norm pass)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.fusion.widened_inputs import before_widening
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class FuseRmsNorm(RewritePass):
    """Write a root mean square norm as one operator instead of six, for kernels that compute it in one sweep.

    Before: ``y = Mul(w, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), eps)))))``
    After:  ``y = RMSNormalization(x, w, epsilon=eps)``
    The casts of a half-precision model, to fp32 and back, go: the operator computes its sum in fp32 (stash_type).
    """

    name = "fuse-rms-norm"
    accuracy = REASSOCIATED
    after = ("legalize", "cse")
    makes: ClassVar[tuple[str, ...]] = ("RMSNormalization",)

    def pattern(self, op: Any, x: Any, w: Any, eps: Any, axes: Any) -> Any:
        squared = op.any_of("square", power=op.Pow(x, 2), product=op.Mul(x, x))
        variance = op.Add(op.ReduceMean(squared, axes, keepdims=1), eps)
        root = op.Sqrt(variance)
        inverse = op.any_of(
            "inverse", reciprocal=op.Reciprocal(root), quotient=op.Div(1, root), power=op.Pow(variance, -0.5)
        )
        normalised = op.any_of("division", product=op.Mul(x, inverse), quotient=op.Div(x, root))
        return op.Mul(w, op.optional("narrowed", normalised, op.Cast))

    def rewrite(self, op: Rewriter, x: Any, w: Any, eps: Any, axes: Any, narrowed: str) -> Any:
        op.require_opset()
        dims = dimensions(x) or []
        if not dims or op.constant(axes).reshape(-1).tolist() not in ([-1], [len(dims) - 1]):
            raise Decline(f"takes the mean over axes {op.constant(axes).tolist()} of {x.name} {dims}, not the last one")
        if dimensions(w) not in ([dims[-1]], [1] * (len(dims) - 1) + [dims[-1]]) or not isinstance(dims[-1], int):
            raise Decline(f"the factor {w.name} {dimensions(w)} is not a weight of the last axis of {x.name} {dims}")
        epsilon = op.number(eps)
        source = before_widening(x, w) if narrowed == "present" else x
        if source is None:
            raise Decline(f"is cast to {w.dtype}, but {x.name} was not widened from that")
        if x.dtype == onnx_ir.DataType.DOUBLE:
            raise Decline(f"the input {x.name} is {x.dtype}, the operator computes in FLOAT")
        if source.dtype != w.dtype:
            raise Decline(f"the input {source.name} is {source.dtype}, the weight {w.name} {w.dtype}")
        scale = w if len(w.shape) == 1 else op.Reshape(w, [dims[-1]])
        return op.RMSNormalization(source, scale, axis=-1, epsilon=epsilon, stash_type=1)
