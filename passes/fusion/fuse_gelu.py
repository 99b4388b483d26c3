"""Fuse the arithmetic of Gelu, by erf, tanh or sigmoid, into one operator (the fuse-gelu pass)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

#: The first opsets that have Gelu, and Swish with a factor.
_GELU, _SWISH = 20, 24
#: How far a constant may be from the formula: some write √2 as 1.41421.
_TOLERANCE = 5e-6
_NUMBERS: Mapping[str, float] = {
    "half": 0.5,
    "two": 2.0,
    "root": math.sqrt(2),
    "inverse": math.sqrt(0.5),
    "factor": math.sqrt(2 / math.pi),
    "cubic": 0.044715,
}


@dataclasses.dataclass(frozen=True)
class FuseGelu(RewritePass):
    """Write Gelu as one operator instead of five or more, for kernels that compute it in one sweep.

    Before: ``y = Mul(Mul(x, Add(Erf(Div(x, √2)), 1)), 0.5)``, or with ``Tanh(0.7979 · (x + 0.0447 · x³))`` for Erf(…)
    After:  ``y = Gelu(x)``, or ``y = Gelu(x, approximate="tanh")``
    The quick form, ``Mul(x, Sigmoid(Mul(x, 1.702)))``, becomes ``Swish(x, alpha=1.702)``, which needs opset 24.
    """

    name = "fuse-gelu"
    accuracy = REASSOCIATED
    after = ("legalize", "canonicalize")
    makes: ClassVar[tuple[str, ...]] = ("Gelu",)

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [(self.by_erf, self.rewrite_erf), (self.by_tanh, self.rewrite_tanh), (self.quick, self.rewrite_quick)]

    def by_erf(self, op: Any, x: Any) -> Any:
        """Match x · (1 + erf(x / √2)) / 2."""
        inner = op.any_of("inner", quotient=op.Div(x, op.scalar("root")), product=op.Mul(x, op.scalar("inverse")))
        return _halved(op, x, op.Add(op.Erf(inner), 1))

    def rewrite_erf(self, op: Rewriter, x: Any, **found: Any) -> Any:
        _check(op, x, found)
        return op.Gelu(x, approximate="none")

    def by_tanh(self, op: Any, x: Any) -> Any:
        """Match x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2, with x taken out of the sum or not."""
        factor, cubic = op.scalar("factor"), op.scalar("cubic")
        square = op.any_of("square", product=op.Mul(x, x), power=op.Pow(x, 2))
        cube = op.any_of("cube", power=op.Pow(x, 3), product=op.Mul(x, square))
        summed = op.Add(x, op.Mul(cubic, cube))
        curve = op.any_of("curve", late=op.Mul(cubic, square), early=op.Mul(op.Mul(cubic, x), x))
        grown = op.Add(curve, 1)
        inner = op.any_of(
            "inner",
            summed=op.Mul(factor, summed),
            first=op.Mul(op.Mul(x, factor), grown),
            last=op.Mul(factor, op.Mul(x, grown)),
            between=op.Mul(x, op.Mul(factor, grown)),
        )
        return _halved(op, x, op.Add(op.Tanh(inner), 1))

    def rewrite_tanh(self, op: Rewriter, x: Any, **found: Any) -> Any:
        _check(op, x, found)
        return op.Gelu(x, approximate="tanh")

    def quick(self, op: Any, x: Any) -> Any:
        """Match x · sigmoid(1.702 · x)."""
        return op.Mul(x, op.Sigmoid(op.Mul(x, op.scalar("alpha"))))

    def rewrite_quick(self, op: Rewriter, x: Any, alpha: Any) -> Any:
        op.require_opset(_SWISH)
        if not dimensions(x):
            raise Decline(f"the axes of {x.name} are unknown, or it has none, so that a constant may add some")
        return op.Swish(x, alpha=op.number(alpha))


def _halved(op: Any, x: Any, step: Any) -> Any:
    """Return the pattern of x · step / 2, in any order."""
    half, two = op.scalar("half"), op.scalar("two")
    lower = op.any_of("lowering", product=op.Mul(x, half), quotient=op.Div(x, two))
    return op.any_of(
        "order",
        last=op.Mul(op.Mul(x, step), half),
        divided=op.Div(op.Mul(x, step), two),
        first=op.Mul(lower, step),
        between=op.Mul(x, op.Mul(step, half)),
    )


def _check(op: Rewriter, x: onnx_ir.Value, found: Mapping[str, Any]) -> None:
    """Raise Decline unless the numbers are those of the formula, as exactly as the dtype holds them."""
    op.require_opset(_GELU)
    if x.dtype not in MODEL_FLOATS:
        raise Decline(f"{x.name} is {x.dtype}, for which constants are not exact enough to be told apart")
    if not dimensions(x):
        raise Decline(f"the axes of {x.name} are unknown, or it has none, so that a constant may add some")
    limits: Any = ml_dtypes.finfo(x.dtype.numpy())  # type: ignore[no-untyped-call]
    for name, expected in _NUMBERS.items():
        number = op.number(found.get(name), expected)
        if abs(number - expected) > max(_TOLERANCE, float(limits.eps)) * expected:
            raise Decline(f"{found[name].name} is {number:.7g}, Gelu has {expected:.7g} there")
