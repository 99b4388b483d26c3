"""Fuse the arithmetic of a layer norm, with its factor and bias, into one operator (the fuse-layer-norm pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir

from passopt.ir.shapes.dimensions import dimensions, same
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.fusion.widened_inputs import before_widening
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

#: The first opset that has LayerNormalization.
_OPSET = 17


@dataclasses.dataclass(frozen=True)
class FuseLayerNorm(RewritePass):
    """Write a layer norm as one operator instead of nine, for kernels that compute it in one sweep.

    Before: ``d = Sub(x, ReduceMean(x)); y = Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2)), eps))), w), b)``
    After:  ``y = LayerNormalization(x, w, b, epsilon=eps)``
    A norm without a factor gets one of ones. The sum of a skip connection stays in front of the norm: no operator of
    ONNX does both.
    """

    name = "fuse-layer-norm"
    accuracy = REASSOCIATED
    after = ("legalize", "canonicalize", "cse")
    makes: ClassVar[tuple[str, ...]] = ("LayerNormalization",)

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [
            (self.normalised, self.normalise),
            (self.with_factor, self.take_factor),
            (self.with_bias, self.take_bias),
            (self.distributed, self.gather_up),
        ]

    def normalised(self, op: Any, x: Any, eps: Any, axes: Any, others: Any) -> Any:
        """Match the differences from the mean, divided by the root of the mean of their squares."""
        centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
        squared = op.any_of("square", power=op.Pow(centred, 2), product=op.Mul(centred, centred))
        root, inverse = _roots(op, op.Add(op.ReduceMean(squared, others, keepdims=1), eps))
        return op.any_of("division", product=op.Mul(centred, inverse), quotient=op.Div(centred, root))

    def normalise(self, op: Rewriter, x: Any, eps: Any, axes: Any, others: Any) -> Any:
        _check_means(op, x, axes, others)
        return op.LayerNormalization(x, _ones(op, x), axis=-1, epsilon=op.number(eps), stash_type=1)

    def distributed(self, op: Any, x: Any, eps: Any, axes: Any, others: Any, factor: Any, bias: Any) -> Any:
        """Match Keras's form: the factor is multiplied into the root first, and the mean is taken off the bias."""
        mean = op.ReduceMean(x, axes, keepdims=1)
        centred = op.Sub(x, mean)
        squared = op.any_of("square", power=op.Pow(centred, 2), product=op.Mul(centred, centred))
        _, inverse = _roots(op, op.Add(op.ReduceMean(squared, others, keepdims=1), eps))
        scale = op.Mul(inverse, factor)
        return op.Add(op.Mul(x, scale), op.Sub(bias, op.Mul(mean, scale)))

    def gather_up(self, op: Rewriter, x: Any, eps: Any, axes: Any, others: Any, factor: Any, bias: Any) -> Any:
        _check_means(op, x, axes, others)
        if not x.dtype == factor.dtype == bias.dtype:
            raise Decline(f"{x.name} is {x.dtype}, the factor {factor.dtype}, the bias {bias.dtype}")
        vectors = (_vector(op, factor, x, "factor"), _vector(op, bias, x, "bias"))
        return op.LayerNormalization(x, *vectors, axis=-1, epsilon=op.number(eps), stash_type=1)

    def with_factor(self, op: Any, x: Any, ones: Any, factor: Any) -> Any:
        """Match a norm that this pass made, perhaps cast to 16 bits, and a factor behind it."""
        norm = op.LayerNormalization(x, ones, op.maybe(op.variable("bias")), bind="norm")
        return op.Mul(op.optional("narrowed", norm, op.Cast), factor)

    def take_factor(
        self, op: Rewriter, x: Any, ones: Any, factor: Any, norm: Any, narrowed: str, bias: Any = None
    ) -> Any:
        if bias is not None or ones is not _ones(op, x):
            raise Decline(f"{norm.name} has a factor or a bias of its own")
        _check_alone(norm)
        source = before_widening(x, factor) if narrowed == "present" else x
        if source is None or source.dtype != factor.dtype:
            raise Decline(f"{x.name} is {x.dtype}, the factor {factor.name} {factor.dtype}, and no cast joins them")
        return _again(op, norm, source, _vector(op, factor, x, "factor"))

    def with_bias(self, op: Any, x: Any, scale: Any, bias: Any) -> Any:
        """Match a norm without a bias, and a bias behind it."""
        norm = op.LayerNormalization(x, scale, op.maybe(op.variable("own")), axis=-1, bind="norm")
        return op.Add(norm, bias)

    def take_bias(self, op: Rewriter, x: Any, scale: Any, bias: Any, norm: Any, own: Any = None) -> Any:
        if own is not None:
            raise Decline(f"{norm.name} has a bias of its own")
        _check_alone(norm)
        if bias.dtype != x.dtype:
            raise Decline(f"{x.name} is {x.dtype}, the bias {bias.name} {bias.dtype}")
        return _again(op, norm, x, scale, _vector(op, bias, x, "bias"))


def _roots(op: Any, variance: Any) -> tuple[Any, Any]:
    """Return the pattern of the root of a variance, and that of one divided by it."""
    root = op.Sqrt(variance)
    return root, op.any_of(
        "inverse", reciprocal=op.Reciprocal(root), quotient=op.Div(1, root), power=op.Pow(variance, -0.5)
    )


def _check_means(op: Rewriter, x: onnx_ir.Value, *means: onnx_ir.Value) -> None:
    """Raise Decline unless both means are taken over the last axis, of a known width, in a dtype that is computed."""
    op.require_opset(_OPSET)
    dims = dimensions(x) or []
    for item in means:
        if not dims or op.constant(item).reshape(-1).tolist() not in ([-1], [len(dims) - 1]):
            raise Decline(f"takes a mean over axes {op.constant(item).tolist()} of {x.name} {dims}, not the last one")
    if not isinstance(dims[-1], int):
        raise Decline(f"the width of {x.name} {dims} is unknown")
    if x.dtype == onnx_ir.DataType.DOUBLE:
        raise Decline(f"the input {x.name} is {x.dtype}, the operator computes in FLOAT")


def _ones(op: Rewriter, x: onnx_ir.Value) -> onnx_ir.Value:
    """Return the factor of ones for norms of this width and dtype, one for all sites of a run."""
    width = (dimensions(x) or [0])[-1]
    assert x.dtype is not None
    ones = np.ones(width if isinstance(width, int) else 0, x.dtype.numpy())
    return op.shared(("ones", x.dtype, width), lambda: op.initializer("norm.ones", ones))


def _check_alone(norm: onnx_ir.Value) -> None:
    """Raise Decline if others read the norm as it is, since it would be computed twice."""
    if len(norm.uses()) > 1 or norm.is_graph_output() or len(norm.producer().outputs) > 1:  # type: ignore[union-attr]
        raise Decline(f"others read {norm.name}, or its mean, as it is")


def _vector(op: Rewriter, value: onnx_ir.Value, x: onnx_ir.Value, role: str) -> onnx_ir.Value:
    """Return a factor or bias as [width]; raise Decline unless it is one number for each channel."""
    dims, width = dimensions(value), (dimensions(x) or [None])[-1]
    ndim = len(dimensions(x) or [])
    if not dims or not same(dims[-1:], [width]) or len(dims) > ndim or any(dim != 1 for dim in dims[:-1]):
        raise Decline(f"the {role} {value.name} {dims} is not known to be a vector of the {width} channels of {x.name}")
    made: onnx_ir.Value = value if len(dims) == 1 else op.Reshape(value, [width if isinstance(width, int) else -1])
    return made


def _again(op: Rewriter, norm: onnx_ir.Value, *inputs: onnx_ir.Value) -> onnx_ir.Value:
    """Build the same norm of other inputs."""
    attributes = norm.producer().attributes.items()  # type: ignore[union-attr]
    made: onnx_ir.Value = op.LayerNormalization(*inputs, **{name: item.value for name, item in attributes})
    return made
