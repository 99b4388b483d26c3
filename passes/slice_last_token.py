"""slice-last-token: compute logits for the last position only."""

from __future__ import annotations

import collections
import dataclasses

import onnx_ir

from passopt.ir.editing import Editor
from passopt.passes.base import Pass, PassResult
from passopt.passes.head import head_path

_END = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class SliceLastToken(Pass):
    """Let the head see only the last position of whatever came in: a prefill needs no other logits.

    Before: ``logits = MatMul(x, w)``, logits [batch, seq, vocab]
    After:  ``logits = MatMul(Slice(x, -1:, axis=1), w)``, logits [batch, 1, vocab]
    """

    name = "slice-last-token"

    def run(self, model: onnx_ir.Model) -> PassResult:
        path = head_path(model)
        if not path:
            return _declined("no head: the logits do not come from a linear")
        head, hidden = path[0], path[0].inputs[0]
        if hidden is None or hidden.shape is None or len(hidden.shape) != 3:
            return _declined("the head's input is not [batch, seq, hidden]")
        if hidden.shape[1] == 1:
            return _declined("the head sees one position already")
        editor = Editor(model, self.name)
        builder = editor.builder(f"{hidden.name}.last")
        last = builder.Slice(hidden, [-1], [_END], [1])
        last.shape = onnx_ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
        editor.insert(builder.built, head, [head])
        head.replace_input_with(0, last)
        for node in path:
            value = node.outputs[0]
            if value.shape is not None:
                value.shape = onnx_ir.Shape([value.shape[0], 1, *value.shape.dims[2:]])
        return PassResult(modified=True, matches=1, tries=1)


def _declined(reason: str) -> PassResult:
    return PassResult(tries=1, declines=collections.Counter([reason]))
