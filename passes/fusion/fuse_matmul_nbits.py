"""Define the pass `fuse-matmul-nbits`, which hands weights of 4 bits to the operator that onnxruntime has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.groups import FOUR_BITS, nibbles, unsigned, view
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rewrite_pass import RewritePass
from passopt.passes.patterns.rules import Rewriter

#: The groups that onnxruntime takes: powers of two from here on.
_LEAST_GROUP = 16


@dataclasses.dataclass(frozen=True)
class FuseMatMulNBits(RewritePass):
    """Let onnxruntime multiply codes of 4 bits where they lie, instead of dequantising whole weights at every step.

    Before: ``y = MatMul(x, Transpose(DequantizeLinear<axis=1, block_size=64>(w.codes, w.scales)))``
    After:  ``y = com.microsoft.MatMulNBits<K, N, bits=4, block_size=64>(x, w.codes, w.scales)``
    Codes become unsigned, two in a byte, and zero points are packed by rows. `decompose-contrib` is the way back. It
    stands behind `int4` and `tp`, which know the standard operators only; so do the kernels of `passopt compile`.
    """

    name = "fuse-matmul-nbits"
    after = ("quantize-groups", "shard", "cast", "legalize", "decompose-contrib")
    makes = ("com.microsoft::MatMulNBits",)
    accuracy = REASSOCIATED

    def rules(self) -> Sequence[tuple[Any, Any]]:
        """Return one rule for symmetric codes and one for codes with zero points."""
        return [(self.symmetric, self.rewrite_symmetric), (self.with_zeros, self.rewrite_with_zeros)]

    def symmetric(self, op: Any, x: Any, codes: Any, scales: Any, axis: Any, block: Any) -> Any:
        """Match codes [out, in] around zero."""
        wide = op.DequantizeLinear(codes, scales, axis=axis, block_size=block)
        return op.MatMul(x, op.Transpose(wide, perm=[1, 0]))

    def rewrite_symmetric(self, op: Rewriter, x: Any, codes: Any, scales: Any, axis: Any, block: Any) -> Any:
        """Multiply by the codes; their zero point is in the middle once they are unsigned."""
        if codes.dtype != onnx_ir.DataType.INT4:
            raise Decline(f"{codes.name} holds {_named(codes)} without zero points, expected int4")
        return self._product(op, x, codes, scales, None, axis, block)

    def with_zeros(self, op: Any, x: Any, codes: Any, scales: Any, zeros: Any, axis: Any, block: Any) -> Any:
        """Match codes [out, in] with zero points."""
        wide = op.DequantizeLinear(codes, scales, zeros, axis=axis, block_size=block)
        return op.MatMul(x, op.Transpose(wide, perm=[1, 0]))

    def rewrite_with_zeros(
        self, op: Rewriter, x: Any, codes: Any, scales: Any, zeros: Any, axis: Any, block: Any
    ) -> Any:
        """Multiply by the codes with their zero points."""
        return self._product(op, x, codes, scales, zeros, axis, block)

    def _product(self, op: Rewriter, x: Any, codes: Any, scales: Any, zeros: Any, axis: Any, block: Any) -> Any:
        if codes.dtype not in FOUR_BITS or len(codes.shape) != 2:
            raise Decline(f"{codes.name} holds {_named(codes)}, expected a matrix of int4 or uint4")
        if scales.dtype not in MODEL_FLOATS or scales.dtype != x.dtype:
            raise Decline(f"{scales.name} holds {_named(scales)}, expected the dtype of the activations")
        if int(axis) % 2 != 1:
            raise Decline(f"{codes.name} has scales along axis {axis}, expected groups of inputs along axis 1")
        if block < _LEAST_GROUP or block & (block - 1):
            raise Decline(f"{codes.name} has groups of {block}, expected a power of two from {_LEAST_GROUP} on")
        weight: Expression = op.weight(codes)
        rows, columns = weight.shape
        if columns % block:
            raise Decline(f"{codes.name} has {columns} inputs, which groups of {block} do not fill")
        packed = op.shared(("codes", codes), partial(self._codes, op, codes.name, weight, block))
        inputs = [x, packed, scales]
        if zeros is not None:
            inputs.append(op.shared(("zeros", zeros), partial(self._zeros, op, zeros.name, op.weight(zeros))))
        sizes: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": int(block)}
        return op.node("MatMulNBits", *inputs, domain=MICROSOFT, **sizes)

    def _codes(self, op: Rewriter, name: str | None, weight: Expression, block: int) -> onnx_ir.Value:
        rows, columns = weight.shape
        packed = view(nibbles(unsigned(weight)), (rows, columns // block, block // 2))
        return op.initializer(f"{name}.nbits", packed)

    def _zeros(self, op: Rewriter, name: str | None, zeros: Expression) -> onnx_ir.Value:
        """Return zero points packed by rows, the last byte of a row filled up."""
        found = unsigned(zeros)
        if found.shape[1] % 2:
            found = found.pad(1, found.shape[1] + 1)
        return op.initializer(f"{name}.nbits", nibbles(found))


def _named(value: onnx_ir.Value) -> str:
    return "values of an unknown dtype" if value.dtype is None else value.dtype.name
