"""manifest.json: what an output folder holds, of what it was made, and the schedule of collectives all ranks follow.

Digests have a fixed length, so the file's size is known before a weight is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.collectives import Collective
from passopt.ir.graph.decoder import degree_of
from passopt.ir.weights.lazy_weight import LazyWeight

MANIFEST_NAME = "manifest.json"
#: Stands for a digest wherever only its length matters.
NO_DIGEST = "0" * 64

_VERSION = 1


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
