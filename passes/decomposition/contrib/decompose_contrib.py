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
    the file. An operator, an attribute or an input without a standard form stays as it is, with the reason, and so does
    what stands in a local function, for which inline-functions runs first.
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
        places: tuple[onnx_ir.Graph | onnx_ir.Function, ...] = (model.graph, *model.functions.values())
        for node in (node for place in places for node in place.all_nodes()):
            if _has_no_form(node):
                result.declines[f"{node.domain}.{node.op_type} has no standard form that passopt knows"] += 1
        if result.matches and MICROSOFT not in {node.domain for place in places for node in place.all_nodes()}:
            model.graph.opset_imports.pop(MICROSOFT, None)
        return result


def _has_no_form(node: onnx_ir.Node) -> bool:
    """Return whether a node is of onnxruntime's domains and of an operator that is not known here."""
    is_collective = node.domain == MICROSOFT and node.op_type in COLLECTIVE_OPS
    return (
        node.domain.partition(".")[0] == "com" and not is_collective and (node.domain, node.op_type) not in EXPANSIONS
    )
