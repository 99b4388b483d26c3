"""What linear a node computes, and of which weight: the one reading that passes, sharding and code generation share.

A linear is y = x · wᵀ (+ bias) with a constant weight: MatMul or Gemm, plain or of int8 codes per output channel, and
the integer form with activations quantised row by row, whose last Mul stands for the whole. Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import constant_tensor, expression_of, small_constant

#: Codes are within ±127, so that -x has the code of x negated.
LARGEST_CODE = 127
Activations: TypeAlias = Literal["float", "dynamic"]

_FLOATS = frozenset({onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16})


@dataclasses.dataclass(frozen=True)
class LinearWeight:
    """A constant matrix as a linear reads it. `transposed`: stored [n, k], else [k, n]; n output channels.

    `scales` [n] are None for a float weight; then `value` holds floats, else int8 codes without a zero point.
    """

    value: onnx_ir.Value
    scales: onnx_ir.Value | None
    transposed: bool
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def channels(self) -> int | None:
        """n; None if it is not a number."""
        return self._length(0 if self.transposed else 1)

    @property
    def contracted(self) -> int | None:
        """k; None if it is not a number."""
        return self._length(1 if self.transposed else 0)

    def _length(self, axis: int) -> int | None:
        length = self.value.shape[axis] if self.value.shape is not None else None
        return length if isinstance(length, int) else None

    def expression(self) -> Expression:
        """The floats or codes as [n, k], however they are stored."""
        found = _expression(self.value)
        return found if self.transposed else found.transpose()


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows of `input` [.., k] as int8 `codes` [.., k], fp32 `scales` [.., 1] each: x ≈ codes · scales."""

    input: onnx_ir.Value
    codes: onnx_ir.Value
    scales: onnx_ir.Value
    nodes: tuple[onnx_ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Linear:
    """`output` [.., n] = `input` [.., k] · weightᵀ + `bias`. `rows` are the input quantised, if it is dynamic.

    `nodes` are all that compute it, in order from the input to the output. Those of `rows` may serve several linears
    of one input, and those of the weight several linears of one weight.
    """

    input: onnx_ir.Value
    output: onnx_ir.Value
    weight: LinearWeight
    rows: QuantizedRows | None
    bias: onnx_ir.Value | None
    nodes: tuple[onnx_ir.Node, ...]

    @property
    def activations(self) -> Activations:
        return "float" if self.rows is None else "dynamic"

    @property
    def scales(self) -> onnx_ir.Value | None:
        return self.weight.scales

    def scales_expression(self) -> Expression | None:
        """[n], None for a float weight."""
        return None if self.weight.scales is None else _expression(self.weight.scales)


def find_linear(node: onnx_ir.Node) -> Linear | None:
    """The linear whose last operator is this MatMul, Gemm or, with dynamic activations, Mul; None if it is none."""
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
    """The weight on the right of a MatMul: [Transpose of] [DequantizeLinear of] a constant; or of a plain Gemm.

    None for computed operands, weights of other than two axes, a Gemm with factors or a transposed input, and codes
    with a zero point, blocks, or scales along the contraction.
    """
    if node.domain or node.op_type not in {"MatMul", "Gemm"} or (node.op_type == "Gemm" and not _is_plain(node)):
        return None
    turned = node.op_type == "Gemm" and bool(_integer(node, "transB", 0))
    found = _weight(node.inputs[1], turned=turned)
    return None if found is None or (found.scales is None and found.value.dtype not in _FLOATS) else found


def find_dynamic_linear(node: onnx_ir.Node) -> Linear | None:
    """The linear with dynamic activations whose last operator is this Mul (by the weight's scales); None if it is none.

    ``Mul(Mul(Cast<fp32>(MatMulInteger(rows.codes, Transpose(codes))), rows.scales), scales)``, factors in any order.
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
    """The quantisation by rows that gives these codes; None for anything else.

    ``q = Div(ReduceMax(Abs(x), -1, keepdims), 127)``, ``scales = Where(Equal(q, 0), 1, q)``,
    ``codes = Cast<int8>(Clip(Round(Div(x, scales)), -127, 127))``
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
    """The quantisation by rows that the graph already computes of this value; None if there is none."""
    for divided in _results(data, "Div"):
        for rounded in _results(divided, "Round"):
            for clipped in _results(rounded, "Clip"):
                for codes in _results(clipped, "Cast"):
                    found = find_rows(codes)
                    if found is not None and found.input is data:
                        return found
    return None


def linears_of_rows(rows: QuantizedRows) -> list[Linear]:
    """The linears that multiply these rows."""
    sums = [use.node for use in rows.codes.uses() if use.node.op_type == "MatMulInteger" and use.idx == 0]
    return [linear for node in sums if (linear := linear_of_sums(node)) is not None]


def linear_of_sums(node: onnx_ir.Node) -> Linear | None:
    """The linear with dynamic activations that this MatMulInteger is the integer product of; None if it is of none."""
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
    """True if input `index` is the codes of a weight, dequantised or multiplied as integers."""
    if node.op_type == "Transpose":
        return any(reads_codes(use.node, use.idx) for use in node.outputs[0].uses() if use.node.op_type != "Transpose")
    return (node.op_type, index) in {("DequantizeLinear", 0), ("MatMulInteger", 1)} and not node.domain


def reads_scales(node: onnx_ir.Node, index: int) -> bool:
    """True if input `index` is the scales of a weight's codes, dequantised or multiplied as integers."""
    if node.op_type == "DequantizeLinear":
        return index == 1
    linear = find_dynamic_linear(node)
    return linear is not None and linear.scales is node.inputs[index]


def _weight(operand: onnx_ir.Value | None, *, turned: bool) -> LinearWeight | None:
    """The constant behind a right operand, [k, n], or [n, k] if it is `turned`."""
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
        return found if operand.dtype in _FLOATS or operand.dtype == onnx_ir.DataType.INT8 else None
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
    """The producers from `value` back along first inputs, if they are these operators."""
    nodes: list[onnx_ir.Node] = []
    for op_type in op_types:
        node = _producer(value, op_type)
        if node is None:
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes


def _results(value: onnx_ir.Value, op_type: str) -> list[onnx_ir.Value]:
    """The first outputs of the nodes of this operator that read `value` first."""
    uses = [use for use in value.uses() if use.idx == 0 and use.node.op_type == op_type and not use.node.domain]
    return [use.node.outputs[0] for use in uses]


def _casts_to_float(cast: onnx_ir.Node) -> bool:
    return _integer(cast, "to", 0) == onnx_ir.DataType.FLOAT


def _clips_to_codes(clip: onnx_ir.Node) -> bool:
    bounds = list(clip.inputs[1:3])
    return len(bounds) == 2 and _is_number(bounds[0], -LARGEST_CODE) and _is_number(bounds[1], LARGEST_CODE)


def _reduces_last_axis(node: onnx_ir.Node, data: onnx_ir.Value) -> bool:
    """With the axis kept. Axes are an attribute before opset 18."""
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
    is_float = constant_tensor(scales) is not None and scales.dtype in _FLOATS
    return is_float and scales.shape is not None and list(scales.shape.dims) == [length]


def _expression(value: onnx_ir.Value) -> Expression:
    found = expression_of(value)
    if found is None:
        raise ModelError(f"{value.name!r} is computed, expected a constant weight")
    return found
