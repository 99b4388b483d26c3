"""Prepare the rules of a rewrite pass, and define `Rewriter`, the `op` that their `rewrite` methods get.

A rule is a pair of a pattern method and a rewrite method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir

from passopt.ir.errors import PassError
from passopt.ir.graph.builder import Builder, TypesMemo
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.framework.base import Decline
from passopt.passes.framework.defects import NEXT_STEP, failure
from passopt.passes.patterns.language import Pattern, trace
from passopt.passes.patterns.matcher import Match
from passopt.passes.patterns.quick_tests import Constants
from passopt.passes.patterns.validation import check_pattern, wanted_names

#: The first opset that has RMSNormalization, RotaryEmbedding and Attention.
FUSED_OPSET = 23


class RuleOwner(Protocol):
    """The part of a pass that its rules and the driver need: its name, and its pairs of pattern and rewrite."""

    @property
    def name(self) -> str:
        """Return the name of the pass on the command line."""

    def rules(self) -> Sequence[tuple[Callable[..., Any], Callable[..., Any]]]:
        """Return the pairs of pattern and rewrite methods, in the order in which they are tried."""

    def __hash__(self) -> int:
        """Return a hash: passes of equal options are equal, and their rules are traced once."""


class Rewriter(Builder):
    """The `op` that a `rewrite` method gets: it builds nodes, and reads constants and weights.

    ``op.OPERATOR(*inputs, attribute=…)`` makes a node and returns its output; numbers, lists of integers and arrays
    become initializers. ``op.initializer(name, tensor)`` makes an initializer from an array or a weight expression.
    ``op.opset`` is the opset of the model. The methods that read a value decline if it is not of the expected kind.
    The driver hands one to every rewrite; use it instead of calling this class.

    Example:
        Replace ``MatMul(x, Transpose(w))`` by a product with a weight that is stored transposed::

            def rewrite(self, op, x, w):
                weight = op.weight(w)  # a lazy expression: nothing is read from the checkpoint
                if len(weight.shape) != 2:
                    raise Decline(f"{w.name} has {len(weight.shape)} axes, expected 2")
                return op.MatMul(x, op.initializer(f"{w.name}.transposed", weight.transpose()))
    """

    def __init__(
        self,
        opset: int,
        unique: Callable[[str], str],
        hint: str,
        memory: dict[Hashable, onnx_ir.Value] | None = None,
        *,
        types: TypesMemo | None = None,
        constants: Constants | None = None,
    ) -> None:
        super().__init__(opset, unique, hint, types=types)
        self._memory = memory if memory is not None else {}
        self._known = constants or Constants()

    def shared(self, key: Hashable, make: Callable[[], onnx_ir.Value]) -> onnx_ir.Value:
        """Return an initializer that is made once and used at all matches of a pass, such as one table for all layers.

        Args:
            key: What identifies the initializer among those of this pass and model.
            make: Makes the initializer with `op.initializer`; it is called only if `key` is new.

        Returns:
            The initializer for this key.
        """
        value = self._memory.get(key)
        if value is None:
            value = self._memory[key] = make()
        elif value not in self.built.initializers:
            self.built.initializers.append(value)
        return value

    def weight(self, value: onnx_ir.Value) -> Expression:
        """Return the lazy expression of a weight or constant, from which slices, casts and so on can be made.

        Args:
            value: An initializer or the output of a Constant node.

        Returns:
            The expression. Nothing is read from the checkpoint.

        Raises:
            Decline: If the value is computed or is a graph input.
        """
        expression = expression_of(value) if not value.is_graph_input() else None
        if expression is None:
            raise Decline(f"{value.name} is not a constant weight")
        return expression

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array of a small constant.

        Args:
            value: An initializer or the output of a Constant node, of at most 1024 bytes and not a checkpoint weight.

        Returns:
            The array, which must not be changed.

        Raises:
            Decline: If the value is absent, or anything else than a small constant.
        """
        array = self._known.array(value) if value is not None else None
        if array is None:
            raise Decline(f"{value.name if value is not None else 'an absent input'} is not a small constant")
        return array

    def number(self, value: onnx_ir.Value | None, default: float | None = None) -> float:
        """Return the number that a small constant holds, which must be a scalar or a vector of one element.

        Args:
            value: The constant, or None if the match did not bind it.
            default: What to return if `value` is None.

        Returns:
            The number as a float.

        Raises:
            Decline: If the value is no small constant, has more elements or axes, or is None without a `default`.
        """
        if value is None and default is not None:
            return default
        array = self.constant(value)
        if array.size != 1 or array.ndim > 1:  # One number on more axes may add axes to what it is combined with.
            raise Decline(f"{value.name if value is not None else 'a constant'} is {list(array.shape)}, not one number")
        return float(array.reshape(-1)[0])

    def require_opset(self, opset: int = FUSED_OPSET) -> None:
        """Decline if the model's opset does not have the fused operator, and tell the user to run `legalize` first.

        Args:
            opset: The first opset that has the operator.

        Raises:
            Decline: If the opset of the model is lower.
        """
        if self.opset < opset:
            raise Decline(f"the fused operator needs opset {opset}, this model has {self.opset}; run legalize first")


class Rule:
    """A rule made ready for matching: its traced and checked pattern, and its rewrite.

    Attributes:
        name: The name of the pattern method.
        source: The `file:line` of the pattern method.
        where: The name of the pass and `source`, with which messages begin.
        pattern: The traced pattern.
        rewrite: The rewrite method.
        wanted: The names that `rewrite` takes after `op`, each with its default, which is used if a match does not
            bind the name.
    """

    def __init__(self, owner: RuleOwner, pattern: Callable[..., Any], rewrite: Callable[..., Any]) -> None:
        self.name = getattr(pattern, "__name__", "pattern")
        self.source = source_line(pattern)
        self.where = f"{owner.name} ({self.source})"
        self.pattern: Pattern = trace(pattern, self.where)
        check_pattern(self.pattern, self.where)
        self.rewrite = rewrite
        kinds = [item.kind for item in inspect.signature(rewrite).parameters.values()]
        self._takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.wanted = wanted_names(self.pattern, rewrite, self.where)

    def arguments(self, match: Match) -> dict[str, Any]:
        """Return the keyword arguments of `rewrite` for a match; a method that takes `**found` gets all bound names."""
        bindings = match.bindings
        wanted = {name: bindings.get(name, default) for name, default in self.wanted.items()}
        return {**bindings, **wanted} if self._takes_all else wanted


def rules_of(owner: RuleOwner) -> tuple[Rule, ...]:
    """Trace and check the rules of a pass, in the order in which they are tried.

    Raises:
        PassError: If a rule can never work.
    """
    try:
        hash(owner)
    except TypeError:  # A pass with a list among its options cannot be remembered.
        return _traced.__wrapped__(owner)
    key: Any = owner
    return _traced(key)


@functools.lru_cache(maxsize=64)
def _traced(owner: Any) -> tuple[Rule, ...]:
    """Trace the rules of a pass once, however many models it runs on: equal passes have equal rules."""
    try:
        pairs = [(pattern, rewrite) for pattern, rewrite in owner.rules()]
    except Exception as error:
        raise PassError(f"{owner.name}: its rules {failure(error, type(owner).rules)}\n{NEXT_STEP}") from error
    return tuple(Rule(owner, pattern, rewrite) for pattern, rewrite in pairs)


def source_line(method: Callable[..., Any]) -> str:
    """Return the `file:line` at which a function is defined."""
    code = inspect.unwrap(method).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
