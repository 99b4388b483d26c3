"""Compute once what is computed twice, and move what several layers read before the first layer (the cse pass)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.operators import COMMUTATIVE, RANDOM
from passopt.ir.graph.provenance import set_provenance
from passopt.ir.shapes.dimensions import merged_shapes
from passopt.ir.weights.lazy_weight import small_constant
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult

_NEVER_EQUAL = RANDOM | {"Dropout"}
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclasses.dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Compute equal expressions once: exporters repeat masks and rotary tables in every layer.

    Before: ``a = Cos(t) … b = Cos(t)``
    After:  ``a = Cos(t) …``, all readers of ``b`` read ``a``
    Two nodes are equal if they are the same operator with equal attributes on equal inputs. Small constants are
    compared by content, and the inputs of commutative operators in any order. Random operators, collectives and nodes
    with bodies stay, and so does every graph output. What several layers read is moved before the first one, so that
    all layers look alike.
    """

    name = "cse"

    def run(self, model: onnx_ir.Model) -> PassResult:
        complete_types(model)
        editor = Editor(model, self.name)
        result = PassResult(tries=len(model.graph))
        result.matches = _Merger(editor).run()
        moved = _hoist_shared(editor.graph)
        if moved:
            result.notes.append(f"{moved} nodes that layers share moved before the first layer")
        result.modified = result.matches > 0 or moved > 0
        return result


class _Merger:
    """Merge equal nodes of one graph."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._numbers: dict[object, int] = {}
        self._of_value: dict[onnx_ir.Value, int] = {}

    def run(self) -> int:
        """Merge equal nodes in one sweep in topological order, and return how many nodes were merged into others.

        The inputs of a node are merged before the node itself is looked at.
        """
        first: dict[tuple[Any, ...], onnx_ir.Node] = {}
        merged: dict[onnx_ir.Node, list[onnx_ir.Node]] = {}
        changed = 0
        for node in list(self.editor.graph):
            if not self._may_merge(node):
                continue
            kept = first.setdefault(self._key(node), node)
            if kept is node or not _redirect(node, kept):
                continue
            changed += 1
            merged.setdefault(kept, [kept]).append(node)
            self.editor.remove_dead([node])
        for kept, nodes in merged.items():
            set_provenance(kept, self.editor.author, nodes)
        return changed

    def _may_merge(self, node: onnx_ir.Node) -> bool:
        """Return True if the node is known to give the same result each time.

        Of nodes outside the ONNX domain that is known only for calls of local functions made of such operators.
        """
        if not node.domain:
            return node.op_type not in _NEVER_EQUAL
        function = self.editor.model.functions.get(node.op_identifier())
        if function is None:
            return False
        return all(not inner.domain and inner.op_type not in _NEVER_EQUAL for inner in function.all_nodes())

    def _key(self, node: onnx_ir.Node) -> tuple[Any, ...]:
        """Return a key that is equal for nodes that compute the same."""
        inputs = [None if value is None else self._number(value) for value in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        if not node.domain and node.op_type in COMMUTATIVE and None not in inputs:
            inputs.sort()
        return (*node.op_identifier(), len(node.outputs), attributes_key(node), tuple(inputs))

    def _number(self, value: onnx_ir.Value) -> int:
        """Return a number that is equal for the same value and for equal small constants."""
        if value not in self._of_value:
            array = small_constant(value) if value.producer() is None else None
            key = value if array is None else (value.dtype, array.shape, array.tobytes())
            self._of_value[value] = self._numbers.setdefault(key, len(self._numbers))
        return self._of_value[value]


def _redirect(node: onnx_ir.Node, kept: onnx_ir.Node) -> bool:
    """Let all readers of `node` read `kept`, and return False if `node` has to stay as it is.

    A graph output moves to `kept` with its name, unless `kept` gives a graph output itself.
    """
    changed = False
    for old, new in zip(node.outputs, kept.outputs, strict=True):
        taken = old.is_graph_output() and not new.is_graph_output()
        if not old.uses() and not taken:
            continue
        changed = True
        new.type = new.type or old.type
        new.shape = merged_shapes(old.shape, new.shape) if taken else merged_shapes(new.shape, old.shape)
        if taken:
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, new)
        if taken:
            old.name, new.name = new.name, old.name
    return changed or not any(value.is_graph_output() for value in node.outputs)


def _hoist_shared(graph: onnx_ir.Graph) -> int:
    """Move what several layers read, and all that it needs, before the first layer; return how many nodes moved.

    A layer is recognised by its leaves: weights and caches whose names hold its number.
    """
    shared = _shared_by_layers(graph)
    start, late = None, []
    for node in graph:
        if node in shared:
            if start is not None:
                late.append(node)
        elif start is None and not _is_integral(node):
            start = node
    if start is None or not late:
        return 0
    for node in late:
        graph.remove(node)
    graph.insert_before(start, late)
    return len(late)


def _shared_by_layers(graph: onnx_ir.Graph) -> set[onnx_ir.Node]:
    """Return the nodes that belong to no layer and are read by several, and all nodes that these need."""
    layer_of: dict[onnx_ir.Node, int | None] = {}
    readers: dict[onnx_ir.Node, set[int]] = {}
    for node in graph:
        producers = _producers(node)
        numbers = [*_leaf_layers(node), *(layer_of[producer] for producer in producers)]
        layer = max((number for number in numbers if number is not None), default=None)
        layer_of[node] = layer
        for producer in producers:
            if layer is not None and layer_of[producer] is None:
                readers.setdefault(producer, set()).add(layer)
    shared = {node for node, layers in readers.items() if len(layers) > 1}
    work = list(shared)
    while work:
        needed = [producer for producer in _producers(work.pop()) if producer not in shared]
        shared.update(needed)
        work += needed
    return shared


def _producers(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """Return the nodes of its graph that a node reads, also from inside its bodies."""
    found: dict[onnx_ir.Node, None] = {}
    work = [node]
    while work:
        reader = work.pop()
        for value in reader.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is node.graph:
                found[producer] = None
        for attribute in reader.attributes.values():
            if attribute.type == onnx_ir.AttributeType.GRAPH and not attribute.is_ref():
                work += list(attribute.as_graph())
    return list(found)


def _leaf_layers(node: onnx_ir.Node) -> list[int]:
    """Return the layer numbers in the names of the weights and caches that a node reads.

    A Shape node has none, because the length of one cache is that of all. A leaf of a single number has none either:
    layers share it, whichever layer the exporter named it after.
    """
    if node.op_type == "Shape":
        return []
    leaves = [value for value in node.inputs if value is not None and value.producer() is None]
    names = [value.name or "" for value in leaves if value.shape is None or any(dim != 1 for dim in value.shape.dims)]
    return [int(found[1]) for name in names if (found := _LAYER.search(name))]


def _is_integral(node: onnx_ir.Node) -> bool:
    """Return True if all outputs are integers or booleans: lengths, positions and masks belong to no layer."""
    dtypes = {value.dtype for value in node.outputs}
    return all(dtype is not None and (dtype.is_integer() or dtype == onnx_ir.DataType.BOOL) for dtype in dtypes)
