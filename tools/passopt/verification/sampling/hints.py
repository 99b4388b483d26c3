"""Read off a graph where results may change: the numbers that it compares with, and integers that it computes with.

A Clip, a Slice or a comparison does nothing to numbers and lengths on one side of its constants, so samples lie on
both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.operators import operators
from passopt.verification.sampling.lengths import free_inputs

_COMPARE = operators("Min Max Clip Less LessOrEqual Greater GreaterOrEqual Equal Mod Slice Range")
#: Operators that ask for infinity or NaN, those whose results overflow for numbers of some hundreds, and those between
#: them and an input.
_ASK = operators("IsInf IsNaN")
_STEEP = operators("Exp Gelu LogSoftmax Mish Pow ReduceLogSumExp Sigmoid Softmax Softplus Swish Tanh Cosh Sinh Erf")
_EACH = operators("Abs Add Cast Clip Div Identity Mul Neg Sub")
_CHAIN = 4
#: The most elements of a constant that are read, and the most numbers that are tried.
_ELEMENTS, _NUMBERS = 8, 4
#: Larger floats mean "masked", and axes longer than this are not cheap.
_LARGEST_FLOAT, _LONGEST = 1e9, 1025
#: Operators that only compute with integers, in all inputs and in the first one; others may take them for lengths.
_COMPUTE = operators(
    """Abs Add And BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Concat Div Equal Exp Floor Gather
    Greater GreaterOrEqual Identity Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg Not Or Pow Relu Round Sigmoid
    Sign Sqrt Sub Sum Tanh Where Xor"""
)
_COMPUTE_FIRST = operators(
    """ArgMax ArgMin Expand Flatten If ReduceMax ReduceMean ReduceMin ReduceSum Reshape Shape Size Slice Softmax Squeeze
    Tile Transpose Unsqueeze"""
)


@dataclasses.dataclass(frozen=True)
class Hints:
    """The numbers that a graph compares with: floats, integers, and those of the integers that may be lengths."""

    floats: tuple[float, ...]
    integers: tuple[int, ...]
    lengths: tuple[int, ...]
    #: Whether it asks inputs for infinity or NaN, whether it takes powers of them, which overflow early, and whether it
    #: repeats something as often as some input says.
    infinite: bool = False
    steep: bool = False
    repeats: bool = False


def hints_of(model: onnx_ir.Model) -> Hints:
    """Return the numbers that operators of the graph, its bodies and functions compare with."""
    floats: dict[float, None] = {}
    integers: dict[int, None] = {}
    for node in _nodes(model):
        if _casts_to_bool(node):
            floats[0.0] = integers[0] = None
        if node.op_type not in _COMPARE or node.domain:
            continue
        for array in _constants(node):
            numbers = array.reshape(-1).tolist()
            if array.dtype.kind == "f":
                floats.update(dict.fromkeys(item for item in numbers if abs(item) <= _LARGEST_FLOAT))
            elif array.dtype.kind in "iu":
                integers.update(dict.fromkeys(item for item in numbers if abs(item) <= _LARGEST_FLOAT))
    lengths = sorted({abs(item) for item in integers if 8 <= abs(item) < _LONGEST})
    infinite = any(node.op_type in _ASK and _is_near_input(node) for node in model.graph)
    steep = any(node.op_type in _STEEP and _is_near_input(node) for node in model.graph)
    repeats = any(node.op_type == "Loop" and not node.domain for node in _nodes(model))
    limits = tuple(lengths[:_NUMBERS])
    return Hints(tuple(floats)[:_NUMBERS], tuple(integers)[:_NUMBERS], limits, infinite, steep, repeats)


def _is_near_input(node: onnx_ir.Node) -> bool:
    """Return whether the node reads an input of the graph, or what operators make of each of its numbers."""
    value = None if node.domain else node.inputs[0]
    for _ in range(_CHAIN):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type not in _EACH:
            break
        value = next((item for item in maker.inputs if item is not None and not item.is_initializer()), None)
    return value is not None and value.is_graph_input()


def _casts_to_bool(node: onnx_ir.Node) -> bool:
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and not to.is_ref() and to.as_int() == onnx_ir.DataType.BOOL


def _nodes(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _constants(node: onnx_ir.Node) -> Iterator[np.ndarray]:
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if value is not None and tensor is None and (maker := value.producer()) is not None:
            yield from _attribute(maker)
        elif tensor is not None and tensor.size <= _ELEMENTS and tensor.dtype != onnx_ir.DataType.STRING:
            yield np.asarray(tensor.numpy())


def _attribute(maker: onnx_ir.Node) -> Iterator[np.ndarray]:
    if maker.op_type != "Constant" or maker.domain:
        return
    for attribute in maker.attributes.values():
        if attribute.is_ref() or attribute.type == onnx_ir.AttributeType.STRING:
            continue
        if attribute.type == onnx_ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.size <= _ELEMENTS and tensor.dtype != onnx_ir.DataType.STRING:
                yield np.asarray(tensor.numpy())
        elif attribute.type in {
            onnx_ir.AttributeType.INT,
            onnx_ir.AttributeType.INTS,
            onnx_ir.AttributeType.FLOAT,
            onnx_ir.AttributeType.FLOATS,
        }:
            yield np.asarray(attribute.value)[..., None][:_ELEMENTS]


def computed_integers(model: onnx_ir.Model) -> frozenset[str]:
    """Return the integer inputs of the graph that it only computes with, and that are no lengths, axes or counts."""
    return frozenset(
        value.name or ""
        for value in free_inputs(model)
        if value.dtype is not None and value.dtype.is_integer() and _is_only_computed(value)
    )


def _is_only_computed(value: onnx_ir.Value) -> bool:
    work, seen = [value], {value}
    while work:
        current = work.pop()
        for use in current.uses():
            node, index = use.node, use.idx
            if node.domain or not (node.op_type in _COMPUTE or (node.op_type in _COMPUTE_FIRST and index == 0)):
                return False
            if node.op_type in {"Shape", "Size", "If"}:
                continue
            following: Iterable[onnx_ir.Value] = [item for item in node.outputs if item not in seen]
            work += following
            seen.update(following)
    return bool(value.uses()) and value.dtype not in FLOATS
