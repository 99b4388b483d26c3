"""Replace calls of local functions by their bodies, with onnx-ir's inliner (the inline-functions pass)."""

from __future__ import annotations

import onnx_ir.passes
import onnx_ir.passes.common

from passopt.passes.guests import ir_pass


@ir_pass("inline-functions")
def inline_functions() -> onnx_ir.passes.PassBase:
    """Replace calls of local functions by their bodies, for tools that take standard operators only.

    Before: ``y, k, v = passopt.AlibiAttention(query, key, value, slopes, positions, mask, past_key, past_value)``
    After:  ``y = Cast(Attention(Cast(query), …, slopes · positions + mask))``, the function's own body
    """
    return onnx_ir.passes.common.InlinePass()
