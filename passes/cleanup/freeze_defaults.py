"""Take graph inputs that have a default for constants (the freeze-defaults pass)."""

from __future__ import annotations

import dataclasses

import onnx_ir

from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult


@dataclasses.dataclass(frozen=True)
class FreezeDefaults(Pass):
    """Let passes see the weights of old files, which list all of their weights as inputs that a caller may replace.

    Before: ``g (x, w) <w = …> { y = MatMul(x, w) }``
    After:  ``g (x) <w = …> { y = MatMul(x, w) }``
    Whoever runs the model can no longer give other numbers for these inputs.
    """

    name = "freeze-defaults"
    changes_interface = True

    def run(self, model: onnx_ir.Model) -> PassResult:
        frozen = [value for value in model.graph.inputs if value.is_initializer() and value.const_value is not None]
        for value in frozen:
            model.graph.inputs.remove(value)
            assert value.const_value is not None
            value.shape = onnx_ir.Shape(value.const_value.shape.numpy())  # The input may have stated a symbol.
        return PassResult(modified=bool(frozen), matches=len(frozen))
