"""Trace the rules of a rewrite pass, and give their `rewrite` methods the `op` that builds and reads.

A rule is a pattern and a rewrite; `Rewriter` is the `op` that a rewrite gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir

from passopt.ir.graph.builder import Builder, TypesMemo
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import expression_of
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.language import Pattern, trace
from passopt.passes.patterns.matcher import Match
from passopt.passes.patterns.quick_tests import Constants
from passopt.passes.patterns.validation import check_pattern, wanted_names

#: RMSNormalization, RotaryEmbedding and Attention came with this opset.
FUSED_OPSET = 23


class RuleOwner(Protocol):
    """What the rules and their driver need of a pass: its name, and its pairs of pattern and rewrite."""

    @property
    def name(self) -> str:
        """The pass's name on the command line."""

    def rules(self) -> Sequence[tuple[Callable[..., Any], Callable[..., Any]]]:
        """Pairs of pattern and rewrite, tried in order."""


class Rewriter(Builder):
    """The `op` of a `rewrite` method: builds nodes, and reads constants and weights (declining if they are not)."""

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
        """The initializer that `make` returns, made once for all sites of a pass: one table for every layer."""
        value = self._memory.get(key)
        if value is None:
            value = self._memory[key] = make()
        elif value not in self.built.initializers:
            self.built.initializers.append(value)
        return value

    def weight(self, value: onnx_ir.Value) -> Expression:
        """The lazy expression of a constant weight; declines for a computed value."""
        expression = expression_of(value) if not value.is_graph_input() else None
        if expression is None:
            raise Decline(f"{value.name} is not a constant weight")
        return expression

    def constant(self, value: onnx_ir.Value | None) -> np.ndarray[Any, np.dtype[Any]]:
        """The array of a small constant; declines for anything else."""
        array = self._known.array(value) if value is not None else None
        if array is None:
            raise Decline(f"{value.name if value is not None else 'an absent input'} is not a small constant")
        return array

    def number(self, value: onnx_ir.Value | None, default: float | None = None) -> float:
        """The number that a constant holds, a scalar or a vector of one; `default` if the match did not bind one."""
        if value is None and default is not None:
            return default
        array = self.constant(value)
        if array.size != 1 or array.ndim > 1:  # one number on more axes broadcasts what it is combined with
            raise Decline(f"{value.name if value is not None else 'a constant'} is {list(array.shape)}, not one number")
        return float(array.reshape(-1)[0])

    def require_opset(self, opset: int = FUSED_OPSET) -> None:
        """Decline, with what to do, in a model whose opset does not have the fused operator."""
        if self.opset < opset:
            raise Decline(f"the fused operator needs opset {opset}, this model has {self.opset}; run legalize first")


class Rule:
    """A rule made ready: the traced pattern, `where` it is written, and the names that its rewrite takes.

    `wanted` gives for each of these names what `rewrite` gets where a match does not bind it.
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
        """What `rewrite` gets after `op`, by name; one that takes `**found` gets all that is bound."""
        bindings = match.bindings
        wanted = {name: bindings.get(name, default) for name, default in self.wanted.items()}
        return {**bindings, **wanted} if self._takes_all else wanted


def rules_of(owner: RuleOwner) -> tuple[Rule, ...]:
    """The rules of a pass, traced, in the order in which they are tried. Raises PassError for one that cannot work."""
    return tuple(Rule(owner, pattern, rewrite) for pattern, rewrite in owner.rules())


def source_line(method: Callable[..., Any]) -> str:
    """`file:line` of a function."""
    code = inspect.unwrap(method).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
