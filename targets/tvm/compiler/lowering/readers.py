"""Who reads a value in a library, where all floats are fp32 and a Cast between them is nothing to compute."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir

_FLOATS = frozenset({onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16})


def casts_floats(node: onnx_ir.Node) -> bool:
    """A Cast that changes nothing in a library."""
    if node.op_type != "Cast" or node.domain:
        return False
    source = node.inputs[0]
    return source is not None and source.dtype in _FLOATS and node.attributes["to"].as_int() in _FLOATS


def read_by_none_but(value: onnx_ir.Value, nodes: Collection[onnx_ir.Node]) -> bool:
    """True if the value, cast or not, goes to these nodes alone and is no output of the graph.

    Who asks for its shape does not read it.
    """
    return not value.is_graph_output() and all(_is_one_of(node, nodes) for node in value.consumers())


def _is_one_of(node: onnx_ir.Node, nodes: Collection[onnx_ir.Node]) -> bool:
    if casts_floats(node):
        return read_by_none_but(node.outputs[0], nodes)
    return node in nodes or (node.op_type == "Shape" and not node.domain)


def behind_casts(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The value before all casts, if each of them and the value itself has one reader; otherwise None."""
    while value is not None and not value.is_graph_output() and len(value.uses()) == 1:
        producer = value.producer()
        if producer is None or not casts_floats(producer):
            return value
        value = producer.inputs[0]
    return None
