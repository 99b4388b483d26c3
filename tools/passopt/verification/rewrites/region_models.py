"""A region as a model that onnxruntime runs: leaves and large weights are its inputs, so no weight goes to a file.

Where a weight is too large to be run at all, the longest of its axes is shortened everywhere in the cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.graph.functions import DOMAIN, local_function
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import SMALL_BYTES, expression_of, small_constant
from passopt.verification.rewrites.regions import Cut, Region, Unchecked

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Elements of the largest weight that is run at its true shape: half a GiB in fp32. Where only weights are computed
#: with, the results are as large as they are, so it is less.
LARGEST_WEIGHT = 1 << 27
_LARGEST_RESULT = 1 << 25
#: Of an axis that is longer than can be run, as many are kept.
_KEPT = 384


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model whose outputs are the region's roots, in order, and the expressions that feed its weight inputs."""

    model: onnx_ir.Model
    weights: Mapping[str, Expression]


def shortened_axes(cut: Cut, largest: int) -> dict[int, int]:
    """Lengths that stand for an axis of a weight of more than `largest` elements, and what is kept of them."""
    kept: dict[int, int] = {}
    if not cut.before.leaves and not cut.after.leaves:
        largest = min(largest, _LARGEST_RESULT)
    for weight in (*cut.before.weights, *cut.after.weights):
        expression = expression_of(weight)
        assert expression is not None
        while math.prod(kept.get(length, length) for length in expression.shape) > largest:
            longest = max((length for length in expression.shape if length not in kept), default=0)
            if longest <= _KEPT:
                raise Unchecked(f"{weight.name} of shape {list(expression.shape)} is too large to be run")
            kept[longest] = _KEPT
    return kept


def runnable(region: Region, kept: Mapping[int, int]) -> Runnable:
    """The region as a model, with the lengths in `kept` shortened wherever they stand."""
    made: dict[onnx_ir.Value, onnx_ir.Value] = {}
    inputs, initializers, weights = [], [], {}
    for leaf in region.leaves:
        made[leaf] = _value(leaf.name, leaf.dtype, None if leaf.shape is None else [None] * len(leaf.shape))
        inputs.append(made[leaf])
    for value in region.weights:
        expression = _shortened(value, kept)
        copy = made[value] = _value(value.name, expression.dtype, expression.shape)
        if expression.nbytes > SMALL_BYTES or next(expression.sources(), None) is not None:
            weights[value.name or ""] = expression
            inputs.append(copy)
        else:
            copy.const_value = _constant(value, kept)
            initializers.append(copy)
    nodes = [_node(node, made, kept) for node in region.nodes]
    outputs = []
    for index, root in enumerate(region.roots):
        output = _value(f"root.{index}", root.dtype, None)
        nodes.append(onnx_ir.Node("", "Identity", [made[root]], outputs=[output]))
        outputs.append(output)
    opsets = {"": 1, **region.side.opsets}
    opsets.update({node.domain: 1 for node in region.nodes if node.domain not in opsets})
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="cut")
    model = onnx_ir.Model(graph, ir_version=10, functions=_functions(region))
    return Runnable(model, weights)


def _value(name: str | None, dtype: onnx_ir.DataType | None, shape: Iterable[int | None] | None) -> onnx_ir.Value:
    kind = None if dtype is None else onnx_ir.TensorType(dtype)
    return onnx_ir.Value(name=name, type=kind, shape=None if shape is None else onnx_ir.Shape(list(shape)))


def _shortened(value: onnx_ir.Value, kept: Mapping[int, int]) -> Expression:
    expression = expression_of(value)
    assert expression is not None
    for axis, length in enumerate(expression.shape):
        if length in kept:
            expression = expression.slice(axis, 0, kept[length])
    return expression


def _constant(value: onnx_ir.Value, kept: Mapping[int, int]) -> onnx_ir.TensorProtocol:
    """A small constant; an integer that is a shortened length says the new one."""
    with Evaluator() as evaluator:
        array = evaluator.array(_shortened(value, kept))
    return onnx_ir.tensor(_replaced(array, kept), name=value.name)


def _replaced(array: Array, kept: Mapping[int, int]) -> Array:
    if array.dtype != np.int64:
        return array
    return np.array([kept.get(int(item), int(item)) for item in array.reshape(-1)], np.int64).reshape(array.shape)


def _node(node: onnx_ir.Node, made: dict[onnx_ir.Value, onnx_ir.Value], kept: Mapping[int, int]) -> onnx_ir.Node:
    outputs = [onnx_ir.Value(name=value.name or "") for value in node.outputs]
    made.update(zip(node.outputs, outputs, strict=True))
    attributes: Iterable[onnx_ir.Attr] = node.attributes.values()
    if node.op_type == "Constant" and not node.domain and (array := small_constant(node.outputs[0])) is not None:
        attributes = [onnx_ir.AttrTensor("value", onnx_ir.tensor(_replaced(array, kept)))]
    inputs = [None if value is None else made[value] for value in node.inputs]
    return onnx_ir.Node(
        node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs, name=node.name
    )


def _functions(region: Region) -> list[onnx_ir.Function]:
    """Those of the model, and passopt's own, which enter a model only with the first node that calls them."""
    found = dict(region.side.functions)
    for node in region.nodes:
        if node.domain == DOMAIN and node.op_identifier() not in found:
            function = local_function(node.op_type, region.side.opsets.get("", 0))
            if function is not None:
                found[function.identifier()] = function
    return [function.clone() for function in found.values()]
