"""Compute scores and their softmax in fp32 while a half-precision model is traced, without touching its code.

torch calls such a thing a function mode: while it is active, it replaces calls of torch's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Fp32Islands(TorchFunctionMode):
    """A torch function mode in which a half-precision model computes masked scores and their softmax in fp32.

    The results are cast back. The stock code would round the ALiBi bias, and sums of masks and scores, to half
    precision. In fp32 models nothing changes. The head's normalisation stays as it is: the pass `fold-norm-head`
    computes it once, in fp32.
    """

    def __init__(self, dtype: torch.dtype, *, fused: bool) -> None:
        """Prepare the mode for a model of `dtype`; `fused` says that the exporter writes fused attention operators."""
        super().__init__()
        self._dtype = dtype
        self._fused = fused

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            if self._dtype != torch.float32:
                return _attention(*args, **kwargs)
            # torch broadcasts one key head over several queries; a fused operator needs `enable_gqa` for that.
            grouped = self._fused and args[0].shape[1] != args[1].shape[1]
            return function(*args, **kwargs | {"enable_gqa": True} if grouped else kwargs)
        if function in {functional.softmax, torch.softmax} and self._dtype != torch.float32:
            return function(args[0].float(), *args[1:], **kwargs).to(self._dtype)
        return function(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute attention with the softmax in fp32.

    Scores are computed in the model's dtype, with both factors scaled as torch does, so that fp16 can hold them.
    """
    assert not is_causal, "a step masks by attn_mask, since its queries do not start at position 0"
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    root = query.shape[-1] ** -0.25 if scale is None else scale**0.5
    scores = torch.matmul(query * root, key.transpose(-2, -1) * root).float()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(torch.float32).min)
    elif attn_mask is not None:
        scores = scores + attn_mask.float()
    return torch.matmul(functional.softmax(scores, dim=-1).to(value.dtype), value)
