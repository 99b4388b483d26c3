"""Every linear to a native kernel over packed weights; with dynamic activations its rows are quantised first, once."""

from __future__ import annotations

import onnx_ir

from passopt.ir.linears import Linear
from passopt.ir.weights import is_checkpoint_weight
from passopt.targets.tvm.kernels.linear import LinearPlan, plan_float, plan_int8
from passopt.targets.tvm.kernels.linear_w8a8 import plan_w8a8
from passopt.targets.tvm.kernels.quantize_rows import codes_layout, quantize_rows
from passopt.targets.tvm.lowering.values import Length, Tvm, Unsupported, Values, product

#: Values behind a weight that is computed; what lies deeper is no weight.
_LONGEST_COMPUTATION = 24
#: Why a MatMul is no linear.
WEIGHT_IS_COMPUTED = "its weight is computed anew at every step; run fold-norm-head before"
BOTH_COMPUTED = "both sides are computed: attention that was not fused"


def lower_linear(at: Values, linear: Linear) -> None:
    """y = x · wᵀ + bias."""
    from tvm import relax

    plan = _plan(at, linear)
    found = at.tensor(linear.input)
    dims = at.shape_of(found)
    rows = at.simplified(product(dims[:-1]))
    weights = [_weight(at, linear, suffix, position, plan) for position, suffix in enumerate(_suffixes(plan))]
    flat = at.view(found, [rows, dims[-1]])
    data = [flat] if linear.rows is None else _quantized(at, flat, rows, dims[-1])
    channels = linear.weight.expression().shape[0]
    result = at.call(plan.name, lambda: plan.function, [*data, *weights], [rows, channels])
    at.note(f"linear: {plan.name}")
    result = at.view(result, [*dims[:-1], channels])
    if linear.bias is not None:
        result = at.emit(relax.op.add(result, at.tensor(linear.bias)))
    at.set(linear.output, result)


def _plan(at: Values, linear: Linear) -> LinearPlan:
    weight, scales, isa = linear.weight.expression(), linear.scales_expression(), at.cpu.isa
    if scales is None:
        return plan_float(weight, isa)
    return plan_int8(weight, scales, isa) if linear.rows is None else plan_w8a8(weight, scales, isa)


def _suffixes(plan: LinearPlan) -> list[str]:
    return [suffix for suffix, _ in plan.weights]


def _weight(at: Values, linear: Linear, suffix: str, position: int, plan: LinearPlan) -> Tvm:
    """A weight of the plan as a parameter, named after the model's."""
    name = linear.weight.value.name if suffix != "scales" or linear.scales is None else linear.scales.name
    expression = plan.weights[position][1]
    return at.parameter(f"{name}.{suffix}" if suffix != "scales" else str(name), expression)


def _quantized(at: Values, rows: Tvm, count: Length, width: int) -> list[Tvm]:
    """Codes and scales of the rows, computed once for all linears of one input."""
    from tvm import relax

    isa = at.cpu.isa
    layout = codes_layout(width, isa)

    def make() -> Tvm:
        types = [
            relax.TensorType([count, layout.width], layout.dtype),
            relax.TensorType([count], "float32"),
        ]
        return at.call_typed(f"quantize_rows_{width}", lambda: quantize_rows(width, isa), [rows], types)

    found = at.once(("rows", rows), make)
    return [at.once(("codes", rows), lambda: at.emit(found[0])), at.once(("scales", rows), lambda: at.emit(found[1]))]


def lower_product(at: Values, node: onnx_ir.Node) -> None:
    """A MatMul of two computed values. Only an outer product is lowered natively: it is a multiplication."""
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
    """Arithmetic over checkpoint weights alone, such as a head that normalises its rows."""
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
