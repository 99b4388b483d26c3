"""What the fusing passes share: which opset their operators need, and numbers read from constants."""

from __future__ import annotations

from typing import Any

import onnx_ir

from passopt.passes.base import Decline

#: RMSNormalization, RotaryEmbedding and Attention came with this opset.
FUSED_OPSET = 23


def require_opset(op: Any, opset: int = FUSED_OPSET) -> None:
    """Decline, with what to do, in a model whose opset does not have the fused operator."""
    if op.opset < opset:
        raise Decline(f"the fused operator needs opset {opset}, this model has {op.opset}; run legalize first")


def number(op: Any, value: onnx_ir.Value | None, default: float | None = None) -> float:
    """The number that a constant holds, a scalar or a vector of one; `default` if the match did not bind one."""
    if value is None and default is not None:
        return default
    array = op.constant(value)
    if array.size != 1 or array.ndim > 1:  # one number on more axes broadcasts what it is combined with
        raise Decline(f"{value.name if value is not None else 'a constant'} is {list(array.shape)}, not one number")
    return float(array.reshape(-1)[0])
