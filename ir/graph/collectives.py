"""Read the schedule of collectives from a graph, and check that all ranks of an output run the same schedule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import onnx_ir

from passopt.ir.errors import ModelError, VerifyError
from passopt.ir.graph.builder import MICROSOFT
from passopt.ir.graph.decoder import COLLECTIVE
from passopt.ir.graph.operators import COLLECTIVE_OPS
from passopt.ir.graph.provenance import called

Dim: TypeAlias = "int | str | None"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One entry of the schedule. `shape` and `dtype` are those of the tensor that each rank contributes."""

    index: int
    op: str
    axis: int | None
    shape: tuple[Dim, ...] | None
    dtype: str | None


def schedule_of(model: onnx_ir.Model) -> tuple[Collective, ...]:
    """Return the collectives of the graph in the order in which ranks run them.

    Raises:
        VerifyError: If the indexes stored in the nodes' metadata are not 0, 1, 2, … in graph order.
    """
    nodes = [node for node in model.graph if is_collective(node)]
    schedule = tuple(_entry(node) for node in nodes)
    for position, (entry, node) in enumerate(zip(schedule, nodes, strict=True)):
        if entry.index != position:
            raise VerifyError(
                f"{called(node)}: is number {position} in graph order, its {COLLECTIVE} is "
                f"{node.metadata_props.get(COLLECTIVE)!r}; ranks would wait for each other"
            )
    return schedule


def is_collective(node: onnx_ir.Node) -> bool:
    """Return whether the node is an AllReduce or AllGather of onnxruntime's domain."""
    return node.domain == MICROSOFT and node.op_type in COLLECTIVE_OPS


def _entry(node: onnx_ir.Node) -> Collective:
    value = node.inputs[0]
    assert value is not None, f"{called(node)} has no input"
    index = node.metadata_props.get(COLLECTIVE, "")
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else None
    shape = None if value.shape is None else tuple(_dim(dim) for dim in value.shape.dims)
    return Collective(
        int(index) if index.isdecimal() else -1,
        node.op_type,
        axis,
        shape,
        None if value.dtype is None else value.dtype.name,
    )


def _dim(dim: int | onnx_ir.SymbolicDim) -> Dim:
    return dim if isinstance(dim, int) else dim.value


def check_schedules(schedules: Iterable[tuple[str, Sequence[Collective]]]) -> None:
    """Check that all schedules are equal; each comes with the owner's name for the error message.

    Raises:
        ModelError: At the first entry where a schedule differs from the first schedule.
    """
    pairs = list(schedules)
    for other_owner, other in pairs[1:]:
        owner, first = pairs[0]
        for position, (one, two) in enumerate(itertools.zip_longest(first, other)):
            if one == two:
                continue
            raise ModelError(
                f"collective {position} differs: {owner} has {_shown(one)}, {other_owner} has {_shown(two)}. "
                f"The folders are of different outputs; write them again with one `passopt run`."
            )


def _shown(entry: Collective | None) -> str:
    if entry is None:
        return "none"
    axis = "" if entry.axis is None else f" along axis {entry.axis}"
    shape = "" if entry.shape is None else f" {list(entry.shape)}"
    return f"{entry.op}{axis} of {entry.dtype}{shape} (index {entry.index})"
