"""Let a graph tell which of its bodies run: the branches of If, and the bodies of Loop, Scan and SequenceMap.

Every body gives one more output, a number that is 1, and hands on those of the bodies inside of it. Outside, the
numbers of all rounds are added, so that a body that never ran gives 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import InlinePass

from passopt.ir.graph.attributes import bodies
from passopt.ir.weights.expressions import DataType

#: The outputs of the main graph that say how often a body ran begin with this.
PREFIX = "passopt.ran."
_KINDS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
#: Attributes of Scan that have a number for each of its outputs that are not states.
_PER_OUTPUT = ("scan_output_axes", "scan_output_directions")


def has_bodies(model: onnx_ir.Model) -> bool:
    """Return whether an operator of the graph, or of a function, has a body."""
    inside = [node for function in model.functions.values() for node in function.all_nodes()]
    return any(next(bodies(node), None) is not None for node in (*model.graph.all_nodes(), *inside))


class BodyRuns:
    """The bodies of a graph by name and place, and which of them ran so far."""

    def __init__(self, model: onnx_ir.Model) -> None:
        """Add an output for each body to a graph, which is changed; functions that have bodies are inlined."""
        self._places: dict[str, str] = {}
        self._ran: set[str] = set()
        if not has_bodies(model):
            return
        inside = [node for function in model.functions.values() for node in function.all_nodes()]
        if any(next(bodies(node), None) is not None for node in inside):
            InlinePass()(model)
        for name, value in self._marked(model.graph, "").items():
            value.name = name
            model.graph.outputs.append(value)

    def take(self, outputs: dict[str, Any]) -> None:
        """Take the numbers of the bodies out of the outputs of a run."""
        for name in [name for name in outputs if name.startswith(PREFIX)]:
            if int(outputs.pop(name)):
                self._ran.add(name)

    def unrun(self) -> tuple[str, ...]:
        """Return in words the places of the bodies that ran in no run, such as `else_branch of If n (y)`."""
        return tuple(place for name, place in self._places.items() if name not in self._ran)

    def _marked(self, graph: onnx_ir.Graph, where: str) -> dict[str, onnx_ir.Value]:
        """Return a number for each body in a graph and in its bodies, by name: how often it ran."""
        found: dict[str, onnx_ir.Value] = {}
        for node in list(graph):
            if node.op_type in _KINDS and not node.domain:
                found.update(self._node(graph, node, where))
        return found

    def _node(self, graph: onnx_ir.Graph, node: onnx_ir.Node, where: str) -> dict[str, onnx_ir.Value]:
        inside: list[tuple[onnx_ir.Graph, dict[str, onnx_ir.Value]]] = []
        for attribute in node.attributes.values():
            if attribute.type != onnx_ir.AttributeType.GRAPH or attribute.is_ref():
                continue
            place = f"{attribute.name} of {node.op_type} {_label(node)}{where}"
            name = f"{PREFIX}{len(self._places)}"
            self._places[name] = place
            body = attribute.as_graph()
            marks = {name: _number(body, name, 1)}
            if node.op_type != "SequenceMap":  # its outputs are sequences, which are not added
                marks |= self._marked(body, f", in {place}")
            inside.append((body, marks))
        names = [name for _, marks in inside for name in marks]
        for body, marks in inside:
            for name in names:
                value = marks.get(name) or _number(body, name, 0)
                if value in body.outputs:
                    value = _after(body, "Identity", value)
                body.outputs.append(value)
        return dict(zip(names, _added(graph, node, names), strict=True))


def _label(node: onnx_ir.Node) -> str:
    made = node.outputs[0].name or ""
    return made if not node.name or node.name == made else f"{node.name} ({made})"


def _added(graph: onnx_ir.Graph, node: onnx_ir.Node, names: Iterable[str]) -> Iterator[onnx_ir.Value]:
    """Add outputs to an operator, and yield for each the number that it stands for, of all rounds together."""
    wanted = list(names)
    count = len(node.outputs)
    node.resize_outputs(count + len(wanted))
    for key in _PER_OUTPUT:
        attribute = node.attributes.get(key)
        if attribute is not None and not attribute.is_ref():
            node.attributes[key] = onnx_ir.AttrInt64s(key, [*attribute.as_ints(), *[0] * len(wanted)])
    reduce = {"Loop": "ReduceSum", "Scan": "ReduceSum", "SequenceMap": "SequenceLength"}.get(node.op_type, "")
    for value, name in zip(node.outputs[count:], wanted, strict=True):
        value.name = f"{name}.of.{id(graph)}"
        if not reduce:
            yield value
            continue
        attributes: Mapping[str, Any] = {"keepdims": 0} if reduce == "ReduceSum" else {}
        made = onnx_ir.node(reduce, [value], attributes)
        made.outputs[0].name = f"{name}.all.{id(graph)}"
        graph.insert_after(node, made)
        yield made.outputs[0]


def _number(graph: onnx_ir.Graph, name: str, number: int) -> onnx_ir.Value:
    made = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array(number, np.int64))})
    value = made.outputs[0]
    value.name = f"{name}.{number}.{id(graph)}"
    value.type, value.shape = onnx_ir.TensorType(DataType.INT64), onnx_ir.Shape([])
    graph.append(made)
    return value


def _after(graph: onnx_ir.Graph, op_type: str, value: onnx_ir.Value) -> onnx_ir.Value:
    made = onnx_ir.node(op_type, [value])
    made.outputs[0].name = f"{value.name}.again"
    graph.append(made)
    return made.outputs[0]
