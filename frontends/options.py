"""What can be asked of an export. Loads no torch, so the command line can say what is wrong at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from passopt.ir.errors import UsageError
from passopt.ir.weights.expressions import DataType

#: The ALiBi bias of Baichuan2 as slopes × columns, or as the constant [heads, positions, positions].
Alibi: TypeAlias = Literal["formula", "baked"]
#: torch.export, or the older exporter that records TorchScript; both are in use, and they spell graphs differently.
Exporter: TypeAlias = Literal["dynamo", "torchscript"]
#: Which of transformers' attention implementations is traced.
Attention: TypeAlias = Literal["eager", "sdpa"]
#: One graph for everything, a graph without past for prefill only, or one that takes a single token.
Phase: TypeAlias = Literal["merged", "prefill", "decode"]

#: `model_type`s of transformers' own classes, each exported, compared with eager torch and put through the passes.
MODEL_TYPES = frozenset(
    {"bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mpt", "opt", "phi3", "qwen2", "qwen3"}
)

DTYPES = (DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16)
OPSETS = range(18, 24)
_DEFAULT_OPSETS = {"dynamo": 21, "torchscript": 20}
#: torch writes no newer ones by this exporter.
_LAST_TORCHSCRIPT_OPSET = 20


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """`opset` None: 21, or 20 by torchscript. `attention` None: what suits the family. Raises UsageError."""

    dtype: DataType = DataType.FLOAT16
    opset: int | None = None
    exporter: Exporter = "dynamo"
    attention: Attention | None = None
    alibi: Alibi = "formula"
    phase: Phase = "merged"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"export computes in {_listed(kind.name for kind in DTYPES)}, not in {self.dtype.name}")
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

    @property
    def target_opset(self) -> int:
        return _DEFAULT_OPSETS[self.exporter] if self.opset is None else self.opset


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
