"""Replace calls of local functions by their bodies, with onnx-ir's inliner (the inline-functions pass)."""

from __future__ import annotations

import onnx_ir
import onnx_ir.passes
import onnx_ir.passes.common
from onnx_ir.passes.common.inliner import InlinePassResult

from passopt.passes.guests import ir_pass


@ir_pass("inline-functions")
def inline_functions() -> onnx_ir.passes.PassBase:
    """Replace calls of local functions by their bodies, for tools that take standard operators only.

    Before: ``y, k, v = passopt.AlibiAttention(query, key, value, slopes, positions, mask, past_key, past_value)``
    After:  ``y = Cast(Attention(Cast(query), …, slopes · positions + mask))``, the function's own body
    """
    return _Inline()


class _Inline(onnx_ir.passes.common.InlinePass):
    """Refuse what onnx-ir's inliner cannot do, by the error that such a pass is expected to raise."""

    def call(self, model: onnx_ir.Model) -> InlinePassResult:
        try:
            return super().call(model)
        except ValueError as error:  # another opset, a body among the attributes of a call, or too many inputs
            advice = ". Run legalize first, which brings the model and its functions to one opset"
            raise onnx_ir.passes.PreconditionError(f"{error}{advice if 'Opset' in str(error) else ''}") from None
