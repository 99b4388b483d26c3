"""Define the base class of passes that are made of rules: a traced `pattern` and a `rewrite` method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.gc_pause import collector_paused
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.driver import Driver


class RewritePass(Pass):
    """The base class of passes that are made of rules: a `pattern` says what to match, a `rewrite` what replaces it.

    A pass with one rule defines the methods `pattern` and `rewrite`. A pass with several rules overrides `rules`. The
    rules are applied until none matches any more. `Pass` describes the class attributes, such as `name` and `accuracy`.

    Example:
        A pass that uses the fused activation of opset 24, which the model must have::

            @dataclasses.dataclass(frozen=True)
            class FuseSilu(RewritePass):
                '''Let targets with a fused activation use it.

                Before: ``y = Mul(x, Sigmoid(x))``
                After:  ``y = Swish(x)``
                '''

                name = "fuse-silu"
                accuracy = REASSOCIATED

                def pattern(self, op, x):
                    return op.Mul(x, op.Sigmoid(x))  # Mul commutes: both orders match

                def rewrite(self, op, x):
                    if op.opset < 24:
                        raise Decline(f"Swish needs opset 24, this model has {op.opset}")
                    return op.Swish(x)
    """

    def pattern(self, op: Any, *variables: Any) -> Any:
        """Describe what to match; the method is run once, before any graph is looked at.

        Args:
            op: Builds the pattern; the page on the pattern language lists all that it can match.
            *variables: Name them in your method, as in ``def pattern(self, op, x, w)``. Each matches one value.

        Returns:
            The root, which is the output of an operator and which the rewrite replaces. A sequence of several outputs
            makes several roots; each must share a value with those before it.

        Raises:
            PassError: If the pass does not define the method.
        """
        raise PassError(f"{self.name} has no pattern: define pattern(self, op, …) on {type(self).__name__}")

    def rewrite(self, op: Any, *variables: Any) -> Any:
        """Build what replaces one match.

        The method only builds nodes and reads constants. It never changes or deletes a node: the driver does that.

        Args:
            op: A `Rewriter`, which makes nodes, such as ``op.MatMul(x, w)``, and reads constants and weights.
            *variables: Any of the names that the pattern binds. If only some alternatives of the pattern bind a name,
                give it a default, such as ``k=None``, which is used where another alternative matched.

        Returns:
            The value that replaces the root; for several roots a list of one value per root, in the pattern's order.

        Raises:
            Decline: If the rule does not apply to this match, with the reason.
            PassError: If the pass does not define the method.
        """
        raise PassError(f"{self.name} has no rewrite: define rewrite(self, op, …) on {type(self).__name__}")

    def rules(self) -> Sequence[tuple[Callable[..., Any], Callable[..., Any]]]:
        """Return the (pattern, rewrite) pairs of the pass, which are tried in this order at every node.

        Override this if one idea needs several patterns, such as roots of different operators.
        """
        return [(self.pattern, self.rewrite)]

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Apply the rules to `model` in place until none matches any more.

        Args:
            model: The model to change.

        Returns:
            The counts of matches, tries and declines, and the statistics of every rule.
        """
        with collector_paused():
            return Driver(self, model).run()
