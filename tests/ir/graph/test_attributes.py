"""Keys of attributes: equal only if every byte is, and never for a subgraph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from passopt.ir.graph.attributes import attributes_key


def key(**attributes):
    return attributes_key(onnx_ir.node("Anything", [], attributes))


LONG = np.zeros(2000, np.float32)
CHANGED = np.where(np.arange(2000) == 1000, np.float32(1), LONG)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, CHANGED),
        (LONG, LONG.reshape(2, 1000)),
        (LONG, LONG.view(np.int32)),
        (np.array(["a"]), np.array(["b"])),
        ([LONG, LONG], [LONG, CHANGED]),
    ],
)
def test_tensors_are_equal_by_dtype_shape_and_every_byte(one, other):
    def made(item):
        return [onnx_ir.tensor(part) for part in item] if isinstance(item, list) else onnx_ir.tensor(item)

    assert key(value=made(one)) == key(value=made(one))
    assert key(value=made(one)) != key(value=made(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, 1.0), (0.0, -0.0), (0.1, 0.10000002), ("a", "b"), ([1, 2], [2, 1]), ([0.0], [-0.0]), (["a"], ["b"])],
)
def test_numbers_and_texts_are_equal_by_kind_and_value(one, other):
    assert key(value=one) == key(value=one)
    assert key(value=one) != key(value=other)


def test_the_order_of_attributes_does_not_matter():
    assert key(axis=1, keepdims=0) == key(keepdims=0, axis=1)
    assert key(axis=1) != key(keepdims=1)


def test_parameters_of_functions_are_equal_by_name():
    def reference(name):
        attribute = onnx_ir.RefAttr("axis", name, onnx_ir.AttributeType.INT)
        return attributes_key(onnx_ir.Node("", "Anything", [], [attribute]))

    assert reference("p") == reference("p")
    assert reference("p") != reference("q")


def test_a_subgraph_equals_nothing():
    graph = onnx_ir.from_proto(onnx.helper.make_graph([], "body", [], []))
    node = onnx_ir.node("If", [], {"then_branch": graph})
    assert attributes_key(node) != attributes_key(node)
    assert hash(attributes_key(node)) is not None
