"""What the fusing passes share: which opset their operators need."""

from __future__ import annotations

from typing import Any

from passopt.passes.base import Decline

#: RMSNormalization, RotaryEmbedding and Attention came with this opset.
FUSED_OPSET = 23


def require_opset(op: Any, opset: int = FUSED_OPSET) -> None:
    """Decline, with what to do, in a model whose opset does not have the fused operator."""
    if op.opset < opset:
        raise Decline(f"the fused operator needs opset {opset}, this model has {op.opset}; run legalize first")
