"""Define the base class of passes that are made of rules: a traced `pattern` and a `rewrite` method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.gc_pause import collector_paused
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.driver import Driver


class RewritePass(Pass):
    """A pass of one rule. `pattern(self, op, …)` says what to match; `rewrite(self, op, …)` gives what replaces it.

    `rewrite` takes any of the pattern's variables by name and returns one value per root, in the pattern's order. It
    raises `Decline` where the rule does not apply. It never deletes a node: the driver removes what died. A name that
    only some alternatives bind has a default in `rewrite`: what it gets where another one matched.
    """

    def pattern(self, op: Any, *variables: Any) -> Any:
        """Trace what to match; the parameters after `op` are the variables."""
        raise NotImplementedError(f"{self.name} has no pattern")

    def rewrite(self, op: Any, *variables: Any) -> Any:
        """Build the replacement of one match."""
        raise NotImplementedError(f"{self.name} has no rewrite")

    def rules(self) -> Sequence[tuple[Callable[..., Any], Callable[..., Any]]]:
        """(pattern, rewrite) pairs, tried in order: override where one idea has roots of several operators."""
        return [(self.pattern, self.rewrite)]

    def run(self, model: onnx_ir.Model) -> PassResult:
        with collector_paused():
            return Driver(self, model).run()
