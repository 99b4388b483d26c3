"""Decompose onnxruntime's own operators into standard ones (the decompose-contrib pass)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir

from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.operators import COLLECTIVE_OPS, is_runtime_operator
from passopt.passes.decomposition.contrib import (
    activations,
    attention,
    grouped_attention,
    norms,
    products,
    quantised_weights,
    rotary,
)
from passopt.passes.decomposition.contrib.registry import EXPANSIONS
from passopt.passes.decomposition.decompose_pass import DecomposePass
from passopt.passes.framework.accuracy import REASSOCIATED
from passopt.passes.framework.records import PassResult
from passopt.passes.patterns.rules import Rewriter

#: The modules that fill EXPANSIONS; naming them keeps their imports.
MODULES = (activations, attention, grouped_attention, norms, products, quantised_weights, rotary)


@dataclasses.dataclass(frozen=True)
class DecomposeContrib(DecomposePass):
    """Let all passes and targets read graphs that onnxruntime optimised and saved: give its operators standard forms.

    Before: ``y, _, _, s = com.microsoft.SkipLayerNormalization(x, skip, w, b)``, and 30 more operators
    After:  ``s = Add(x, skip); y = LayerNormalization(s, w, b)``
    Norms, Gelu and its kin, fused products, RotaryEmbedding, Attention, MultiHeadAttention, GroupQueryAttention and
    weights of 4 and 8 bits are decomposed; what is quantised goes through DequantizeLinear, whose bytes are those of
    the file. An operator, an attribute or an input without a standard form stays as it is, with the reason. Bodies of
    If and Loop are left alone.
    """

    name = "decompose-contrib"
    accuracy = REASSOCIATED
    decomposes = tuple(f"{domain}::{name}" if domain else name for domain, name in EXPANSIONS)

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        return EXPANSIONS[node.domain, node.op_type](op, node)  # type: ignore[return-value]

    def takes(self, node: onnx_ir.Node, opset: int) -> bool:
        """Leave LayerNormalization alone where it is standard."""
        return bool(node.domain) or is_runtime_operator(node, opset)

    def run(self, model: onnx_ir.Model) -> PassResult:
        """Decompose every node that has a standard form, and count why the others stay."""
        result = super().run(model)
        for node in model.graph.all_nodes():
            reason = _why_it_stays(node, is_inside=node.graph is not model.graph)
            if reason is not None:
                result.declines[reason] += 1
        bodies: tuple[onnx_ir.Graph | onnx_ir.Function, ...] = (model.graph, *model.functions.values())
        used = {node.domain for body in bodies for node in body.all_nodes()}
        if result.matches and MICROSOFT not in used:
            model.graph.opset_imports.pop(MICROSOFT, None)
        return result


def _why_it_stays(node: onnx_ir.Node, *, is_inside: bool) -> str | None:
    """Return why a node of onnxruntime's domains is not even tried; None for any other node."""
    if node.domain.partition(".")[0] != "com" or (node.domain == MICROSOFT and node.op_type in COLLECTIVE_OPS):
        return None
    if (node.domain, node.op_type) not in EXPANSIONS:
        return f"{node.domain}.{node.op_type} has no standard form that passopt knows"
    return f"{node.op_type} stands in the body of an If, Loop or Scan" if is_inside else None
