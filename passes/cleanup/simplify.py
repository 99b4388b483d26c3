"""Run onnxsim with the weights held out of its way (the simplify pass)."""

from __future__ import annotations

import dataclasses

import onnx_ir

from passopt.passes.cleanup.fold_constants import FoldConstants
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.guests.decorators import optional_module

#: Rounds after which a model is left as it is, in case onnxsim turns it back and forth.
_MOST_ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Run onnxsim's clean-ups without loading weights: it sees every weight as an input, so it folds none.

    Before: ``y = Transpose(Transpose(Reshape(x, Concat(Shape(x), two + one)), p), q)``
    After:  ``y = Reshape(x, Concat(Shape(x), [3]))``
    Constants are folded as fold-constants does it, because onnxsim believes more of lengths than is proven. It takes
    no more memory than the graph without weights. A DequantizeLinear is never folded, and a product stays a MatMul,
    which other passes look for. Inputs and outputs keep their names; nodes that survive keep their metadata.
    `limit`: bytes of the largest constant that folding may make.
    """

    name = "simplify"
    accuracy = REASSOCIATED

    limit: int = 1 << 20

    def run(self, model: onnx_ir.Model) -> PassResult:
        simplifier = optional_module("passopt.passes.guests.simplifier", self.name)
        total = PassResult()
        for _ in range(_MOST_ROUNDS):  # what one of the two leaves may be something to do for the other
            results = [simplifier.run_onnxsim(model, self.name, self.limit), FoldConstants(self.limit).run(model)]
            total.matches += sum(result.matches for result in results)
            if not any(result.modified for result in results):
                break
            total.modified = True
        return total
