"""Read attributes of nodes: one by its name, the bodies, or all as a key that finds nodes differing in inputs only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import onnx_ir

_Type = onnx_ir.AttributeType


def bodies(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """Yield the bodies of an operator such as If or Loop, not those of the nodes inside of them."""
    for attribute in node.attributes.data.values():  # this is read for every node of a model, so no copy is made
        kind = attribute.type
        if kind is _Type.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif kind is _Type.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def bodies_below(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Graph]:
    """Yield the bodies of all nodes of a graph, and those of the nodes inside of them."""
    for node in graph:
        for body in bodies(node):
            yield body
            yield from bodies_below(body)


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
