"""Positions of nodes while others are inserted between them."""

from __future__ import annotations

import onnx_ir

from passopt.ir.graph.node_order import NodeOrder


def chain(count):
    x = onnx_ir.Value(name="x")
    nodes = [onnx_ir.node("Neg", [x], name=str(index)) for index in range(count)]
    return onnx_ir.Graph([x], [], nodes=nodes)


def fresh(*names):
    return [onnx_ir.node("Abs", [], name=name) for name in names]


def is_right(order, graph):
    return sorted(graph, key=order.position) == list(graph)


def test_nodes_before_after_and_at_the_end():
    graph = chain(4)
    order = NodeOrder(graph)
    assert is_right(order, graph)
    nodes = list(graph)
    for anchor, place in ((nodes[1], "before"), (nodes[1], "after"), (nodes[1], "before"), (nodes[3], "after")):
        made = fresh("a", "b", "c")
        {"before": graph.insert_before, "after": graph.insert_after}[place](anchor, made)
        order.insert(made, **{place: anchor})
        assert is_right(order, graph)
    made = fresh("end")
    graph.extend(made)
    order.insert(made)
    assert is_right(order, graph)


def test_an_exhausted_gap_is_counted_again():
    graph = chain(2)
    order, last = NodeOrder(graph), list(graph)[1]
    assert order.position(last) == 1
    for _ in range(200):
        made = fresh("a")
        graph.insert_before(last, made)
        order.insert(made, before=last)
    assert is_right(order, graph)


def test_a_node_that_nobody_announced_is_counted():
    graph = chain(3)
    order = NodeOrder(graph)
    assert is_right(order, graph)
    graph.insert_before(list(graph)[1], fresh("a"))
    assert is_right(order, graph)
