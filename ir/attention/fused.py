"""Recognise fused attentions: find queries, keys, values, mask and past behind the operators that compute one."""

from __future__ import annotations

import dataclasses

import onnx_ir

from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN

ATTENTION = "Attention"


@dataclasses.dataclass(frozen=True)
class AttentionParts:
    """The operands of a fused attention, with or without ALiBi.

    Query, key and value are [b, h, s, d], or [b, s, h·d] with the number of heads in an attribute; the past is
    [b, h, past, d].
    """

    query: onnx_ir.Value
    key: onnx_ir.Value
    value: onnx_ir.Value
    mask: onnx_ir.Value | None
    past_key: onnx_ir.Value | None
    past_value: onnx_ir.Value | None
    slopes: onnx_ir.Value | None
    positions: onnx_ir.Value | None


def find_attention(node: onnx_ir.Node) -> AttentionParts | None:
    """Return the operands of a fused attention, or None for any other node."""
    given = [*node.inputs, *[None] * (8 - len(node.inputs))]
    query, key, value = given[:3]
    if query is None or key is None or value is None:
        return None
    if (node.domain, node.op_type) == ("", ATTENTION):
        return AttentionParts(query, key, value, given[3], given[4], given[5], None, None)
    if node.domain == DOMAIN and node.op_type in {ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE}:
        return AttentionParts(query, key, value, given[5], given[6], given[7], given[3], given[4])
    return None
