"""Turn a region into a model that onnxruntime runs, with leaves and large weights as inputs.

So no weight is written to a file. If a weight is too large to run at all, its longest axis is shortened wherever that
length appears in the cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.graph.functions import DOMAIN, local_function
from passopt.ir.weights.evaluator import Evaluator
from passopt.ir.weights.expressions import Expression
from passopt.ir.weights.lazy_weight import SMALL_BYTES, constant_tensor, expression_of, small_constant
from passopt.verification.rewrites.regions import Cut, Region, Unchecked
from passopt.verification.sampling.traced_graph import wide_type

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The number of elements of the largest weight that is run at its true shape: half a GiB in fp32. The limit is lower
#: for cuts that read only weights, because their results are as large as the weights.
LARGEST_WEIGHT = 1 << 27
_LARGEST_RESULT = 1 << 25
#: The length to which an axis is shortened if its weight is too large to run.
_KEPT = 384


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model whose outputs are the region's roots in order, and the expressions that feed its weight inputs."""

    model: onnx_ir.Model
    weights: Mapping[str, Expression]


def shortened_axes(cut: Cut, largest: int) -> dict[int, int]:
    """Return the lengths of axes that have to be shortened, each with the length that is kept.

    These are axes of weights with more than `largest` elements.

    Raises:
        Unchecked: If a weight stays too large even with its axes shortened.
    """
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


def runnable(
    region: Region,
    kept: Mapping[int, int],
    types: Mapping[str, onnx_ir.DataType] | None = None,
    root_types: Sequence[onnx_ir.DataType | None] = (),
) -> Runnable:
    """Return the region as a model in which the lengths in `kept` are shortened wherever they appear.

    `types` are dtypes of leaves that the graph does not state, by name, and `root_types` those of the roots in order.
    """
    made: dict[onnx_ir.Value, onnx_ir.Value] = {}
    inputs, initializers, weights = [], [], {}
    for leaf in region.leaves:
        dtype = leaf.dtype if leaf.dtype is not None else (types or {}).get(leaf.name or "")
        made[leaf] = _value(leaf.name, dtype, None)
        inputs.append(made[leaf])
    for value in region.weights:
        expression = _shortened(value, kept)
        copy = made[value] = _value(value.name, expression.dtype, expression.shape)
        if expression.dtype == onnx_ir.DataType.STRING:  # of no fixed size, and never shortened
            copy.const_value = value.const_value if value.const_value is not None else constant_tensor(value)
            initializers.append(copy)
        elif expression.nbytes > SMALL_BYTES or next(expression.sources(), None) is not None:
            weights[value.name or ""] = expression
            inputs.append(copy)
        else:
            copy.const_value = _constant(value, kept)
            initializers.append(copy)
    nodes = [_node(node, made, kept) for node in region.nodes]
    outputs = []
    for index, root in enumerate(region.roots):
        dtype = root.dtype if root.dtype is not None or index >= len(root_types) else root_types[index]
        output = _value(f"root.{index}", dtype, None)
        if not isinstance(root.type, onnx_ir.TensorType):
            output.type = root.type
        wide = wide_type(dtype)
        if wide is None:
            nodes.append(onnx_ir.Node("", "Identity", [made[root]], outputs=[output]))
        else:
            output.type = onnx_ir.TensorType(wide)
            to = [onnx_ir.AttrInt64("to", int(wide))]
            nodes.append(onnx_ir.Node("", "Cast", [made[root]], to, outputs=[output]))
        outputs.append(output)
    functions = _functions(region)
    opsets = {"": 1, **region.side.opsets}
    for node in (*region.nodes, *(node for function in functions for node in function.all_nodes())):
        opsets.setdefault(node.domain, 1)
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="cut")
    model = onnx_ir.Model(graph, ir_version=10, functions=functions)
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
    """Return a small constant, in which an integer that equals a shortened length becomes the new length."""
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
    array = small_constant(node.outputs[0]) if node.op_type == "Constant" and not node.domain else None
    if array is not None and array.dtype == np.int64:
        attributes = [onnx_ir.AttrTensor("value", onnx_ir.tensor(_replaced(array, kept)))]
    inputs = [None if value is None else made[value] for value in node.inputs]
    return onnx_ir.Node(
        node.domain, node.op_type, inputs, attributes, overload=node.overload, outputs=outputs, name=node.name
    )


def _functions(region: Region) -> list[onnx_ir.Function]:
    """Return the functions of the model and those of passopt that the nodes call.

    passopt's own functions enter a model only with the first node that calls them, so the model may not have them yet.
    """
    found = dict(region.side.functions)
    for node in region.nodes:
        if node.domain == DOMAIN and node.op_identifier() not in found:
            function = local_function(node.op_type, region.side.opsets.get("", 0))
            if function is not None:
                found[function.identifier()] = function
    return [function.clone() for function in found.values()]
