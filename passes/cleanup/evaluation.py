"""Evaluate one operator of constants by ONNX's reference implementation, where that is known to mean the same.

The implementation knows the newest meaning of most operators only, rounds and overflows as numpy does, and lacks some
operators. So only the operators of `_SINCE` are evaluated, from the opset on at which each got its present meaning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.reference
import onnx_ir

from passopt.ir.graph.operators import operators
from passopt.ir.shapes.slices import is_disputed

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: For each operator that is evaluated, the first opset whose meaning of it is implemented.
_SINCE: Mapping[str, int] = {
    name: opset
    for opset, names in {
        1: operators("Identity Not Size Squeeze Transpose Unsqueeze"),
        5: operators("Concat Reshape"),
        6: operators("Abs Ceil Clip Exp Floor Log Neg Reciprocal Relu Sigmoid Sqrt Tanh Tile"),
        7: operators("Add And Cos Div Equal Greater Less Mul Or Pow Sin Sub Tan Xor"),
        8: operators("Expand Max Mean Min Sum"),
        9: operators("Cast ConstantOfShape Erf Flatten IsNaN MatMul NonZero Sign Where"),
        10: operators("IsInf Mod Slice"),
        11: operators(
            "ArgMax ArgMin BitShift CumSum Gather GatherElements OneHot Range ReduceL1 ReduceL2 ReduceLogSum",
            "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Round",
            "ScatterElements ScatterND",
        ),
        12: operators("GatherND GreaterOrEqual LessOrEqual"),
        13: operators("LogSoftmax Softmax"),
        14: operators("Trilu"),
        15: operators("CastLike"),
        18: operators("BitwiseAnd BitwiseNot BitwiseOr BitwiseXor"),
    }.items()
    for name in names
}
#: Operators that move values without computing with them, so that NaN stays what it is.
_MOVES = operators(
    "Concat Expand Flatten Gather GatherElements GatherND Identity Reshape ScatterND Slice Squeeze Tile Transpose",
    "Trilu Unsqueeze Where",
)
#: Operators that add up floats, and how many they add up at most: every kernel rounds a longer sum in its own way.
_SUMS = operators("CumSum MatMul ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceSum ReduceSumSquare")
_LONGEST_SUM = 128


class NotEvaluated(Exception):
    """Say why an operator of constants is not evaluated."""


def require_evaluable(node: onnx_ir.Node, opset: int) -> None:
    """Raise NotEvaluated unless the operator is among those that are evaluated at this opset."""
    first = _SINCE.get(node.op_type)
    if node.domain or first is None:
        raise NotEvaluated(f"{node.op_type} is never evaluated")
    if opset < first:
        raise NotEvaluated(f"{node.op_type} is evaluated from opset {first} on, this model has {opset}; run legalize")
    if len(node.outputs) != 1:
        raise NotEvaluated(f"it has {len(node.outputs)} outputs; only operators with one are evaluated")


def evaluate(node: onnx_ir.Node, opset: int, arrays: Mapping[str, Array]) -> Array:
    """Return what a node computes from its inputs, given by name.

    Raises:
        NotEvaluated: If the operator is not evaluated at this opset or with these numbers, or if that fails.
    """
    require_evaluable(node, opset)
    _require_plain(node, arrays)
    try:
        value = _run(node, opset, arrays)
    except Exception as error:  # the implementations have no errors of their own, and all that fails stays as it is
        reason = str(error).partition("\n")[0]
        raise NotEvaluated(f"the reference implementation fails with {type(error).__name__}: {reason}") from error
    if not isinstance(value, (np.ndarray, np.generic)):
        raise NotEvaluated(f"its result is a {type(value).__name__}, not a tensor")
    return np.asarray(value)


def _run(node: onnx_ir.Node, opset: int, arrays: Mapping[str, Array]) -> Any:
    proto = onnx_ir.to_proto(node)
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in arrays]
    outputs = [onnx.helper.make_tensor_value_info(proto.output[0], onnx.TensorProto.UNDEFINED, None)]
    graph = onnx.helper.make_graph([proto], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        (value,) = onnx.reference.ReferenceEvaluator(model).run(None, dict(arrays))
    return value


def _require_plain(node: onnx_ir.Node, arrays: Mapping[str, Array]) -> None:
    """Raise NotEvaluated for numbers with which runtimes do not all do the same."""
    values = list(arrays.values())
    if any(array.dtype.kind in "OSU" for array in values):
        raise NotEvaluated("it reads texts, which are never evaluated")
    if node.op_type not in _MOVES and any(_has_nan(array) for array in values):
        raise NotEvaluated("it computes with NaN, which runtimes treat in different ways")
    if node.op_type in _SUMS and _longest_sum(node, values[0]) > _LONGEST_SUM:
        raise NotEvaluated(f"it adds up more than {_LONGEST_SUM} floats, which every runtime rounds in its own way")
    integers = [array for array in values if array.dtype.kind in "iu"]
    if node.op_type in {"Div", "Mod"} and integers and not integers[-1].all():
        raise NotEvaluated("it divides an integer by 0")
    if node.op_type == "NonZero" and not values[0].ndim:
        raise NotEvaluated("it looks for places in a scalar, of which onnxruntime gives one axis and ONNX none")
    if is_disputed(node):
        raise NotEvaluated("it goes backwards to the greatest number, which ONNX takes for the end of the axis")
    if node.op_type == "Range" and any(_is_fraction(array) for array in values):
        raise NotEvaluated("it adds up fractions, which rounds in different ways")
    if node.op_type in {"Cast", "CastLike"}:
        _require_in_range(node, values[0])


def _longest_sum(node: onnx_ir.Node, array: Array) -> int:
    """Return an upper bound of how many floats an operator of `_SUMS` adds up, 0 for integers."""
    if array.dtype.kind in "biu" or not array.ndim:
        return 0
    return array.shape[-1] if node.op_type == "MatMul" else array.size


def _has_nan(array: Array) -> bool:
    return array.dtype.kind not in "biu" and bool(np.isnan(array.astype(np.float64)).any())


def _is_fraction(array: Array) -> bool:
    return array.dtype.kind == "f" and bool((array != np.floor(array)).any())


def _require_in_range(node: onnx_ir.Node, array: Array) -> None:
    """Raise NotEvaluated for a cast to texts, and for floats that the integers of a cast do not hold."""
    target = cast_target(node)
    if target is None or target == onnx_ir.DataType.STRING:
        raise NotEvaluated("it makes texts, which are never evaluated")
    if array.dtype.kind in "biu" or not target.is_integer():
        return
    bits = math.ceil(target.bitwidth) - (1 if target.is_signed() else 0)
    wide = array.astype(np.float64)
    if not ((wide > (-(2.0**bits) - 1 if target.is_signed() else -1.0)) & (wide < 2.0**bits)).all():
        raise NotEvaluated(f"it casts numbers to {target.name} that do not fit")


def cast_target(node: onnx_ir.Node) -> onnx_ir.DataType | None:
    """Return the dtype that a Cast or CastLike gives, or None if it is not known."""
    if node.op_type == "CastLike":
        like = node.inputs[1] if len(node.inputs) > 1 else None
        return like.dtype if like is not None else None
    attribute = node.attributes.get("to")
    return None if attribute is None or attribute.is_ref() else onnx_ir.DataType(attribute.as_int())
