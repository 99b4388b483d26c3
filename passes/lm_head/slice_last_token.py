"""Compute logits for the last position only (the slice-last-token pass)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import onnx_ir

from passopt.ir.dtypes import SLICE_END
from passopt.ir.graph.completion import complete_types
from passopt.ir.graph.editor import Editor
from passopt.ir.graph.linears import Linear, find_dynamic_linear
from passopt.ir.graph.lm_head import head_path
from passopt.ir.graph.provenance import called
from passopt.ir.weights.lazy_weight import constant_tensor, small_constant
from passopt.passes.framework.base import Pass
from passopt.passes.framework.records import PassResult


@dataclasses.dataclass(frozen=True)
class SliceLastToken(Pass):
    """Compute logits for the last position of the input only, because a prefill needs no others.

    Before: ``logits = MatMul(x, w)``, logits [batch, seq, vocab]
    After:  ``logits = MatMul(Slice(x, -1:, axis=1), w)``, logits [batch, 1, vocab]
    """

    name = "slice-last-token"
    changes_interface = True

    def run(self, model: onnx_ir.Model) -> PassResult:
        complete_types(model)
        path = head_path(model)
        if not path:
            return _declined("no head: the logits do not come from a linear")
        linear = find_dynamic_linear(path[0])
        inside = _along_positions(linear) if linear is not None else path[:1]
        hidden = path[0].inputs[0] if linear is None else linear.input
        if hidden is None or hidden.shape is None or len(hidden.shape) != 3:
            return _declined("the head's input is not [batch, seq, hidden]")
        if hidden.shape[1] == 1:
            return _declined("the head sees one position already")
        reason = _other_reader(path) or _reader_outside(inside) or _other_operand(path)
        if reason:
            return _declined(reason)
        editor = Editor(model, self.name)
        builder = editor.builder(f"{hidden.name}.last")
        last = builder.Slice(hidden, [-1], [SLICE_END], [1])
        last.shape = onnx_ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
        editor.insert(builder.built, inside[0], [inside[0]])
        for node in inside:
            for index, value in enumerate(node.inputs):
                if value is hidden:
                    node.replace_input_with(index, last)
        for node in (*inside, *path[1:]):
            value = node.outputs[0]
            if value.shape is not None:
                value.shape = onnx_ir.Shape([value.shape[0], 1, *value.shape.dims[2:]])
        return PassResult(modified=True, matches=1, tries=1)


def _other_reader(path: Sequence[onnx_ir.Node]) -> str | None:
    """Return why the head may not be cut, if anything but the logits is computed from it; else None.

    Only the logits may become one position.
    """
    for node, after in itertools.zip_longest(path, path[1:]):
        value = node.outputs[0]
        if any(user is not after for user in value.consumers()) or value.is_graph_output() != (after is None):
            return f"{value.name} is used for more than the logits"
    return None


def _along_positions(linear: Linear) -> list[onnx_ir.Node]:
    """Return what a linear with dynamic activations computes position by position: all but its weight."""
    return [node for node in linear.nodes if node not in linear.weight.nodes]


def _reader_outside(inside: Sequence[onnx_ir.Node]) -> str | None:
    """Return why the input may not be cut, if another linear multiplies the same rows; else None.

    Those rows must stay whole.
    """
    for node in inside[:-1]:
        value = node.outputs[0]
        if value.is_graph_output() or any(user not in inside for user in value.consumers()):
            return f"{value.name} is used for more than the logits"
    return None


def _other_operand(path: Sequence[onnx_ir.Node]) -> str | None:
    """Return why the logits may not be cut, if an operator after the head tells positions apart; else None.

    Everything between the head and the logits must treat every position alike.
    """
    for before, node in itertools.pairwise(path):
        if node.op_type == "Slice" and _selects_positions(node):
            return f"{called(node)} picks positions of the logits"
        for value in node.inputs:
            if value is None or value is before.outputs[0]:
                continue
            where = f"{called(node)} after the head reads {value.name}"
            tensor = constant_tensor(value)
            if tensor is None:
                return f"{where}, which has a value per position"
            dims = list(tensor.shape.numpy())
            if len(dims) > 3 or (len(dims) > 1 and dims[-2] != 1):
                return f"{where} of shape {dims}, expected [vocab] or one position: [1, vocab], [batch, 1, vocab]"
    return None


def _selects_positions(node: onnx_ir.Node) -> bool:
    """Return True if a Slice may cut the axis of positions."""
    axes = small_constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is None or any(axis in {1, -2} for axis in axes.reshape(-1).tolist())


def _declined(reason: str) -> PassResult:
    """Return the result of a run that declined for this reason."""
    return PassResult(tries=1, declines=collections.Counter([reason]))
