"""Make the fp32 twin of a graph in 16 bits: onnxruntime has no bf16 kernels on a CPU, and roundings hide errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir

from passopt.ir.weights.expressions import DataType
from passopt.ir.weights.lazy_weight import LazyWeight

#: Attributes of standard operators that hold a data type.
_DTYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "output_datatype"}


def fp32_twin(model: onnx_ir.Model, dtype: DataType = DataType.BFLOAT16) -> onnx_ir.Model:
    """Return a clone with every `dtype` (values, casts, constants, weights) replaced by FLOAT; weights stay lazy."""
    twin = model.clone()
    for graph in _all_graphs(twin):
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen_value(value, dtype)
        for node in graph:
            for output in node.outputs:
                _widen_value(output, dtype)
            for attribute in list(node.attributes.values()):
                _widen_attribute(node, attribute, dtype)
    return twin


def _all_graphs(model: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    """Yield the main graph, the bodies of functions, and the subgraphs of both."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def _widen_value(value: onnx_ir.Value, dtype: DataType) -> None:
    if value.dtype == dtype:
        value.type = onnx_ir.TensorType(DataType.FLOAT)  # A new object: a clone shares its types with the original.
    if value.const_value is not None and value.const_value.dtype == dtype:
        value.const_value = _wide(value.const_value)


def _widen_attribute(node: onnx_ir.Node, attribute: onnx_ir.Attr, dtype: DataType) -> None:
    if attribute.is_ref():
        return
    name = attribute.name
    if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.as_tensor().dtype == dtype:
        node.attributes[name] = onnx_ir.AttrTensor(name, _wide(attribute.as_tensor()))
    elif name in _DTYPE_ATTRIBUTES and attribute.value == dtype:
        node.attributes[name] = onnx_ir.AttrInt64(name, int(DataType.FLOAT))


def _wide(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    if isinstance(tensor, LazyWeight):
        return LazyWeight(tensor.expression.cast(DataType.FLOAT), tensor.name)
    return onnx_ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
