"""Remove nodes, initializers and local functions that no graph output depends on (the dead-code pass)."""

from __future__ import annotations

import dataclasses

import onnx_ir

from passopt.ir.graph.editor import Editor
from passopt.ir.graph.functions import called_functions
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Drop nodes, initializers and local functions that no graph output depends on, so that nothing unused is written.

    Before: ``y = Relu(x); unused = MatMul(x, w)``
    After:  ``y = Relu(x)``
    """

    name = "dead-code"

    def run(self, model: onnx_ir.Model) -> PassResult:
        editor = Editor(model, self.name)
        nodes = sum(editor.remove_dead([node]) for node in reversed(list(model.graph)))
        weights = sum(editor.remove_unused_initializer(value) for value in list(model.graph.initializers.values()))
        called = called_functions(model)
        unused = [identifier for identifier in model.functions if identifier not in called]
        for identifier in unused:
            del model.functions[identifier]
        removed = nodes + weights + len(unused)
        return PassResult(modified=removed > 0, matches=nodes)
