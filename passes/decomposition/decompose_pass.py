"""Define the base class of passes that write one operator as several.

These passes are the inverses of the fusions, for targets without kernels for the fused operators.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.graph.attributes import bodies, bodies_below
from passopt.ir.graph.completion import complete_node, complete_types
from passopt.ir.graph.editor import Editor, discard
from passopt.ir.graph.provenance import called
from passopt.ir.serialization.inference import complete_all_types, forget_types
from passopt.passes.framework.accuracy import REASSOCIATED, Accuracy
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter


class DecomposePass(Pass):
    """Replace every node of the operators that the pass `decomposes` by what `expand` builds, in bodies too.

    Nodes whose outputs nobody reads are removed, and those in local functions stay, because their calls may differ in
    dtypes and lengths.
    """

    accuracy: ClassVar[Accuracy] = REASSOCIATED

    @abc.abstractmethod
    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        """Build what `node` computes, and return one value per output of the node, in their order.

        May raise Decline, with the reason; the node then stays.
        """

    def takes(self, node: onnx_ir.Node, opset: int) -> bool:
        """Return whether a node of these operators is one to decompose; all are, unless a pass says otherwise."""
        return True

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Decompose the nodes of the main graph and of all bodies, and count why others stay."""
        complete_types(model)
        # What is in bodies has types only where the file states them, so ONNX is asked; that costs a copy of the graph.
        known = complete_all_types(model) if any(self._finds(body) for body in bodies_below(model.graph)) else []
        result = PassResult()
        self._expand_all(Editor(model, self.name), {}, result)
        for function in model.functions.values():
            for node in function.all_nodes():
                if self._is_wanted(node, function.opset_imports.get("", 0)):
                    result.declines[
                        f"{called(node)} is in the function {function.name}; run inline-functions first"
                    ] += 1
        result.modified = result.matches > 0
        if not result.modified:
            forget_types(known)
        return result

    def _is_wanted(self, node: onnx_ir.Node, opset: int) -> bool:
        """Return whether a node is of the operators that the pass takes apart, and one that it takes."""
        return (node.domain, node.op_type) in _kinds(self.decomposes) and self.takes(node, opset)

    def _finds(self, body: onnx_ir.Graph) -> bool:
        return any(self._is_wanted(node, 0) for node in body)

    def _expand_all(self, editor: Editor, memory: dict[Hashable, onnx_ir.Value], result: PassResult) -> None:
        """Decompose the nodes of a graph, and then those of the bodies in it.

        A body may read every value that is made before its node, and the constants of the main graph, so that what is
        shared among all sites is an initializer there.
        """
        for node in list(editor.graph):
            for body in bodies(node):
                self._expand_all(editor.inside(body), memory, result)
            read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
            if not self._is_wanted(node, editor.opset):
                # What the node reads may have got a type just now.
                complete_node(node, editor.model, lambda value: not value.is_graph_output())
                continue
            result.tries += 1
            if not read:  # legalize would refuse it, although nobody needs it
                result.matches += editor.remove_dead([node])
                continue
            op = Rewriter(editor.opset, editor.unique, node.outputs[0].name or node.op_type, memory, types=editor.types)
            try:
                values = dict(zip(node.outputs, self.expand(op, node)))
            except Decline as reason:
                discard(op.built)
                result.declines[str(reason)] += 1
                continue
            editor.replace({value: values[value] for value in read}, op.built, [node])
            editor.remove_dead(reversed(op.built.nodes))
            result.matches += 1


@functools.cache
def _kinds(names: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Return operators that are written as `Name` or `domain::Name` as pairs of domain and name."""
    return frozenset((domain, name) for domain, _, name in (text.rpartition("::") for text in names))


def operand(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    """Return input number `index` of a node, or None if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """Return an input that the operator always has. Raises Decline if its dtype is unknown."""
    value = node.inputs[index]
    assert value is not None
    if value.dtype is None:
        raise Decline(f"the dtype of {value.name} is unknown")
    return value


def cast(op: Any, value: onnx_ir.Value, dtype: onnx_ir.DataType | None) -> onnx_ir.Value:
    """Cast `value` to `dtype`; return `value` itself if it has that dtype already or `dtype` is None."""
    if dtype is None or value.dtype == dtype:
        return value
    made: onnx_ir.Value = op.Cast(value, to=dtype.value)
    return made
