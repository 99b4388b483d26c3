"""Give the head a bias, which splitting the vocabulary between ranks needs (the inject-norm-head-bias pass)."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.ir.graph.decoder import LOGITS
from passopt.ir.weights.literals import Fill
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter


@dataclasses.dataclass(frozen=True)
class InjectNormHeadBias(RewritePass):
    """Give the head a zero bias that is sharded with it, in which a target can mask the rows that padding added.

    Before: ``logits = MatMul(x, Transpose(w))``
    After:  ``logits = Add(MatMul(x, Transpose(w)), bias)``, bias zeros [vocab]
    """

    name = "inject-norm-head-bias"
    after = ("fold-norm-head",)

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, op.Transpose(w, perm=[1, 0]), bind="logits")

    def rewrite(self, op: Rewriter, x: Any, w: Any, logits: Any) -> Any:
        if not logits.is_graph_output() or logits.name != LOGITS:
            raise Decline("not the head: its output is not the logits")
        if w.shape is None or w.dtype is None or not isinstance(w.shape[0], int):
            raise Decline(f"the vocabulary of {w.name} is unknown")
        bias = op.initializer("lm_head.bias", Fill(w.dtype, (w.shape[0],), 0.0))
        return op.Add(op.MatMul(x, op.Transpose(w, perm=[1, 0])), bias)
