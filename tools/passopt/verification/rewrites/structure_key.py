"""Make a key of the computation of a cut, so that each distinct computation is checked only once.

Sites with equal keys differ only in names and in the numbers of their weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import onnx_ir

from passopt.ir.graph.attributes import attributes_key
from passopt.ir.weights.expressions import Expression, Source
from passopt.ir.weights.lazy_weight import expression_of
from passopt.ir.weights.literals import Literal
from passopt.verification.rewrites.regions import Cut, Region
from passopt.verification.rewrites.value_kinds import is_control_name

LeafKey: TypeAlias = "Callable[[onnx_ir.Value], object]"


def structure_key(cut: Cut, leaf_key: LeafKey) -> tuple[Any, ...]:
    """Return a key of both sides of a cut.

    It covers operators, attributes, dtypes, shapes and digests of constants. Leaves are numbered in the order of their
    use, and `leaf_key` returns what else tells a leaf from others: the shapes that it has.
    """
    numbers: dict[object, int] = {}
    return _region_key(cut.before, numbers, leaf_key), _region_key(cut.after, numbers, leaf_key)


def _region_key(region: Region, numbers: dict[object, int], leaf_key: LeafKey) -> tuple[Any, ...]:
    made: dict[onnx_ir.Value, object] = {}
    for index, node in enumerate(region.nodes):
        made.update({value: (index, place) for place, value in enumerate(node.outputs)})
    weights = set(region.weights)

    def reference(value: onnx_ir.Value | None) -> object:
        if value is None or value in made:
            return value and made[value]
        if value in weights:
            expression = expression_of(value)
            assert expression is not None
            return _expression_key(expression, numbers)
        own = value.name if value.producer() is None and is_control_name(value.name or "") else None
        return numbers.setdefault(value.name, len(numbers)), own, value.dtype, leaf_key(value)

    nodes = tuple(
        (node.domain, node.op_type, attributes_key(node), tuple(map(reference, node.inputs)), len(node.outputs))
        for node in region.nodes
    )
    return region.side.opsets.get(""), nodes, tuple(reference(root) for root in region.roots)


def _expression_key(expression: Expression, numbers: dict[object, int]) -> tuple[object, ...]:
    """Return a key of the expression over numbered sources, without their names and places."""
    if isinstance(expression, Source):
        number = numbers.setdefault(expression, len(numbers))
        return "source", number, expression.dtype, expression.shape
    if isinstance(expression, Literal):
        digest = hashlib.blake2b(expression.data, digest_size=16).digest()
        return "literal", expression.dtype, expression.shape, digest
    own = tuple(
        getattr(expression, field.name)
        for field in dataclasses.fields(expression)
        if field.name not in {"operand", "parts"}
    )
    operands = tuple(_expression_key(operand, numbers) for operand in expression.operands)
    return type(expression).__name__, own, operands
