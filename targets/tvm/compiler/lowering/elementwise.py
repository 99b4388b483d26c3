"""Lower elementwise operators, on tensors and on small integers that are known as arithmetic over lengths."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir

from passopt.ir.graph.attributes import attribute
from passopt.targets.tvm.compiler.lowering.readers import casts_floats
from passopt.targets.tvm.compiler.lowering.registry import lowers
from passopt.targets.tvm.compiler.lowering.values import Delegated, Length, Numbers, Values, dtype_name


def _relax_names() -> dict[str, str]:
    return {
        "Add": "add",
        "Sub": "subtract",
        "Mul": "multiply",
        "Div": "divide",
        "Pow": "power",
        "And": "logical_and",
        "Or": "logical_or",
        "Xor": "logical_xor",
        "Equal": "equal",
        "Less": "less",
        "LessOrEqual": "less_equal",
        "Greater": "greater",
        "GreaterOrEqual": "greater_equal",
        "Abs": "abs",
        "Ceil": "ceil",
        "Cos": "cos",
        "Erf": "erf",
        "Exp": "exp",
        "Floor": "floor",
        "IsInf": "isinf",
        "IsNaN": "isnan",
        "Log": "log",
        "Neg": "negative",
        "Not": "logical_not",
        "Round": "round",
        "Sigmoid": "sigmoid",
        "Sin": "sin",
        "Sqrt": "sqrt",
        "Tanh": "tanh",
    }


_RELAX = _relax_names()
_ON_LENGTHS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
}


@lowers(*_ON_LENGTHS, "Pow", "And", "Or", "Xor", *_COMPARISONS)
def binary(at: Values, node: onnx_ir.Node) -> None:
    """Lower arithmetic, logic and comparisons of two operands; lengths stay lengths where possible."""
    from tvm import relax

    if _binary_on_lengths(at, node):
        return
    first, second = (at.tensor(value) for value in node.inputs)
    if node.op_type == "Div" and str(first.ty.dtype).startswith("int"):
        raise Delegated("integers are divided as TVM's importer does it")
    if node.op_type == "Pow" and first.ty.dtype != second.ty.dtype:
        second = at.emit(relax.op.astype(second, str(first.ty.dtype)))
    at.set(node.outputs[0], getattr(relax.op, _RELAX[node.op_type])(first, second))


def _binary_on_lengths(at: Values, node: onnx_ir.Node) -> bool:
    first, second = (at.numbers(value) for value in node.inputs)
    if (
        first is None
        or second is None
        or (len(first.items) != len(second.items) and 1 not in {len(first.items), len(second.items)})
    ):
        return False
    pairs = _pairs(first, second)
    scalar = first.scalar and second.scalar
    if node.op_type in _ON_LENGTHS:
        compute = _ON_LENGTHS[node.op_type]
        at.set_numbers(node.outputs[0], [compute(*pair) for pair in pairs], scalar=scalar)
        return True
    if node.op_type not in _COMPARISONS:
        return False
    found = [_compared(node.op_type, *pair) for pair in pairs]
    if None in found:
        return False
    at.set_numbers(node.outputs[0], found, scalar=scalar)
    return True


def _pairs(first: Numbers, second: Numbers) -> list[tuple[Length, Length]]:
    count = max(len(first.items), len(second.items))
    return [(first.items[i % len(first.items)], second.items[i % len(second.items)]) for i in range(count)]


def _compared(op_type: str, first: Length, second: Length) -> bool | None:
    """Return the result of a comparison, or None if it depends on the lengths; no length is negative."""
    if isinstance(first, int) and isinstance(second, int):
        return _COMPARISONS[op_type](first, second)
    numbers = [item for item in (first, second) if isinstance(item, int)]
    return False if op_type == "Equal" and numbers and numbers[0] < 0 else None


@lowers(
    "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "IsInf", "IsNaN", "Log", "Neg", "Not", "Round", "Sigmoid", "Sin",
    "Sqrt", "Tanh",
)  # fmt: skip
def unary(at: Values, node: onnx_ir.Node) -> None:
    """Lower operators of one operand; a negated length stays a length."""
    from tvm import relax

    numbers = at.numbers(node.inputs[0])
    if node.op_type == "Neg" and numbers is not None:
        at.set_numbers(node.outputs[0], [-item for item in numbers.items], scalar=numbers.scalar)
        return
    at.set(node.outputs[0], getattr(relax.op, _RELAX[node.op_type])(at.tensor(node.inputs[0])))


@lowers("Max", "Min")
def extreme(at: Values, node: onnx_ir.Node) -> None:
    """Lower Max and Min; of two lengths the result is a length."""
    from tvm import relax, tirx

    numbers = [at.numbers(value) for value in node.inputs]
    known = [item for item in numbers if item is not None]
    if len(known) == len(numbers) == 2 and len(known[0].items) == len(known[1].items):
        choose = tirx.max if node.op_type == "Max" else tirx.min
        items = [choose(*pair) for pair in _pairs(*known)]
        at.set_numbers(node.outputs[0], items, scalar=all(item.scalar for item in known))
        return
    combine = relax.op.maximum if node.op_type == "Max" else relax.op.minimum
    found = at.tensor(node.inputs[0])
    for value in node.inputs[1:]:
        found = at.emit(combine(found, at.tensor(value)))
    at.set(node.outputs[0], found)


@lowers("Where")
def where(at: Values, node: onnx_ir.Node) -> None:
    """Lower Where; if condition and both choices are known as lengths, the result is too."""
    from tvm import relax

    numbers = [at.numbers(value) for value in node.inputs]
    known = [item for item in numbers if item is not None]
    if len(known) == 3 and len({len(item.items) for item in known}) == 1:
        items = [then if chosen else other for chosen, then, other in zip(*(item.items for item in known), strict=True)]
        at.set_numbers(node.outputs[0], items, scalar=known[1].scalar)
        return
    at.set(node.outputs[0], relax.op.where(*(at.tensor(value) for value in node.inputs)))


@lowers("Cast")
def cast(at: Values, node: onnx_ir.Node) -> None:
    """Lower Cast; between float dtypes it does nothing, since all floats are fp32 in a library."""
    from tvm import relax

    target = dtype_name(onnx_ir.DataType(node.attributes["to"].as_int()))
    numbers = at.numbers(node.inputs[0])
    if numbers is not None and target in {"int64", "int32"}:
        items = [int(item) if isinstance(item, bool) else item for item in numbers.items]
        at.set_numbers(node.outputs[0], items, scalar=numbers.scalar)
        return
    if casts_floats(node):
        at.pass_on(node.inputs[0], node.outputs[0])
        return
    found = at.tensor(node.inputs[0])
    if target == "bool" and str(found.ty.dtype) != "bool":
        zero = at.literal(np.zeros((), str(found.ty.dtype)))
        at.set(node.outputs[0], relax.op.not_equal(found, zero))
        return
    at.set(node.outputs[0], found if str(found.ty.dtype) == target else relax.op.astype(found, target))


@lowers("CastLike")
def cast_like(at: Values, node: onnx_ir.Node) -> None:
    """Lower CastLike, a cast to the dtype of the second operand."""
    from tvm import relax

    found, kind = at.tensor(node.inputs[0]), str(at.tensor(node.inputs[1]).ty.dtype)
    if kind == "bool" and str(found.ty.dtype) != "bool":
        at.set(node.outputs[0], relax.op.not_equal(found, at.literal(np.zeros((), str(found.ty.dtype)))))
        return
    at.set(node.outputs[0], found if str(found.ty.dtype) == kind else relax.op.astype(found, kind))


@lowers("Identity", "Dropout")
def same(at: Values, node: onnx_ir.Node) -> None:
    """Lower Identity, and Dropout, which does nothing in inference."""
    numbers = at.numbers(node.inputs[0])
    if numbers is not None:
        at.set_numbers(node.outputs[0], numbers.items, scalar=numbers.scalar)
        return
    at.set(node.outputs[0], at.tensor(node.inputs[0]))


@lowers("Reciprocal", "Relu", "Clip", "Gelu", "Swish")
def derived(at: Values, node: onnx_ir.Node) -> None:
    """Lower operators that Relax expresses by others: Reciprocal, Relu, Clip, Gelu and Swish."""
    from tvm import relax

    found = at.tensor(node.inputs[0])

    def number(value: float) -> Any:
        return at.literal(np.asarray(value, str(found.ty.dtype)))

    if node.op_type == "Reciprocal":
        at.set(node.outputs[0], relax.op.divide(number(1), found))
    elif node.op_type == "Relu":
        at.set(node.outputs[0], relax.op.nn.relu(found))
    elif node.op_type == "Clip":
        for value, combine in zip(node.inputs[1:], (relax.op.maximum, relax.op.minimum)):
            found = found if value is None else at.emit(combine(found, at.tensor(value)))
        at.set(node.outputs[0], found)
    elif node.op_type == "Gelu":
        tanh = attribute(node, "approximate", "none") == "tanh"
        at.set(node.outputs[0], relax.op.nn.gelu_tanh(found) if tanh else relax.op.nn.gelu(found))
    else:
        scaled = at.emit(relax.op.multiply(found, number(attribute(node, "alpha", 1.0))))
        at.set(node.outputs[0], relax.op.multiply(found, at.emit(relax.op.sigmoid(scaled))))
