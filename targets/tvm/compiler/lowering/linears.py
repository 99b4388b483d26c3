"""Lower every linear layer to a native kernel over packed weights.

With dynamic int8 activations, the rows of the input are quantised first, once for all layers that share the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import onnx_ir

from passopt.ir.graph.linears import Linear, QuantizedRows, find_linear
from passopt.ir.weights.lazy_weight import constant_tensor, is_checkpoint_weight
from passopt.targets.tvm.compiler.kernels.linear.choose import float_kernel, int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.groups_fp32 import groups_kernel, refusal
from passopt.targets.tvm.compiler.kernels.linear.int8_int8 import int8_int8_kernel
from passopt.targets.tvm.compiler.kernels.linear.linear_kernel import LinearKernel
from passopt.targets.tvm.compiler.kernels.quantize_rows import codes_layout, quantize_computed, quantize_rows
from passopt.targets.tvm.compiler.lowering.grouped_linears import GroupedLinear, find_grouped_linear
from passopt.targets.tvm.compiler.lowering.readers import behind_casts, read_by_none_but
from passopt.targets.tvm.compiler.lowering.values import Length, Tvm, Unsupported, Values, product

#: The number of values up to which a computation is searched for weights. A longer one is not that of a weight.
_LONGEST_COMPUTATION = 24
#: The reasons why a MatMul is not a linear layer.
WEIGHT_IS_COMPUTED = "its weight is computed anew at every step; run fold-norm-head before"
BOTH_COMPUTED = "both sides are computed: attention that was not fused"


#: A linear in one of the forms that have kernels.
AnyLinear: TypeAlias = Linear | GroupedLinear


def find_any_linear(node: onnx_ir.Node) -> AnyLinear | None:
    """Return the linear whose last operator is `node`, in any form that has kernels; None if there is none."""
    return find_linear(node) or find_grouped_linear(node)


@dataclasses.dataclass(frozen=True)
class AddedLinear:
    """A sum `output` = `residual` + linear, where the linear has no bias and nothing else reads its result.

    Both operands have the same number of axes, but one may still be broadcast.
    """

    linear: AnyLinear
    residual: onnx_ir.Value
    output: onnx_ir.Value


def find_added_linear(node: onnx_ir.Node) -> AddedLinear | None:
    """Return the parts of a node that adds a linear and another tensor, or None for any other node.

    Such sums follow attention and feed-forward. The tensor must have as many axes as the result. Whether it has the
    same lengths is found only when the sum is lowered: in the graph, two unknown lengths cannot be told apart.
    """
    if node.op_type != "Add" or node.domain:
        return None
    for operand, residual in (node.inputs, reversed(node.inputs)):
        result = behind_casts(operand)
        producer = result.producer() if result is not None else None
        linear = find_any_linear(producer) if producer is not None else None
        if linear is None or residual is None or result is None or linear.bias is not None:
            continue
        if residual.shape is None or result.shape is None or constant_tensor(residual) is not None:
            continue
        if len(residual.shape) == len(result.shape):
            return AddedLinear(linear, residual, node.outputs[0])
    return None


def lower_linear(at: Values, linear: AnyLinear) -> None:
    """Lower a linear layer y = x · wᵀ + bias."""
    from tvm import relax

    result = _product(at, linear, None)
    if linear.bias is not None:
        result = at.emit(relax.op.add(result, at.tensor(linear.bias)))
    at.set(linear.output, result)


def lower_added_linear(at: Values, added: AddedLinear) -> None:
    """Lower y = residual + x · wᵀ, in one kernel if the residual has the shape of the product."""
    from tvm import relax

    linear, residual = added.linear, added.residual
    if at.same_lengths(at.shape(residual), _result_shape(at, linear)):
        at.set(added.output, _product(at, linear, residual))
        return
    at.set(added.output, relax.op.add(_product(at, linear, None), at.tensor(residual)))


def _product(at: Values, linear: AnyLinear, residual: onnx_ir.Value | None) -> Tvm:
    kernel = _grouped_kernel(at, linear) if isinstance(linear, GroupedLinear) else _kernel(at, linear)
    weights = [_weight(at, linear, suffix, position, kernel) for position, suffix in enumerate(_suffixes(kernel))]
    if isinstance(linear, GroupedLinear) or linear.rows is None:
        data = [_flat(at, linear.input)]
    else:
        data = _quantized(at, _row_codes(at, linear.input, linear.rows))
    before = [] if residual is None else [_flat(at, residual)]
    name = kernel.name if residual is None else f"{kernel.name}_residual"
    *dims, channels = _result_shape(at, linear)
    make = partial(kernel.function, residual=residual is not None)
    result = at.call(name, make, [*data, *weights, *before], [at.simplified(product(dims)), channels])
    at.note(f"linear: {name}")
    at.quantized.add(kernel.quantized)
    return at.view(result, [*dims, channels])


def _result_shape(at: Values, linear: AnyLinear) -> list[Length]:
    channels = linear.channels if isinstance(linear, GroupedLinear) else linear.weight.expression().shape[0]
    return [*at.shape(linear.input)[:-1], channels]


def _flat(at: Values, value: onnx_ir.Value) -> Tvm:
    """Return the value as a matrix [rows, width], whose rows run along its last axis."""
    found = at.tensor(value)
    dims = at.shape_of(found)
    return at.view(found, [at.simplified(product(dims[:-1])), dims[-1]])


def _kernel(at: Values, linear: Linear) -> LinearKernel:
    weight, scales, isa = linear.weight.expression(), linear.scales_expression(), at.machine.isa
    if scales is None:
        return float_kernel(weight, isa)
    return int8_kernel(weight, scales, isa) if linear.rows is None else int8_int8_kernel(weight, scales, isa)


def _grouped_kernel(at: Values, linear: GroupedLinear) -> LinearKernel:
    codes, scales = linear.expression(linear.codes), linear.expression(linear.scales)
    zeros = None if linear.zeros is None else linear.expression(linear.zeros)
    if reason := refusal(codes, scales, zeros, at.machine.isa):
        raise Unsupported(reason)
    return groups_kernel(codes, scales, zeros, at.machine.isa)


def _suffixes(kernel: LinearKernel) -> list[str]:
    return [suffix for suffix, _ in kernel.weights]


def _weight(at: Values, linear: AnyLinear, suffix: str, position: int, kernel: LinearKernel) -> Tvm:
    """Return weight number `position` of the kernel as a parameter named after the model's weight."""
    codes = linear.codes if isinstance(linear, GroupedLinear) else linear.weight.value
    named = {"scales": linear.scales, "zeros": linear.zeros if isinstance(linear, GroupedLinear) else None}
    own = named.get(suffix)
    expression = kernel.weights[position][1]
    return at.parameter(f"{codes.name}.{suffix}" if own is None else str(own.name), expression)


@dataclasses.dataclass(frozen=True)
class _RowCodes:
    """A kernel call that returns the codes and scales of `count` rows; equal keys mean equal rows."""

    key: object
    kernel: str
    make: Callable[[], Tvm]
    arguments: tuple[Tvm, ...]
    count: Length
    width: int


def _row_codes(at: Values, data: onnx_ir.Value, quantized: QuantizedRows) -> _RowCodes:
    """Return how to quantise the rows of `data`.

    If a kernel computes the rows and only linears that quantise them read them, that kernel quantises them at once.
    Otherwise they are read from memory.
    """
    isa, computed = at.machine.isa, at.rows_to_come(data)
    # A GPU takes the second way, since its threads have no memory of their own for a row.
    if computed is None or isa.is_gpu or not read_by_none_but(computed.value, quantized.nodes):
        rows = _flat(at, data)
        count, width = at.shape_of(rows)
        return _RowCodes(rows, f"quantize_rows_{width}", partial(quantize_rows, width, isa), (rows,), count, width)
    kernel = computed.kernel
    make = partial(quantize_computed, kernel, isa)
    return _RowCodes(data, f"{kernel.name}_quantized", make, computed.arguments, computed.count, kernel.width)


def _quantized(at: Values, rows: _RowCodes) -> list[Tvm]:
    """Return the codes and scales of the rows, computed once for all linears of one input."""
    from tvm import relax

    layout = codes_layout(rows.width, at.machine.isa)
    types = [
        relax.TensorType([rows.count, layout.width], layout.dtype),
        relax.TensorType([rows.count], "float32"),
    ]

    def call() -> Tvm:
        at.note(f"rows: {rows.kernel}")
        return at.call_typed(rows.kernel, rows.make, rows.arguments, types)

    found = at.once(("rows", rows.key), call)
    codes = at.once(("codes", rows.key), lambda: at.emit(found[0]))
    return [codes, at.once(("scales", rows.key), lambda: at.emit(found[1]))]


def lower_product(at: Values, node: onnx_ir.Node) -> None:
    """Lower a MatMul of two computed values, which must be an outer product; raise Unsupported for any other.

    An outer product is a broadcast multiplication.
    """
    from tvm import relax

    if is_computed_weight(node.inputs[1]):
        raise Unsupported(WEIGHT_IS_COMPUTED)
    first, second = (at.tensor(value) for value in node.inputs)
    inner = at.shape_of(first)[-1]
    if isinstance(inner, int) and inner == 1:
        at.set(node.outputs[0], relax.op.multiply(first, second))
        return
    raise Unsupported(BOTH_COMPUTED)


def is_computed_weight(value: onnx_ir.Value | None) -> bool:
    """Return whether a value is computed from checkpoint weights alone, such as a head that normalises its rows."""
    seen, waiting, weights = set(), [value], 0
    while waiting:
        item = waiting.pop()
        if item is None or item in seen:
            continue
        seen.add(item)
        if item.is_graph_input() or len(seen) > _LONGEST_COMPUTATION:
            return False
        producer = item.producer()
        weights += producer is None and is_checkpoint_weight(item)
        waiting += producer.inputs if producer is not None else ()
    return weights > 0
