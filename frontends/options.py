"""Define the options of an export, without importing torch, so that the command line can report mistakes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from passopt.ir.dtypes import DTYPES, MODEL_FLOATS
from passopt.ir.errors import UsageError
from passopt.ir.weights.expressions import DataType

#: The form of Baichuan2's ALiBi bias: slopes × columns, or a constant `[heads, positions, positions]`.
Alibi: TypeAlias = Literal["formula", "baked"]
#: The exporter: torch.export, or the older one that records TorchScript. Both are in use and write different graphs.
Exporter: TypeAlias = Literal["dynamo", "torchscript"]
#: The attention implementation of transformers that is traced.
Attention: TypeAlias = Literal["eager", "sdpa"]
#: The phase of the graph: one for everything, one without past for prefill only, or one for a single token.
Phase: TypeAlias = Literal["merged", "prefill", "decode"]

#: The `model_type`s of transformers' own classes that are supported: each was exported, compared with eager torch, and
#: run through the passes.
MODEL_TYPES = frozenset(
    {"bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mpt", "opt", "phi3", "qwen2", "qwen3"}
)

OPSETS = range(18, 24)
_DEFAULT_OPSETS = {"dynamo": 21, "torchscript": 20}
#: The newest opset that torch writes with the torchscript exporter.
_LAST_TORCHSCRIPT_OPSET = 20


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of an export. A wrong value raises UsageError.

    If `opset` is None, it is 21, or 20 for the torchscript exporter. If `attention` is None, the family decides.
    """

    dtype: DataType = DataType.FLOAT16
    opset: int | None = None
    exporter: Exporter = "dynamo"
    attention: Attention | None = None
    alibi: Alibi = "formula"
    phase: Phase = "merged"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in MODEL_FLOATS:
            raise UsageError(
                f"export computes in {_listed(kind.name for kind in DTYPES.values())}, not in {self.dtype.name}"
            )
        for name, kind in (("alibi", Alibi), ("exporter", Exporter), ("phase", Phase)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} is one of {_listed(get_args(kind))}, not {getattr(self, name)!r}")
        if self.attention is not None and self.attention not in get_args(Attention):
            raise UsageError(f"attention is one of {_listed(get_args(Attention))}, not {self.attention!r}")
        if self.target_opset not in OPSETS:
            raise UsageError(f"opset is one of {_listed(map(str, OPSETS))}, not {self.target_opset}")
        if self.exporter == "torchscript" and self.target_opset > _LAST_TORCHSCRIPT_OPSET:
            raise UsageError(
                f"the torchscript exporter writes opset ≤ {_LAST_TORCHSCRIPT_OPSET}, not {self.target_opset}; "
                f"the dynamo exporter writes up to {OPSETS[-1]}, and the pass legalize raises the opset of a graph"
            )
        if self.exporter == "torchscript" and self.alibi == "baked":
            raise UsageError(
                "the torchscript exporter cannot slice a baked ALiBi mask; leave out `alibi`, which computes the mask, "
                "or take the dynamo exporter"
            )

    @property
    def target_opset(self) -> int:
        """Return the opset of the graph: the one asked for, or the exporter's default."""
        return _DEFAULT_OPSETS[self.exporter] if self.opset is None else self.opset


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
