"""Count the attentions of a graph: those in one operator, and every softmax that still stands between two products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir

from passopt.ir.graph.decoder import SELF_CHECK, find_decoder
from passopt.ir.graph.functions import ALIBI_ATTENTION, ALIBI_ATTENTION_NO_CACHE, DOMAIN
from passopt.ir.shapes.dimensions import dimensions
from passopt.ir.weights.lazy_weight import constant_tensor

#: What models put between the product of queries and keys and its softmax.
_BEFORE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "CastLike", "Max", "Min", "Clip", "Tanh", "Reshape", "Identity"}
)
#: What models put between the softmax and the product with the values.
_BEHIND = frozenset({"Cast", "CastLike", "Dropout", "Where", "Reshape", "Identity", "Mul"})
_PRODUCTS = frozenset({"MatMul", "Einsum"})
#: How many operators may stand between a softmax and a product.
_FURTHEST = 12
#: The operators that are a whole attention, as (domain, op type).
_FUSED = frozenset({("", "Attention"), (DOMAIN, ALIBI_ATTENTION), (DOMAIN, ALIBI_ATTENTION_NO_CACHE)})


def attentions(model: onnx_ir.Model) -> int:
    """Return the number of attentions: those in one operator, and those of `unfused_attentions`.

    Args:
        model: The model to look at.
    """
    return sum((node.domain, node.op_type) in _FUSED for node in model.graph.all_nodes()) + len(
        unfused_attentions(model)
    )


def unfused_attentions(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return every Softmax of the main graph whose scores are a product of two activations, and which weighs values.

    That is what an attention looks like before it is one operator, however it is spelled. A softmax that the graph
    hands out, or that nothing is multiplied with, is none: it is a classifier, or the choice of an expert.

    Args:
        model: The model to look at.
    """
    found = [node for node in model.graph if node.op_type == "Softmax" and not node.domain]
    return [node for node in found if _scores_are_a_product(node) and _weighs_values(node)]


def has_attention(model: onnx_ir.Model) -> bool:
    """Return True for a decoder that `export` wrote, or that has a cache: there must be attention in it."""
    return find_decoder(model) is not None or SELF_CHECK in model.metadata_props


def _scores_are_a_product(softmax: onnx_ir.Node) -> bool:
    return any(
        node.op_type in _PRODUCTS and _multiplies_activations(node) for node in _reached(softmax, _inputs, _BEFORE)
    )


def _weighs_values(softmax: onnx_ir.Node) -> bool:
    return any(
        node.op_type in _PRODUCTS and _multiplies_activations(node) for node in _reached(softmax, _readers, _BEHIND)
    )


def _reached(start: onnx_ir.Node, steps: object, through: frozenset[str]) -> Iterator[onnx_ir.Node]:
    """Yield the nodes around `start` that are reached through operators of the types `through`."""
    assert callable(steps)
    front: Sequence[onnx_ir.Node] = steps(start)
    seen: set[onnx_ir.Node] = set()
    for _ in range(_FURTHEST):
        here = [node for node in dict.fromkeys(front) if node not in seen and not node.domain]
        seen.update(here)
        yield from here
        front = [other for node in here if node.op_type in through for other in steps(node)]


def _inputs(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    makers = [item.producer() for item in node.inputs if item is not None]
    return [maker for maker in makers if maker is not None]


def _readers(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    return [use.node for use in node.outputs[0].uses()]


def _multiplies_activations(node: onnx_ir.Node) -> bool:
    """Return True if two computed values of three axes or more are multiplied; a product with a weight is a linear."""
    operands = [item for item in node.inputs if item is not None]
    if len(operands) != 2 or any(constant_tensor(item) is not None for item in operands):
        return False
    shapes = [dimensions(item) for item in operands]
    return all(dims is None or len(dims) >= 3 for dims in shapes)
