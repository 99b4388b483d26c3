"""Define the base class of passes that write one operator as several.

These passes are the inverses of the fusions, for targets without kernels for the fused operators.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.graph.completion import complete_node, complete_types
from passopt.ir.graph.editor import Editor, discard
from passopt.passes.framework.accuracy import REASSOCIATED, Accuracy
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter


class DecomposePass(Pass):
    """Replace every node of the operators that the pass `decomposes` by what `expand` builds.

    Nodes whose outputs nobody reads are left to dead-code.
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
        complete_types(model)
        editor = Editor(model, self.name)
        result = PassResult()
        memory: dict[Hashable, onnx_ir.Value] = {}
        kinds = {tuple(text.rpartition("::")[::2]) for text in self.decomposes}
        for node in list(model.graph):
            read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
            if (node.domain, node.op_type) not in kinds or not read or not self.takes(node, editor.opset):
                # What the node reads may have got a type just now.
                complete_node(node, model, lambda value: not value.is_graph_output())
                continue
            result.tries += 1
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
        result.modified = result.matches > 0
        return result


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
