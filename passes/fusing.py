"""What the fusing passes share: which opset their operators need, and numbers read from constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.shapes import Dimension
from passopt.passes.base import Decline

#: RMSNormalization, RotaryEmbedding and Attention came with this opset.
FUSED_OPSET = 23


def require_opset(op: Any, opset: int = FUSED_OPSET) -> None:
    """Decline, with what to do, in a model whose opset does not have the fused operator."""
    if op.opset < opset:
        raise Decline(f"the fused operator needs opset {opset}, this model has {op.opset}; run legalize first")


def fits(found: Sequence[Dimension], wanted: Sequence[Dimension]) -> bool:
    """True unless lengths are known to differ: 1 broadcasts. An exporter may leave one out, or make up a name."""
    if len(found) != len(wanted):
        return False
    pairs = [{one, other} - {None} for one, other in zip(found, wanted, strict=True)]
    return all(len(pair) < 2 or (1 not in pair and not all(isinstance(dim, int) for dim in pair)) for pair in pairs)


def number(op: Any, value: onnx_ir.Value | None, default: float | None = None) -> float:
    """The number that a constant holds, a scalar or a vector of one; `default` if the match did not bind one."""
    if value is None and default is not None:
        return default
    array = op.constant(value)
    if array.size != 1 or array.ndim > 1:  # one number on more axes broadcasts what it is combined with
        raise Decline(f"{value.name if value is not None else 'a constant'} is {list(array.shape)}, not one number")
    return float(array.reshape(-1)[0])
