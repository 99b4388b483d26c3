"""quantize-weights: int8 weights per output channel, dequantised in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.builder import Builder
from passopt.ir.errors import PassError
from passopt.ir.expressions import Expression
from passopt.ir.weights import is_checkpoint_weight
from passopt.passes.base import Decline, PassResult, lossy
from passopt.passes.head import is_head
from passopt.passes.rewriting import RewritePass

#: What DequantizeLinear takes as scales; a double weight stays as it is.
_SCALE_DTYPES = {onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16}
_OPSET_OF_HALF_SCALES = 19


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(RewritePass):
    """Store linear weights as int8 codes with one scale per output channel (absmax/127, symmetric): a quarter of fp32.

    Before: ``y = MatMul(x, Transpose(w))``, w [out, in]
    After:  ``y = MatMul(x, Transpose(DequantizeLinear(w.codes, w.scales, axis=0)))``
    Embedding and head stay unless asked for: an embedding becomes ``Gather(codes) · Gather(scales)``, since a
    dequantised table would be computed whole at every step.
    """

    name = "quantize-weights"
    after = ("fold-norm-head", "split-packed-qkv")
    #: A code is off by at most 1/254 of its channel's largest weight, a product of normal weights by 1 % of its own.
    accuracy = lossy(2e-2)

    embedding: bool = False
    head: bool = False

    def run(self, model: onnx_ir.Model) -> PassResult:
        opset = model.graph.opset_imports.get("", 0)
        half = [v.name for v in model.graph.initializers.values() if is_checkpoint_weight(v) and _is_half(v.dtype)]
        if half and opset < _OPSET_OF_HALF_SCALES:
            raise PassError(
                f"{self.name}: {half[0]} and {len(half) - 1} more weights are 16-bit; DequantizeLinear takes such "
                f"scales from opset {_OPSET_OF_HALF_SCALES} on, this model has {opset}. Export it at a later opset."
            )
        return super().run(model)

    def rules(self) -> Sequence[tuple[Any, Any]]:
        return [
            (self.transposed, self.rewrite_transposed),
            (self.direct, self.rewrite_direct),
            (self.looked_up, self.rewrite_looked_up),
        ]

    def transposed(self, op: Any, w: Any) -> Any:
        """A weight as the checkpoint holds it, [out, in]."""
        return op.Transpose(op.weight(w), perm=[1, 0], bind="turned")

    def rewrite_transposed(self, op: Any, w: Any, turned: Any) -> Any:
        weight = self._linear_weight(op, w, turned)
        return op.Transpose(dequantized(op, w.name, weight, axis=0), perm=[1, 0])

    def direct(self, op: Any, x: Any, w: Any) -> Any:
        """A weight that was transposed before, [in, out]."""
        return op.MatMul(x, op.weight(w))

    def rewrite_direct(self, op: Any, x: Any, w: Any) -> Any:
        weight = self._linear_weight(op, w, w)
        return op.MatMul(x, dequantized(op, w.name, weight, axis=1))

    def looked_up(self, op: Any, w: Any, ids: Any) -> Any:
        """An embedding, [vocab, hidden]."""
        return op.Gather(op.weight(w), ids, axis=0)

    def rewrite_looked_up(self, op: Any, w: Any, ids: Any) -> Any:
        if w.dtype not in _SCALE_DTYPES or len(w.shape) != 2:
            raise Decline(f"{w.name} is not a floating matrix")
        if not self.embedding:
            raise Decline(f"{w.name} is an embedding; int8{{embedding=true}} includes it")
        codes, scales = op.weight(w).quantize(0)
        rows = op.Gather(op.initializer(f"{w.name}.codes", codes), ids, axis=0)
        factor = op.Gather(op.initializer(f"{w.name}.scales", scales), ids, axis=0)
        return op.Mul(op.Cast(rows, to=w.dtype.value), op.Unsqueeze(factor, [-1]))

    def _linear_weight(self, op: Any, w: Any, operand: onnx_ir.Value) -> Expression:
        """The weight if all users of `operand` are linears that this pass includes; declines otherwise."""
        if w.dtype not in _SCALE_DTYPES or len(w.shape) != 2:
            raise Decline(f"{w.name} is not a floating matrix")
        if operand.is_graph_output():
            raise Decline(f"{w.name} is a graph output")
        users = [use.node for use in operand.uses()]
        if not users or any(node.op_type != "MatMul" or node.inputs[1] is not operand for node in users):
            raise Decline(f"{w.name} is used by other operators than MatMul")
        if not self.head and any(is_head(node) for node in users):
            raise Decline(f"{w.name} is the head; int8{{head=true}} includes it")
        weight: Expression = op.weight(w)
        return weight


def dequantized(op: Builder, name: str | None, weight: Expression, axis: int) -> Any:
    """DequantizeLinear of a weight's codes, one scale per index of `axis`; no zero point, since it is symmetric."""
    codes, scales = weight.quantize(axis)
    return op.DequantizeLinear(
        op.initializer(f"{name}.codes", codes), op.initializer(f"{name}.scales", scales), axis=axis
    )


def _is_half(dtype: onnx_ir.DataType | None) -> bool:
    return dtype in {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16}
