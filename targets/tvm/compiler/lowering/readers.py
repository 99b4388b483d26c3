"""Find the readers of a value in a library, where all floats are fp32 and a Cast between floats computes nothing."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS


def casts_floats(node: onnx_ir.Node) -> bool:
    """Return whether a node is a Cast between float dtypes, which changes nothing in a library."""
    if node.op_type != "Cast" or node.domain:
        return False
    source = node.inputs[0]
    return source is not None and source.dtype in MODEL_FLOATS and node.attributes["to"].as_int() in MODEL_FLOATS


def read_by_none_but(value: onnx_ir.Value, nodes: Collection[onnx_ir.Node]) -> bool:
    """Return whether only `nodes` read the value, directly or through casts, and it is not an output of the graph.

    A Shape node does not count as a reader.
    """
    return not value.is_graph_output() and all(_is_one_of(node, nodes) for node in value.consumers())


def _is_one_of(node: onnx_ir.Node, nodes: Collection[onnx_ir.Node]) -> bool:
    if casts_floats(node):
        return read_by_none_but(node.outputs[0], nodes)
    return node in nodes or (node.op_type == "Shape" and not node.domain)


def behind_casts(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Return the value before all casts, if it and each of the casts have exactly one reader; otherwise None."""
    while value is not None and not value.is_graph_output() and len(value.uses()) == 1:
        producer = value.producer()
        if producer is None or not casts_floats(producer):
            return value
        value = producer.inputs[0]
    return None
