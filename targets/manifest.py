"""manifest.json: what an output folder holds, of what it was made, and the schedule of collectives all ranks follow.

Digests have a fixed length, so the file's size is known before a weight is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx_ir

from passopt.ir.builder import MICROSOFT
from passopt.ir.contract import COLLECTIVE, degree_of
from passopt.ir.errors import ModelError, VerifyError
from passopt.ir.weights import LazyWeight

MANIFEST_NAME = "manifest.json"
COLLECTIVE_OPS = ("AllReduce", "AllGather")
#: Stands for a digest wherever only its length matters.
NO_DIGEST = "0" * 64

_VERSION = 1
Dim: TypeAlias = "int | str | None"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One entry of the schedule. `shape` and `dtype` are those of what each rank contributes."""

    index: int
    op: str
    axis: int | None
    shape: tuple[Dim, ...] | None
    dtype: str | None


@dataclasses.dataclass(frozen=True)
class RankFiles:
    """The folder of one rank (`.` without tensor parallelism): blake3 of model.onnx, each tensor and all of them."""

    directory: str
    model: str
    root: str
    tensors: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`ranks` is empty for outputs that only refer to their weights; `root` then is None.

    `replicated` and `sharded` name the weights of a tensor-parallel output; both are empty at degree 1.
    """

    version: str
    pipeline: str
    degree: int
    source: Mapping[str, object]
    collectives: tuple[Collective, ...]
    replicated: tuple[str, ...] = ()
    sharded: tuple[str, ...] = ()
    ranks: tuple[RankFiles, ...] = ()
    root: str | None = None

    def text(self) -> str:
        return json.dumps({"manifest": _VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises ModelError if it is missing, damaged or of another version."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise ModelError(f"{directory}: has no {MANIFEST_NAME}; name an output folder of passopt")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        version = body.pop("manifest")
        if version != _VERSION:
            raise ModelError(f"{path}: manifest version {version}, this passopt reads {_VERSION}")
        manifest = _decoded(body)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a manifest: {error!r}. Write the output again.") from error
    _check_folders(path, manifest)
    return manifest


def _decoded(body: dict[str, Any]) -> Manifest:
    collectives = [
        Collective(**{**entry, "shape": None if entry["shape"] is None else tuple(entry["shape"])})
        for entry in body.pop("collectives")
    ]
    ranks = [RankFiles(**entry) for entry in body.pop("ranks")]
    replicated, sharded = tuple(body.pop("replicated")), tuple(body.pop("sharded"))
    return Manifest(**body, collectives=tuple(collectives), replicated=replicated, sharded=sharded, ranks=tuple(ranks))


def _check_folders(path: Path, manifest: Manifest) -> None:
    if not isinstance(manifest.degree, int) or manifest.degree < 1:
        raise ModelError(f"{path}: not a manifest: degree {manifest.degree!r}. Write the output again.")
    if manifest.ranks and len(manifest.ranks) != manifest.degree:
        raise ModelError(f"{path}: names {len(manifest.ranks)} ranks at degree {manifest.degree}")
    expected = rank_folders(manifest.degree)
    for entry, folder in zip(manifest.ranks, expected, strict=False):
        if entry.directory != folder:
            raise ModelError(f"{path}: names the folder {entry.directory!r}, expected {folder!r}; refused")


def rank_folders(degree: int) -> list[str]:
    """Where each rank's model lies in an output folder."""
    return ["."] if degree == 1 else [f"rank{rank}" for rank in range(degree)]


def refuse_single_rank(model: onnx_ir.Model) -> None:
    """Raise ModelError for the files of one rank: without the other ranks' weights they are no whole model."""
    degree = degree_of(model)
    lazy = [
        value.const_value for value in model.graph.initializers.values() if isinstance(value.const_value, LazyWeight)
    ]
    if degree > 1 and not any(tensor.expression.depends_on_rank for tensor in lazy):
        raise ModelError(f"these are the weights of one rank of {degree}; name the folder that holds all of them")


def schedule_of(model: onnx_ir.Model) -> tuple[Collective, ...]:
    """The collectives in the order in which ranks run them. Raises VerifyError if their indexes are not 0, 1, …"""
    nodes = [node for node in model.graph if is_collective(node)]
    schedule = tuple(_entry(node) for node in nodes)
    for position, (entry, node) in enumerate(zip(schedule, nodes, strict=True)):
        if entry.index != position:
            raise VerifyError(
                f"{node.op_type} {node.name!r}: is number {position} in graph order, its {COLLECTIVE} is "
                f"{node.metadata_props.get(COLLECTIVE)!r}; ranks would wait for each other"
            )
    return schedule


def is_collective(node: onnx_ir.Node) -> bool:
    return node.domain == MICROSOFT and node.op_type in COLLECTIVE_OPS


def _entry(node: onnx_ir.Node) -> Collective:
    value = node.inputs[0]
    assert value is not None, f"{node.op_type} {node.name!r} has no input"
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
    """Raise ModelError at the first place where two `(owner, schedule)` differ."""
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
