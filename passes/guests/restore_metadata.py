"""Put back what a guest loses: metadata of nodes, values and graph, doc strings, types; and record who made what.

Nodes are recognised by operator and output name. A new node's origins are the old nodes whose place it took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.graph.completion import complete_outputs, complete_types
from passopt.ir.graph.provenance import set_provenance
from passopt.ir.serialization.text import print_model
from passopt.ir.shapes.dimensions import merged_shapes
from passopt.passes.framework.records import PassResult


@dataclasses.dataclass(frozen=True)
class _OldNode:
    """A node as it was: `ghost` carries its name and metadata, since the node itself may be changed in place."""

    ghost: onnx_ir.Node
    inputs: tuple[str, ...]
    attributes: tuple[object, ...]

    @property
    def operator(self) -> tuple[str, str]:
        return self.ghost.domain, self.ghost.op_type


@dataclasses.dataclass(frozen=True)
class _OldValue:
    type: onnx_ir.TypeProtocol | None
    shape: onnx_ir.Shape | None
    doc_string: str | None
    metadata: dict[str, str]


class Snapshot:
    """A model before its guest runs; `finish` completes what came back and counts what changed."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self.text = print_model(model, fold=False)
        self._nodes: dict[str, _OldNode] = {}
        for node in model.graph.all_nodes():
            old = _OldNode(_ghost(node), tuple(_names(node.inputs)), attributes_key(node))
            self._nodes.update(dict.fromkeys(filter(None, _names(node.outputs)), old))
        self._values = {name: _old_value(value) for name, value in _values(model) if name}
        self._initializers = dict(model.graph.initializers)
        self._unused = {name for name, value in self._initializers.items() if not _is_read(value)}
        self._graph_metadata = dict(model.graph.metadata_props)
        self._graph_doc = model.graph.doc_string
        self._functions = {key: _function_key(function) for key, function in model.functions.items()}
        self._old_functions = dict(model.functions)

    def finish(self, changed: onnx_ir.Model, author: str, *, ignores_order: bool = False) -> PassResult:
        """Put back what the guest dropped from `changed`, and return the result of the pass.

        `modified` is true if the text of the model changed. `matches` counts the nodes that the guest made, changed or
        removed. With `ignores_order`, a model whose lines only stand in another order counts as unchanged: a guest that
        sorts the graph in its own way would change it for ever. Then `changed` must be another model than the old one.
        """
        complete_types(changed)
        complete_outputs(changed)
        self._restore_values(changed)
        text = print_model(changed, fold=False)
        if text == self.text or (ignores_order and sorted(text.split("\n")) == sorted(self.text.split("\n"))):
            return PassResult()
        self._restore_functions(changed)
        changed.graph.metadata_props.update(
            {key: text for key, text in self._graph_metadata.items() if key not in changed.graph.metadata_props}
        )
        changed.graph.doc_string = changed.graph.doc_string or self._graph_doc
        touched = self._restore_nodes(changed, author)
        survivors = {name for node in changed.graph.all_nodes() for name in _names(node.outputs)}
        gone = {id(old) for name, old in self._nodes.items() if name not in survivors}
        gone -= {id(old) for name, old in self._nodes.items() if name in survivors}
        return PassResult(modified=True, matches=max(1, touched + len(gone)))

    def put_back_initializers(self, graph: onnx_ir.Graph) -> None:
        """Put the initializers of `graph` into their old order, including those that nobody read.

        Guests that work on protobuf do not see the latter. Call this before `finish`, for a `graph` that is not the old
        one.
        """
        found = dict(graph.initializers)
        for name in self._unused - set(found):
            found[name] = _copy(self._initializers[name])
        order = {name: index for index, name in enumerate(self._initializers)}
        graph.initializers.clear()
        for name in sorted(found, key=lambda name: order.get(name, len(order))):
            graph.register_initializer(found[name])

    def _restore_values(self, changed: onnx_ir.Model) -> None:
        for name, value in _values(changed):
            old = self._values.get(name)
            if old is None:
                continue
            value.doc_string = value.doc_string or old.doc_string
            for key, text in old.metadata.items():
                value.metadata_props.setdefault(key, text)
            if value.type is None or value.type == old.type:
                value.type = value.type or old.type
                value.shape = merged_shapes(value.shape, old.shape)

    def _restore_functions(self, changed: onnx_ir.Model) -> None:
        """Take a function whose body came back unchanged as it was, with its metadata."""
        for key, function in list(changed.functions.items()):
            if self._functions.get(key) == _function_key(function):
                changed.functions[key] = self._old_functions[key]

    def _restore_nodes(self, changed: onnx_ir.Model, author: str) -> int:
        """Put back the metadata of nodes, and record the origins of new and changed ones; return how many these are.

        The nodes are visited from the last to the first, since the origins of a new node are known by who reads it.
        """
        survivors = {id(old) for node in changed.graph.all_nodes() if (old := self._same(node)) is not None}
        origins: dict[onnx_ir.Node, list[onnx_ir.Node]] = {}
        touched = 0
        for node in reversed(list(changed.graph.all_nodes())):
            old = self._same(node)
            if old is not None:
                node.doc_string = node.doc_string or old.ghost.doc_string
                node.metadata_props.update(
                    {key: text for key, text in old.ghost.metadata_props.items() if key not in node.metadata_props}
                )
                same_attributes = attributes_key(node) == old.attributes
                if same_attributes and tuple(_names(node.inputs)) == old.inputs:
                    continue
                # A node with other attributes also does the work of nodes before it, as one Transpose does that of two.
                origins_of = [old.ghost] if same_attributes else self._with_dead(_names(node.outputs), survivors)
                set_provenance(node, author, origins_of)
            else:
                found = self._origins(node, origins, survivors)
                origins[node] = found
                set_provenance(node, author, found)
            touched += 1
        return touched

    def _same(self, node: onnx_ir.Node) -> _OldNode | None:
        """Return the old node with the operator and an output name of `node`; None if there is none."""
        for name in _names(node.outputs):
            old = self._nodes.get(name) if name else None
            if old is not None and old.operator == (node.domain, node.op_type):
                return old
        return None

    def _origins(
        self, node: onnx_ir.Node, known: dict[onnx_ir.Node, list[onnx_ir.Node]], survivors: set[int]
    ) -> list[onnx_ir.Node]:
        """Return the old nodes whose place a new node took.

        These gave the values that the new node's values stand for, or died with those nodes. If there are none, the new
        node has the origins of the nodes that read it.
        """
        replaced: dict[str, None] = {}
        inherited: list[onnx_ir.Node] = []
        for value in node.outputs:
            if value.name in self._nodes:
                replaced[value.name or ""] = None
            for use in value.uses():
                reader = self._same(use.node)
                if reader is not None and use.idx < len(reader.inputs):
                    replaced[reader.inputs[use.idx]] = None
                inherited += known.get(use.node, [])
        return self._with_dead(replaced, survivors) or list(dict.fromkeys(inherited))

    def _with_dead(self, names: Iterable[str], survivors: set[int]) -> list[onnx_ir.Node]:
        """Return the old nodes that gave these values, and the nodes before them that are gone."""
        found: dict[onnx_ir.Node, None] = {}
        work = list(names)
        while work:
            old = self._nodes.get(work.pop(0))
            if old is not None and old.ghost not in found:
                found[old.ghost] = None
                work += [name for name in old.inputs if name in self._nodes and id(self._nodes[name]) not in survivors]
        return list(found)


def take_over(model: onnx_ir.Model, other: onnx_ir.Model) -> None:
    """Turn `model`, in place, into what `other` is.

    Its own `meta` and metadata stay; metadata of `other` is added.
    """
    if other is model:
        return
    model.graph = other.graph
    model.functions.clear()
    model.functions.update(other.functions)
    model.metadata_props.update(other.metadata_props)
    if not _is_sorted(model.graph):
        model.graph.sort()


def _is_sorted(graph: onnx_ir.Graph) -> bool:
    seen: set[onnx_ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph and producer not in seen:
                return False
        seen.add(node)
    return True


def _ghost(node: onnx_ir.Node) -> onnx_ir.Node:
    """Return a node without inputs and outputs that carries name, metadata and doc string of `node`."""
    ghost = onnx_ir.Node(node.domain, node.op_type, [], name=node.name, num_outputs=0)
    ghost.metadata_props.update(node.metadata_props)
    ghost.doc_string = node.doc_string
    return ghost


def _is_read(value: onnx_ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()


def _copy(value: onnx_ir.Value) -> onnx_ir.Value:
    """Return the same constant as a new value, for another graph."""
    return onnx_ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


def _names(values: Iterable[onnx_ir.Value | None]) -> list[str]:
    return [(value.name or "") if value is not None else "" for value in values]


def _values(model: onnx_ir.Model) -> Iterator[tuple[str, onnx_ir.Value]]:
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            yield value.name or "", value
    for node in model.graph.all_nodes():
        for value in node.outputs:
            yield value.name or "", value


def _old_value(value: onnx_ir.Value) -> _OldValue:
    return _OldValue(value.type, value.shape, value.doc_string, dict(value.metadata_props))


def _function_key(function: onnx_ir.Function) -> tuple[object, ...]:
    nodes = [
        (node.op_identifier(), tuple(_names(node.inputs)), tuple(_names(node.outputs)), attributes_key(node))
        for node in function
    ]
    return tuple(_names(function.inputs)), tuple(_names(function.outputs)), tuple(nodes)
