"""Define what export needs to know of a kind of model, and the one step as which every model is traced.

Shapes use b batch, q positions of this step, p positions in the cache, kv = p + q.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import onnx_ir
import torch

from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.graph.decoder import LENGTH_KEYS
from passopt.ir.weights.expressions import Expression, Source

#: Per layer, the key and the value, each `[b, heads, length, width]`.
Cache: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The sizes of the cache: every layer holds a key and a value, each `[b, heads, p, width]`."""

    layers: int
    heads: int
    width: int


class Step(torch.nn.Module, abc.ABC):
    """A model with tensors in and tensors out, which computes one step of prefill, chunked prefill or decode."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock

    @property
    @abc.abstractmethod
    def takes_positions(self) -> bool:
        """Return whether position_ids are an input."""

    @abc.abstractmethod
    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Cache,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Cache]:
        """Compute logits and the cache of kv positions.

        Args:
            input_ids: The tokens of this step, `[b, q]`.
            attention_mask: 1 for tokens, 0 for padding, `[b, kv]`.
            past: The cache of p positions; without any layer if there is no cache.
            position_ids: The positions of the tokens, `[b, q]`, or None if the model does not take them.
        """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits, then each layer's key and value."""
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            for state in (state for layer in past for state in layer):
                # Otherwise the cache of each layer would have a symbol of its own for its length, which slows down
                # tracing by a third.
                torch._check(state.shape[2] == past[0][0].shape[2])  # type: ignore[no-untyped-call]
        logits, present = self.run(input_ids, attention_mask, past, position_ids)
        return (logits, *(state for layer in present for state in layer))


def argument_names(model: Any) -> set[str]:
    """Return the names of the arguments of a model's forward, also of those that it only passes on to a parent."""
    names: set[str] = set()
    for parent in type(model).__mro__:
        if "forward" not in vars(parent):
            continue
        found = inspect.signature(vars(parent)["forward"]).parameters
        names |= found.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()) or "input_ids" in found:
            break
    return names


class Family(abc.ABC):
    """A kind of model: how it is built, prepared for tracing, traced and compared with the stock code.

    It holds no model: every build makes a new one.
    """

    #: Maps traced constants, named by attributes of the stock instance, to the initializers that they become.
    constants: ClassVar[Mapping[str, str]] = {}

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abc.abstractmethod
    def source_root(self) -> Path:
        """Return the folder with the source files whose lines `passopt.source` names."""

    @abc.abstractmethod
    def build(self, dtype: torch.dtype, *, small: bool) -> Any:
        """Build an instance of the stock class whose parameters have no data, but whose computed tables do.

        Args:
            dtype: The dtype of the parameters.
            small: Build the same architecture in the sizes of a self-check.

        Raises:
            ModelError: If the class cannot be built.
        """

    @abc.abstractmethod
    def cache_shape(self, model: Any) -> CacheShape:
        """Return the cache sizes of a built model."""

    @abc.abstractmethod
    def sources(self, model: Any) -> Mapping[str, Expression]:
        """Return the checkpoint's tensors by names of the model's parameters, without those that the model computes."""

    @abc.abstractmethod
    def step(self, model: Any) -> Step:
        """Return the step to trace; it may change this instance of the model, but never files or classes."""

    @abc.abstractmethod
    def reference(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """Compute logits and cache with the untouched stock code, all at once, behind a `past` that may be empty."""

    def positions(self, model: Any) -> int | None:
        """Return the number of positions that a built model has by its configuration, or None if that does not say."""
        found = [getattr(model.config, key, None) for key in LENGTH_KEYS]
        return min((length for length in found if isinstance(length, int)), default=None)

    def longest(self, model: Any) -> int | None:
        """Return the number of positions beyond which the traced step computes something else than the stock code.

        The result is None if there is none but those that tracing itself shows.
        """
        return None

    def numbers(self) -> set[int]:
        """Return all whole numbers of config.json: some are lengths at which the code changes what it computes."""
        found: set[int] = set()
        pending: list[Any] = [self.checkpoint.config]
        while pending:
            value = pending.pop()
            if isinstance(value, Mapping | list | tuple):
                pending.extend(value.values() if isinstance(value, Mapping) else value)
            elif isinstance(value, int) and not isinstance(value, bool):
                found.add(value)
        return found

    def takes_positions(self, model: Any) -> bool:
        """Return whether the stock class is told the positions of tokens."""
        return "position_ids" in argument_names(model)

    def ties(self, model: Any) -> Mapping[str, str]:
        """Return a mapping from each name that repeats a parameter to the name under which the parameter is bound."""
        return {}

    def extra_weights(self, model: Any, scratch: Path) -> Mapping[str, Source]:
        """Return weights that are in no checkpoint, by initializer, after writing them to `scratch`."""
        return {}

    def check(self, graph: onnx_ir.Model) -> None:
        """Raise ModelError if the graph lacks something that tracing is known to lose silently."""
        return
