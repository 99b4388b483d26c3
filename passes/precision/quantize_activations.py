"""Define the pass `quantize-activations`, which multiplies int8 codes of weights and activations as integers.

Activations are quantised row by row while the model runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir

from passopt.ir.graph.linears import LARGEST_CODE, LinearWeight, QuantizedRows, find_weight, quantized_rows_of
from passopt.ir.graph.provenance import called
from passopt.ir.weights.expressions import DataType
from passopt.passes.framework.accuracy import QualityBar, lossy
from passopt.passes.framework.base import Decline
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rewrite_pass import RewritePass

#: With more channels than this, a sum of products of codes may overflow int32; codes of other quantisers go to -128.
_LONGEST = (2**31 - 1) // (LARGEST_CODE * 128)
_OPSET_OF_AXES_INPUT = 18


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(RewritePass):
    """Multiply int8 by int8, since integer products are several times as fast and weights stay bytes.

    Before: ``y = MatMul(x, Transpose(DequantizeLinear(w.codes, w.scales, axis=0)))``
    After:  ``y = Mul(Mul(Cast<fp32>(MatMulInteger(codes, Transpose(w.codes))), scale), w.scales)``
            with ``absmax = ReduceMax(Abs(x), -1)``, ``q = Div(absmax, 127)``, ``scale = Where(q == 0, 1, q)``,
            ``codes = Cast<int8>(Clip(Round(Div(x, scale)), -127, 127))``, once for all linears of one ``x``
    Every row of x, which is one position, has a scale of its own, so that no position depends on another. If x has 16
    bits, all this is computed in fp32, since sums overflow 16 bits, and y is cast back. onnxruntime sums int8 · int8
    exactly in int32, also on a CPU that has only AVX2. On ranks, a row-parallel linear quantises its own part of each
    row, which rounds differently from the whole row.
    """

    name = "quantize-activations"
    after = ("quantize-weights",)
    makes: ClassVar[tuple[str, ...]] = ("MatMulInteger",)
    #: A code is off by at most 1/254 of the row's largest element, and roundings cancel in a sum over channels.
    #: The same trained model with both passes: KL 0.03, 0.18 at 99 %, top-1 0.87 to 0.90.
    accuracy = lossy(3e-2, bar=QualityBar(kl=0.06, kl99=0.36, top1=0.84))

    activations: Literal["dynamic", "none"] = "dynamic"

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Quantise the inputs of int8 linears in place; do nothing with `activations=none`."""
        return PassResult() if self.activations == "none" else super().run(model)

    def pattern(self, op: Any, x: Any, codes: Any, scales: Any) -> Any:
        zero = op.maybe(op.variable("zero"))
        dequantized = op.DequantizeLinear(codes, scales, zero, bind="dequantized")
        layouts = {"turned": op.Transpose(dequantized, bind="operand"), "direct": dequantized}
        return op.MatMul(x, op.any_of("layout", **layouts), bind="product")

    def rewrite(
        self, op: Any, x: Any, codes: Any, scales: Any, zero: Any, dequantized: Any, product: Any, operand: Any = None
    ) -> Any:
        weight = find_weight(product.producer())
        if weight is None:
            raise Decline(f"{codes.name} {_kind(codes, zero)}")
        if weight.contracted is None or weight.contracted > _LONGEST:
            raise Decline(f"{codes.name} contracts {weight.contracted} channels; int32 holds sums of {_LONGEST:,}")
        if x.dtype is None:
            raise Decline(f"the dtype of {x.name} is unknown")
        for value in (dequantized, operand):
            if value is not None:
                _check_only_multiplied(value, codes)
        rows = _rows(op, x)
        sums = op.MatMulInteger(rows.codes, _turned(op, weight))
        wide = op.Mul(op.Cast(sums, to=DataType.FLOAT.value), rows.scales)
        result = op.Mul(wide, _wide_scales(op, scales))
        return result if x.dtype == DataType.FLOAT else op.Cast(result, to=x.dtype.value)


def _kind(codes: onnx_ir.Value, zero: onnx_ir.Value | None) -> str:
    """Say why `codes` are not the codes of a linear's weight."""
    if codes.dtype != DataType.INT8:
        return f"is {codes.dtype}, expected int8"
    if zero is not None:
        return "has a zero point"
    return "is no constant matrix with one scale per output channel"


def _check_only_multiplied(value: onnx_ir.Value, codes: onnx_ir.Value) -> None:
    """Decline if anything but linears reads the dequantised weight `value`.

    Such a reader would keep the dequantised weight in the graph, where it is computed at every step.
    """
    if value.is_graph_output():
        raise Decline(f"{codes.name} is a graph output once dequantised")
    for node, index in value.uses():
        if not (node.op_type == "Transpose" or (node.op_type == "MatMul" and index == 1)):
            raise Decline(f"{codes.name} is used dequantised by {called(node)}")


def _rows(op: Any, x: onnx_ir.Value) -> QuantizedRows:
    """Return the rows of x as codes and scales: those that another linear of x has already, or new ones."""
    wide = x if x.dtype == DataType.FLOAT else _wide(x)
    found = quantized_rows_of(wide) if wide is not None else None
    if found is not None:
        return found
    hint, op.hint = op.hint, x.name
    if wide is None:
        wide = op.Cast(x, to=DataType.FLOAT.value)
    magnitudes = op.Abs(wide)
    if op.opset < _OPSET_OF_AXES_INPUT:
        largest = op.ReduceMax(magnitudes, axes=[-1], keepdims=1)
    else:
        largest = op.ReduceMax(magnitudes, _constant(op, "last-axis", np.array([-1])), keepdims=1)
    quotient = op.Div(largest, _constant(op, "largest-code", np.float32(LARGEST_CODE)))
    is_zero = op.Equal(quotient, _constant(op, "zero", np.float32(0)))
    scales = op.Where(is_zero, _constant(op, "one", np.float32(1)), quotient)
    bounds = [_constant(op, name, np.float32(number)) for name, number in _BOUNDS]
    codes = op.Cast(op.Clip(op.Round(op.Div(wide, scales)), *bounds), to=DataType.INT8.value)
    op.hint = hint
    return QuantizedRows(wide, codes, scales, ())


_BOUNDS = (("smallest-code", -LARGEST_CODE), ("largest-code", LARGEST_CODE))


def _wide(x: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return a Cast of x to fp32 whose rows are quantised already; None if there is none."""
    for node, _ in x.uses():
        casts = node.op_type == "Cast" and node.attributes["to"].as_int() == DataType.FLOAT
        if casts and quantized_rows_of(node.outputs[0]) is not None:
            return node.outputs[0]
    return None


def _turned(op: Any, weight: LinearWeight) -> onnx_ir.Value:
    """Return the codes of a weight as `[in, out]`, the right operand of a product."""
    value: onnx_ir.Value = op.Transpose(weight.value, perm=[1, 0]) if weight.transposed else weight.value
    return value


def _wide_scales(op: Any, scales: onnx_ir.Value) -> onnx_ir.Value:
    """Return the scales of a weight in fp32; equal scales are cast once for all linears."""
    if scales.dtype == DataType.FLOAT:
        return scales
    cast = op.weight(scales).cast(DataType.FLOAT)
    shared: onnx_ir.Value = op.shared(("scales", scales), lambda: op.initializer(f"{scales.name}.fp32", cast))
    return shared


def _constant(op: Any, name: str, number: Any) -> onnx_ir.Value:
    """Return an initializer with a number, which all quantised rows of the model share."""
    shared: onnx_ir.Value = op.shared(name, lambda: op.initializer(f"rows.{name}", np.asarray(number)))
    return shared
