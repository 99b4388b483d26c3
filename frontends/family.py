"""What export needs to know of a kind of model, and the one step that all of them are traced as.

Shapes: b batch, q positions of this step, p positions in the cache, kv = p + q.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import onnx_ir
import torch

from passopt.frontends.checkpoint import Checkpoint
from passopt.ir.weights.expressions import Source

#: Per layer, key and value [b, heads, length, width].
Cache: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes of the cache: every layer holds a key and a value [b, `heads`, p, `width`]."""

    layers: int
    heads: int
    width: int


class Step(torch.nn.Module, abc.ABC):
    """A model with tensors in and tensors out: one step of prefill, chunked prefill or decode."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock

    @property
    @abc.abstractmethod
    def takes_positions(self) -> bool:
        """Whether position_ids are an input."""

    @abc.abstractmethod
    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Cache,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Cache]:
        """[b, q], [b, kv], a cache of p positions (no layer at all: no cache), [b, q] → logits, a cache of kv."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """→ logits, then each layer's key and value."""
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            for state in (state for layer in past for state in layer):
                # Else the length of each layer's cache is a symbol of its own, which slows tracing by a third.
                torch._check(state.shape[2] == past[0][0].shape[2])  # type: ignore[no-untyped-call]
        logits, present = self.run(input_ids, attention_mask, past, position_ids)
        return (logits, *(state for layer in present for state in layer))


class Family(abc.ABC):
    """How models of one kind are built, shimmed, traced and compared with. Holds no model: each build is fresh."""

    #: Traced constants, as attributes of the stock instance, and the initializers that they become.
    constants: ClassVar[Mapping[str, str]] = {}

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abc.abstractmethod
    def source_root(self) -> Path:
        """The folder whose lines `passopt.source` names."""

    @abc.abstractmethod
    def build(self, dtype: torch.dtype, *, small: bool) -> Any:
        """An instance of the stock class: parameters without data, its computed tables real.

        `small`: the same architecture with sizes for a self-check. Raises ModelError if the class cannot be built.
        """

    @abc.abstractmethod
    def cache_shape(self, model: Any) -> CacheShape:
        """Of a built model."""

    @abc.abstractmethod
    def sources(self, model: Any) -> Mapping[str, Source]:
        """The checkpoint's tensors under the names of the model's parameters; what it computes itself left out."""

    @abc.abstractmethod
    def step(self, model: Any) -> Step:
        """What is traced; shims go onto this instance, never onto files or classes."""

    @abc.abstractmethod
    def reference(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Cache]:
        """What the untouched stock code computes, all at once and without a past."""

    def ties(self, model: Any) -> Mapping[str, str]:
        """Names that repeat a parameter, and the name under which it is bound."""
        return {}

    def extra_weights(self, model: Any, scratch: Path) -> Mapping[str, Source]:
        """Weights that are in no checkpoint, written to `scratch`, by initializer."""
        return {}

    def check(self, graph: onnx_ir.Model) -> None:
        """Raise ModelError where tracing is known to lose something silently."""
        return
