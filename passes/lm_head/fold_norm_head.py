"""Move NormHead's normalisation from the graph into the weight (the fold-norm-head pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

#: The least norm to divide by, torch's own. A 16-bit graph rounds it to 0, and a row of zeros would become NaN.
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class FoldNormHead(RewritePass):
    """Normalise the head's rows once in the weight, not at every step: quantising and splitting need the final rows.

    Before: ``w_hat = Div(w, Expand(Clip(ReduceL2(w, axis=1), eps)))``
    After:  ``w_hat = normalize_rows(w)``, a lazy weight
    """

    name = "fold-norm-head"
    accuracy = REASSOCIATED

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [(self.widened, self.rewrite), (self.plain, self.rewrite)]

    def plain(self, op: Any, w: Any, axes: Any, floor: Any, shape: Any) -> Any:
        """Match a normalisation in the weight's own dtype."""
        return _normalized(op, op.weight(w), axes, floor, shape, "result")

    def widened(self, op: Any, w: Any, axes: Any, floor: Any, shape: Any) -> Any:
        """Match a 16-bit weight that is normalised in fp32, as `normalize_rows` does it too."""
        return op.Cast(_normalized(op, op.Cast(op.weight(w)), axes, floor, shape, None), bind="result")

    def rewrite(self, op: Rewriter, w: Any, floor: Any, spelling: str, result: Any, axes: Any = None) -> Any:
        weight = op.weight(w)
        if len(weight.shape) != 2:
            raise Decline(f"{w.name} has {len(weight.shape)} axes, a head has 2")
        if result.dtype != w.dtype:
            raise Decline(f"{w.name} is normalised as {result.dtype}, the weight is {w.dtype}")
        if spelling == "axes_input" and [axis % 2 for axis in op.constant(axes).reshape(-1).tolist()] != [1]:
            raise Decline(f"{w.name} is normalised over axes {op.constant(axes).tolist()}, not over its rows")
        if op.constant(floor).size != 1:
            raise Decline(f"{w.name} has a floor of shape {list(op.constant(floor).shape)}, expected one number")
        epsilon = max(float(op.constant(floor).item()), _EPSILON)
        return op.initializer(f"{w.name}.normalized", weight.normalize_rows(epsilon))


def _normalized(op: Any, wide: Any, axes: Any, floor: Any, shape: Any, bind: str | None) -> Any:
    """Return the pattern of `wide` divided by the norms of its rows."""
    # Without axes ReduceL2 reduces over all of them: one norm for the whole weight, which is no NormHead.
    norm = op.any_of(
        "spelling",
        axes_input=op.ReduceL2(wide, axes, keepdims=1),
        attribute=op.ReduceL2(wide, axes=[1], keepdims=1),
    )
    clipped = op.any_of("bound", clip=op.Clip(norm, floor), maximum=op.Max(norm, floor))
    return op.Div(wide, op.any_of("broadcast", expand=op.Expand(clipped, shape), implicit=clipped), bind=bind)
