"""Check that groups of inputs fill the weights of a model, and the part of each weight that a rank holds.

A linear whose inputs are the channels of other linears, as those of an attention or of a gate are, is split along its
inputs by tensor parallelism. So each rank must hold whole groups of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir

from passopt.ir.dtypes import MODEL_FLOATS
from passopt.ir.errors import UsageError
from passopt.ir.graph.linears import find_weight
from passopt.ir.graph.lm_head import is_head

#: The groups that there are kernels for.
GROUPS = (128, 64, 32)
_DEGREES = (2, 4, 8)
#: A linear behind one of these reads numbers that are computed from a whole row, so it is not split along its inputs.
_WHOLE_ROWS = frozenset(
    {"ReduceMean", "ReduceL2", "ReduceSumSquare", "LayerNormalization", "RMSNormalization", "LpNormalization"}
    | {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"}
)
_FURTHEST = 200


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """How many inputs a weight has, and whether ranks share them out."""

    weight: str
    count: int
    is_split: bool

    def takes(self, group: int, degree: int) -> bool:
        return self.count % (group * (degree if self.is_split else 1)) == 0


def check_groups(model: onnx_ir.Model, who: str, group: int, degree: int, *, head: bool) -> None:
    """Raise UsageError if groups would not be full, or be cut by tensor parallelism; it names what would be legal.

    Args:
        model: The model before any pass.
        who: The pass that asks, for messages.
        group: The inputs of a group.
        degree: The number of ranks; 1 for none.
        head: Whether the head gets groups, too.
    """
    found = list(_inputs(model, head=head))
    wrong = [item for item in found if not item.takes(group, degree)]
    if not wrong:
        return
    item = wrong[0]
    share = item.count if item.count % group else item.count // degree
    where = f"the {item.count} inputs of {item.weight}"
    if item.count % group == 0:
        where = f"the {item.count / degree:g} inputs of {item.weight} that each of {degree} ranks holds"
    more = len(wrong) - 1
    others = f", and of {more} more weight{'s' * (more > 1)}" if more else ""
    left = f", {share} = {share // group} · {group} + {share % group}" if item.count % degree == 0 else ""
    raise UsageError(f"{who}: groups of {group} do not divide {where}{others}{left}. Legal: {_legal(found)}")


def _legal(found: list[_Inputs]) -> str:
    parts = []
    for group in GROUPS:
        if not all(item.takes(group, 1) for item in found):
            continue
        degrees = [degree for degree in _DEGREES if all(item.takes(group, degree) for item in found)]
        parts.append(f"group={group} " + (f"with tp {', '.join(map(str, degrees))}" if degrees else "without tp"))
    return "; ".join(parts) or "no group of 128, 64 or 32: quantise to int8 instead"


def _inputs(model: onnx_ir.Model, *, head: bool) -> Iterator[_Inputs]:
    for node in model.graph:
        weight = find_weight(node)
        if weight is None or weight.scales is not None or weight.value.dtype not in MODEL_FLOATS:
            continue
        if weight.contracted is None or (not head and is_head(node)):
            continue
        yield _Inputs(weight.value.name or "", weight.contracted, _reads_channels(node.inputs[0]))


def _reads_channels(value: onnx_ir.Value | None) -> bool:
    """Return whether a value is computed from channels of linears, and of nothing that takes whole rows together."""
    waiting, seen, channels = [value], set[onnx_ir.Value](), False
    while waiting:
        item = waiting.pop()
        producer = item.producer() if item is not None else None
        if item is None or item in seen or producer is None or item.dtype not in {*MODEL_FLOATS, None}:
            continue
        seen.add(item)
        if producer.op_type in _WHOLE_ROWS or len(seen) > _FURTHEST:
            return False
        if find_weight(producer) is not None:
            channels = True
        elif producer.op_type != "Shape":
            waiting += producer.inputs
    return channels
