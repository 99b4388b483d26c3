"""Cut a part of a graph into stages, so that each linear runs once, and after the codes of those before it are known.

The depth of a value is the largest number of targets on a path to it. A stage computes all values of its depth from
those of lower depths that are kept on disk; the linears that read them get their codes before the next stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import onnx_ir

from passopt.calibration.targets import Target


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a piece.

    Attributes:
        values: The values that it computes and that are kept.
        targets: The weights whose linears read some of them, by the value that they read.
        last_use: For every value that no later stage reads, its name.
    """

    values: tuple[str, ...]
    targets: dict[str, tuple[Target, ...]]
    last_use: tuple[str, ...]


def stages_of(
    piece: onnx_ir.Model, varying: Collection[str], targets: Sequence[Target], wanted: Collection[str]
) -> list[Stage]:
    """Return the stages of a piece, in order.

    Args:
        piece: The graph of the piece, of which the inputs are the values on disk, and what all windows share.
        varying: The names of its inputs that differ between windows.
        targets: The weights that get codes; those that the piece does not read are left out.
        wanted: The outputs of the piece that are wanted besides the inputs of linears.
    """
    graph = piece.graph
    weights = {target.name for target in targets}
    depths: dict[onnx_ir.Value, int] = {}
    moving = {value for value in graph.inputs if value.name in varying}
    reads: dict[str, str] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        weight = _weight_of(node, weights)
        depth = max((depths.get(value, 0) for value in inputs), default=0) + (weight is not None)
        if weight is not None and node.inputs[0] is not None:
            reads.setdefault(weight, node.inputs[0].name or "")
        is_moving = any(value in moving for value in inputs)
        for value in node.outputs:
            depths[value] = depth
            if is_moving:
                moving.add(value)
    kept: dict[str, tuple[int, int]] = {value.name or "": (-1, _last(value, depths)) for value in graph.inputs}
    for value, depth in depths.items():
        last = _last(value, depths)
        if value.name in wanted:
            kept[value.name or ""] = (depth, 1 << 30)
        elif value in moving and last > depth:
            kept[value.name or ""] = (depth, last)
    places = {value.name: depth for value, depth in depths.items()} | {value.name: 0 for value in graph.inputs}
    grouped: dict[int, dict[str, tuple[Target, ...]]] = {}
    for target in targets:
        if target.name in reads:
            stage = grouped.setdefault(places[reads[target.name]], {})
            stage[reads[target.name]] = (*stage.get(reads[target.name], ()), target)
    ends = [depth for name, (depth, _) in kept.items() if name in wanted] + list(grouped)
    return [
        Stage(
            tuple(name for name, (depth, _) in kept.items() if depth == number),
            grouped.get(number, {}),
            tuple(name for name, (_, last) in kept.items() if last == number and name in _names(moving)),
        )
        for number in range(max(ends, default=-1) + 1)
    ]


def _names(values: Collection[onnx_ir.Value]) -> set[str]:
    return {value.name or "" for value in values}


def _weight_of(node: onnx_ir.Node, weights: Collection[str]) -> str | None:
    """Return the name of the target that a MatMul multiplies with; None for other nodes."""
    if node.op_type != "MatMul" or node.domain:
        return None
    value = node.inputs[1]
    return value.name if value is not None and value.name in weights and value.is_initializer() else None


def _last(value: onnx_ir.Value, depths: dict[onnx_ir.Value, int]) -> int:
    """Return the largest depth of what is computed from a value by one node; -1 if nothing is."""
    return max((depths[output] for node in value.consumers() for output in node.outputs), default=-1)
