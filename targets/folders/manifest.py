"""Define and read manifest.json, which describes an output folder.

It says what the folder holds, what it was made of, and in which order all ranks call collectives. Digests have a fixed
length, so the size of the file is known before any weight is read.
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
from passopt.ir.json_text import read_json
from passopt.ir.weights.lazy_weight import LazyWeight

MANIFEST_NAME = "manifest.json"
#: A placeholder that is as long as a digest, for computing the size of a manifest in advance.
NO_DIGEST = "0" * 64

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RankFiles:
    """The folder of one rank and the blake3 digests (in hexadecimal) of what it holds.

    Attributes:
        directory: The folder, relative to the output folder; `.` without tensor parallelism.
        model: The digest of model.onnx.
        root: The digest of all tensors together (see `root_digest`).
        tensors: The digest of each tensor, by name.
    """

    directory: str
    model: str
    root: str
    tensors: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        version: The version of passopt that wrote the output.
        pipeline: The passes that were run.
        degree: The number of ranks; 1 without tensor parallelism.
        source: What the model was made of, as plain JSON.
        collectives: The collectives in the order in which every rank calls them.
        replicated: The names of the weights that are the same on every rank; empty at degree 1.
        sharded: The names of the weights of which every rank holds a shard; empty at degree 1.
        ranks: The files of each rank; empty for an output that only refers to its weights.
        root: The digest over all ranks; None for an output that only refers to its weights.
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
        """Return the manifest as the text of manifest.json."""
        return json.dumps({"manifest": _VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest in `directory`; raise ModelError if it is missing, damaged or of another version."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise ModelError(f"{directory}: has no {MANIFEST_NAME}; name an output folder of passopt")
    try:
        body = read_json(path)
        version = body.pop("manifest")
        if version != _VERSION:
            raise ModelError(
                f"{path}: manifest version {version}, this passopt reads {_VERSION}. Write the output again."
            )
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
    """Return the folder of each rank, relative to the output folder: `.` at degree 1, else `rank0`, `rank1` etc."""
    return ["."] if degree == 1 else [f"rank{rank}" for rank in range(degree)]


def refuse_single_rank(model: onnx_ir.Model) -> None:
    """Raise ModelError if `model` was loaded from the files of one rank of several.

    Such files do not hold the other ranks' weights, so they are not a whole model. An SPMD graph, whose weights are
    still expressions for all ranks, is accepted.
    """
    degree = degree_of(model)
    lazy = [
        value.const_value for value in model.graph.initializers.values() if isinstance(value.const_value, LazyWeight)
    ]
    if degree > 1 and not any(tensor.expression.depends_on_rank for tensor in lazy):
        raise ModelError(f"these are the weights of one rank of {degree}; name the folder that holds all of them")
