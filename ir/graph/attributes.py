"""Read attributes of nodes: one by its name, or all of them as a key for finding nodes that differ only in inputs."""

from __future__ import annotations

import hashlib
from typing import Any

import onnx_ir

_Type = onnx_ir.AttributeType


def attributes_key(node: onnx_ir.Node) -> tuple[object, ...]:
    """Return a hashable key of all attributes of a node, equal for nodes with equal attributes.

    Tensors are compared by all of their bytes. A subgraph equals nothing, not even itself.
    """
    return tuple(sorted(((name, _content(item)) for name, item in node.attributes.items()), key=lambda pair: pair[0]))


def _content(attribute: onnx_ir.Attr) -> object:
    if attribute.is_ref():
        return attribute.type, attribute.ref_attr_name
    if attribute.type == _Type.TENSOR:
        return _tensor(attribute.value)
    if attribute.type == _Type.TENSORS:
        return tuple(_tensor(tensor) for tensor in attribute.value)
    if attribute.type == _Type.FLOAT:
        return attribute.type, repr(attribute.as_float())  # 0.0 == -0.0, but 1/0.0 and 1/-0.0 differ
    if attribute.type == _Type.FLOATS:
        return attribute.type, repr(list(attribute.as_floats()))
    if attribute.type in {_Type.INT, _Type.STRING}:
        return attribute.type, attribute.value
    if attribute.type in {_Type.INTS, _Type.STRINGS}:
        return attribute.type, tuple(attribute.value)
    return object()


def _tensor(tensor: onnx_ir.TensorProtocol) -> tuple[object, ...]:
    """Return dtype, shape and a digest of the bytes; the text of a long array would leave out its middle."""
    if tensor.dtype == onnx_ir.DataType.STRING:
        content: object = tuple(tensor.numpy().reshape(-1).tolist())
    else:
        content = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
    return tensor.dtype, tuple(tensor.shape.numpy()), content


def attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    """Return the value of the attribute `name`, or `default` if the node does not have it."""
    found = node.attributes.get(name)
    return default if found is None else found.value
