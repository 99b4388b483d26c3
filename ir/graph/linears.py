"""Recognise linear layers: find the input, weight, scales and bias behind a MatMul or Gemm.

Passes, sharding and code generation all use this module; it changes nothing. A linear is y = x · wᵀ (+ bias) with a
constant weight: a MatMul or Gemm over floats or over int8 codes with a scale per output channel. It may also be the
integer form, whose activations are quantised row by row; then the last Mul stands for the whole linear.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import constant_tensor, expression_of, small_constant

#: Codes lie within ±127, so that the code of -x is the negated code of x.
LARGEST_CODE = 127
Activations: TypeAlias = Literal["float", "dynamic"]


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """A constant matrix as a linear reads it, with n output channels: stored `[n, k]` if `transposed`, else `[k, n]`.

    For a float weight, `scales` is None and `value` holds floats. Otherwise `scales` is `[n]` and `value` holds int8
    codes without a zero point. `nodes` are those between the constant and the linear.
    """

    value: onnx_ir.Value
    scales: onnx_ir.Value | None
    transposed: bool
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def channels(self) -> int | None:
        """Return n, the number of output channels; None if it is not a known number."""
        return self._length(0 if self.transposed else 1)

    @property
    def contracted(self) -> int | None:
        """Return k, the length that is summed over; None if it is not a known number."""
        return self._length(1 if self.transposed else 0)

    def _length(self, axis: int) -> int | None:
        length = self.value.shape[axis] if self.value.shape is not None else None
        return length if isinstance(length, int) else None

    def expression(self) -> Expression:
        """Return the floats or codes as `[n, k]`, however they are stored."""
        found = _expression(self.value)
        return found if self.transposed else found.transpose()


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """The rows of `input` `[.., k]` as int8 `codes` `[.., k]` with fp32 `scales` `[.., 1]`: x ≈ codes · scales."""

    input: onnx_ir.Value
    codes: onnx_ir.Value
    scales: onnx_ir.Value
    nodes: tuple[onnx_ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear: `output` `[.., n]` = `input` `[.., k]` · weightᵀ + `bias`; `rows` is the input quantised, if it is.

    `nodes` are all nodes that compute it, in order from the input to the output. Nodes of `rows` may be shared with
    other linears of the same input, and nodes of the weight with other linears of the same weight.
    """

    input: onnx_ir.Value
    output: onnx_ir.Value
    weight: LinearWeight
    rows: QuantizedRows | None
    bias: onnx_ir.Value | None
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def activations(self) -> Activations:
        """Return "dynamic" if the input is quantised row by row at run time, else "float"."""
        return "float" if self.rows is None else "dynamic"

    @property
    def scales(self) -> onnx_ir.Value | None:
        """Return the scales `[n]` of the weight; None for a float weight."""
        return self.weight.scales

    def scales_expression(self) -> Expression | None:
        """Return the scales `[n]` of the weight as an expression; None for a float weight."""
        return None if self.weight.scales is None else _expression(self.weight.scales)


def find_linear(node: onnx_ir.Node) -> Linear | None:
    """Return the linear whose last operator is `node`, or None if there is none.

    That operator is a MatMul or Gemm or, with dynamic activations, a Mul.
    """
    if node.domain:
        return None
    if node.op_type == "Mul":
        return find_dynamic_linear(node)
    weight = find_weight(node)
    data = node.inputs[0] if node.inputs else None
    if weight is None or data is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Linear(data, node.outputs[0], weight, None, bias, (*weight.nodes, node))


def find_weight(node: onnx_ir.Node) -> LinearWeight | None:
    """Return the weight on the right of a MatMul or plain Gemm, or None if there is no such constant weight.

    The weight is a constant, optionally behind a DequantizeLinear, a Transpose, or both. The result is None for a
    computed operand, for a weight that does not have two axes, for a Gemm with factors or a transposed input, and for
    codes with a zero point, blocks, or scales along the contracted axis.
    """
    if node.domain or node.op_type not in {"MatMul", "Gemm"} or (node.op_type == "Gemm" and not _is_plain(node)):
        return None
    turned = node.op_type == "Gemm" and bool(_integer(node, "transB", 0))
    found = _weight(node.inputs[1], turned=turned)
    return None if found is None or (found.scales is None and found.value.dtype not in MODEL_FLOATS) else found


def find_dynamic_linear(node: onnx_ir.Node) -> Linear | None:
    """Return the linear with dynamic activations whose last operator is this Mul by the weight's scales, else None.

    The form is ``Mul(Mul(Cast<fp32>(MatMulInteger(rows.codes, Transpose(codes))), rows.scales), scales)``, with the
    factors of both Mul in any order.
    """
    if node.op_type != "Mul" or node.domain:
        return None
    for position in (0, 1):
        scales, product = node.inputs[position], _producer(node.inputs[1 - position], "Mul")
        if scales is None or constant_tensor(scales) is None or product is None:
            continue
        found = _of_codes(node, scales, product)
        if found is not None:
            return found
    return None


def _of_codes(last: onnx_ir.Node, scales: onnx_ir.Value, product: onnx_ir.Node) -> Linear | None:
    for position in (0, 1):
        cast = _producer(product.inputs[position], "Cast")
        sums = _producer(cast.inputs[0], "MatMulInteger") if cast is not None and _casts_to_float(cast) else None
        if cast is None or sums is None or len(_present(sums)) != 2:
            continue
        rows, codes = find_rows(sums.inputs[0]), _weight(sums.inputs[1], turned=False)
        if rows is None or codes is None or rows.scales is not product.inputs[1 - position]:
            continue
        if codes.value.dtype != onnx_ir.DataType.INT8 or not _is_vector(scales, codes.channels):
            continue
        weight = LinearWeight(codes.value, scales, codes.transposed, codes.nodes)
        nodes = (*rows.nodes, *codes.nodes, sums, cast, product, last)
        return Linear(rows.input, last.outputs[0], weight, rows, None, nodes)
    return None


def find_rows(codes: onnx_ir.Value | None) -> QuantizedRows | None:
    """Return the row-by-row quantisation that produces these codes; None for anything else.

    The form is ``q = Div(ReduceMax(Abs(x), -1, keepdims), 127)``, ``scales = Where(Equal(q, 0), 1, q)``,
    ``codes = Cast<int8>(Clip(Round(Div(x, scales)), -127, 127))``.
    """
    chain = _chain(codes, ("Cast", "Clip", "Round", "Div"))
    if chain is None or _integer(chain[0], "to", 0) != onnx_ir.DataType.INT8 or not _clips_to_codes(chain[1]):
        return None
    data, scales = chain[3].inputs
    guard = _producer(scales, "Where")
    if codes is None or data is None or scales is None or guard is None:
        return None
    is_zero, one, quotient = guard.inputs
    compared = _producer(is_zero, "Equal")
    largest = _chain(quotient, ("Div", "ReduceMax", "Abs"))
    if compared is None or largest is None or not _is_number(one, 1) or not _is_number(largest[0].inputs[1], 127):
        return None
    others = [value for value in compared.inputs if value is not quotient]
    if len(others) != 1 or not _is_number(others[0], 0):
        return None
    if largest[2].inputs[0] is not data or not _reduces_last_axis(largest[1], data):
        return None
    return QuantizedRows(data, codes, scales, (*largest[::-1], compared, guard, *chain[::-1]))


def quantized_rows_of(data: onnx_ir.Value) -> QuantizedRows | None:
    """Return the row-by-row quantisation that the graph already computes from this value; None if there is none."""
    for divided in _results(data, "Div"):
        for rounded in _results(divided, "Round"):
            for clipped in _results(rounded, "Clip"):
                for codes in _results(clipped, "Cast"):
                    found = find_rows(codes)
                    if found is not None and found.input is data:
                        return found
    return None


def linears_of_rows(rows: QuantizedRows) -> list[Linear]:
    """Return the linears that multiply these rows."""
    sums = [use.node for use in rows.codes.uses() if use.node.op_type == "MatMulInteger" and use.idx == 0]
    return [linear for node in sums if (linear := linear_of_sums(node)) is not None]


def linear_of_sums(node: onnx_ir.Node) -> Linear | None:
    """Return the linear with dynamic activations whose integer product is this MatMulInteger; None if there is none."""
    if node.op_type != "MatMulInteger" or node.domain:
        return None
    for cast in node.outputs[0].consumers():
        for product in cast.outputs[0].consumers():
            for last in product.outputs[0].consumers():
                found = find_dynamic_linear(last)
                if found is not None and node in found.nodes:
                    return found
    return None


def reads_codes(node: onnx_ir.Node, index: int) -> bool:
    """Return whether input `index` is the codes of a weight, to be dequantised or multiplied as integers."""
    if node.op_type == "Transpose":
        return any(reads_codes(use.node, use.idx) for use in node.outputs[0].uses() if use.node.op_type != "Transpose")
    return (node.op_type, index) in {("DequantizeLinear", 0), ("MatMulInteger", 1)} and not node.domain


def reads_scales(node: onnx_ir.Node, index: int) -> bool:
    """Return whether input `index` is the scales of a weight's codes, to dequantise them or scale integer products."""
    if node.op_type == "DequantizeLinear":
        return index == 1
    linear = find_dynamic_linear(node)
    return linear is not None and linear.scales is node.inputs[index]


def _weight(operand: onnx_ir.Value | None, *, turned: bool) -> LinearWeight | None:
    """Return the constant weight behind a right operand, `[n, k]` if `turned`, else `[k, n]`; None if there is none."""
    nodes: list[onnx_ir.Node] = []
    transpose = _producer(operand, "Transpose")
    if transpose is not None:
        perm = transpose.attributes.get("perm")
        if perm is not None and [int(axis) for axis in perm.value] != [1, 0]:
            return None
        operand, turned = transpose.inputs[0], not turned
        nodes.append(transpose)
    scales: onnx_ir.Value | None = None
    dequantize = _producer(operand, "DequantizeLinear")
    if dequantize is not None:
        if len(_present(dequantize)) != 2 or _integer(dequantize, "block_size", 0):
            return None
        operand, scales = dequantize.inputs[:2]
        nodes.append(dequantize)
    if operand is None or constant_tensor(operand) is None or operand.shape is None or len(operand.shape) != 2:
        return None
    found = LinearWeight(operand, scales, turned, tuple(reversed(nodes)))
    if dequantize is None:
        return found if operand.dtype in MODEL_FLOATS or operand.dtype == onnx_ir.DataType.INT8 else None
    along = _integer(dequantize, "axis", 1) % 2
    fits = operand.dtype == onnx_ir.DataType.INT8 and along == (0 if turned else 1)
    return found if fits and scales is not None and _is_vector(scales, found.channels) else None


def _is_plain(gemm: onnx_ir.Node) -> bool:
    factors = [gemm.attributes[name].value for name in ("alpha", "beta") if name in gemm.attributes]
    return not _integer(gemm, "transA", 0) and all(factor == 1 for factor in factors)


def _integer(node: onnx_ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _present(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    return [value for value in node.inputs if value is not None]


def _producer(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _chain(value: onnx_ir.Value | None, op_types: tuple[str, ...]) -> list[onnx_ir.Node] | None:
    """Return the producers from `value` back along first inputs, if they are exactly these operators, else None."""
    nodes: list[onnx_ir.Node] = []
    for op_type in op_types:
        node = _producer(value, op_type)
        if node is None:
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes


def _results(value: onnx_ir.Value, op_type: str) -> list[onnx_ir.Value]:
    """Return the first outputs of the nodes of type `op_type` that read `value` as their first input."""
    uses = [use for use in value.uses() if use.idx == 0 and use.node.op_type == op_type and not use.node.domain]
    return [use.node.outputs[0] for use in uses]


def _casts_to_float(cast: onnx_ir.Node) -> bool:
    return _integer(cast, "to", 0) == onnx_ir.DataType.FLOAT


def _clips_to_codes(clip: onnx_ir.Node) -> bool:
    bounds = list(clip.inputs[1:3])
    return len(bounds) == 2 and _is_number(bounds[0], -LARGEST_CODE) and _is_number(bounds[1], LARGEST_CODE)


def _reduces_last_axis(node: onnx_ir.Node, data: onnx_ir.Value) -> bool:
    """Return whether the node reduces the last axis and keeps it; before opset 18, axes are an attribute."""
    if not _integer(node, "keepdims", 1):
        return False
    last = {-1} if data.shape is None else {-1, len(data.shape) - 1}
    attribute = node.attributes.get("axes")
    axes = small_constant(node.inputs[1]) if len(node.inputs) > 1 else None
    found = attribute.value if attribute is not None else axes.reshape(-1).tolist() if axes is not None else []
    return len(found) == 1 and int(found[0]) in last


def _is_number(value: onnx_ir.Value | None, number: float) -> bool:
    array = small_constant(value)
    return array is not None and array.size == 1 and bool(np.all(array == number))


def _is_vector(scales: onnx_ir.Value, length: int | None) -> bool:
    is_float = constant_tensor(scales) is not None and scales.dtype in MODEL_FLOATS
    return is_float and scales.shape is not None and list(scales.shape.dims) == [length]


def _expression(value: onnx_ir.Value) -> Expression:
    found = expression_of(value)
    if found is None:
        raise ModelError(f"{value.name!r} is computed, expected a constant weight")
    return found
