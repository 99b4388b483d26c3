"""Base of the passes that write one operator as several: the inverses of the fusions, for targets without kernels."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import onnx_ir

from passopt.ir.graph.editor import Editor, discard
from passopt.ir.graph.shapes import complete_types
from passopt.passes.framework.accuracy import REASSOCIATED, Accuracy
from passopt.passes.framework.base import Decline, Pass
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter


class DecomposePass(Pass):
    """Replaces every node of the operators that it `decomposes` by what `expand` builds.

    `expand` gives one value per output and may raise Decline. Nodes whose outputs nobody reads are left to dead-code.
    """

    accuracy: ClassVar[Accuracy] = REASSOCIATED

    @abc.abstractmethod
    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        """Build what `node` computes; the values of its outputs, in their order."""

    def run(self, model: onnx_ir.Model) -> PassResult:
        complete_types(model)
        editor = Editor(model, self.name)
        result = PassResult()
        memory: dict[Hashable, onnx_ir.Value] = {}
        kinds = {tuple(text.rpartition("::")[::2]) for text in self.decomposes}
        for node in list(model.graph):
            read = [value for value in node.outputs if value.uses() or value.is_graph_output()]
            if (node.domain, node.op_type) not in kinds or not read:
                continue
            result.tries += 1
            op = Rewriter(editor.opset, editor.unique, node.outputs[0].name or node.op_type, memory)
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
    """An input that may be absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """An input that the operator always has, with known dtype. Declines if the dtype is unknown."""
    value = node.inputs[index]
    assert value is not None
    if value.dtype is None:
        raise Decline(f"the dtype of {value.name} is unknown")
    return value


def cast(op: Any, value: onnx_ir.Value, dtype: onnx_ir.DataType | None) -> onnx_ir.Value:
    """`value` in another dtype; no node if it has that already."""
    if dtype is None or value.dtype == dtype:
        return value
    made: onnx_ir.Value = op.Cast(value, to=dtype.value)
    return made
