"""Write small layers of Baichuan2, and apply `tp` and `int8` to them, to test the code that writes weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from passopt.ir.weights.expressions import DataType, Expression
from passopt.ir.weights.sources import safetensors_sources
from passopt.ir.weights.streaming.output_groups import WeightFile

_HIDDEN, _WIDE, _VOCAB = 40, 72, 101
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed": (_VOCAB, _HIDDEN),
    "pack": (3 * _HIDDEN, _HIDDEN),
    "o_proj": (_HIDDEN, _HIDDEN),
    "down": (_HIDDEN, _WIDE),
    "norm": (_HIDDEN,),
    "head": (_VOCAB, _HIDDEN),
}


def write_layers(path: Path, seed: int = 0, copies: int = 1) -> dict[str, Expression]:
    """Write a bf16 checkpoint with `copies` copies of every tensor, and return its weights as fp16."""
    rng = np.random.default_rng(seed)
    shapes = {_copy(name, copy): shape for copy in range(copies) for name, shape in SHAPES.items()}
    save_file(
        {name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()},
        path,
    )
    return read_layers(path)


def read_layers(path: Path) -> dict[str, Expression]:
    """Return the weights of such a checkpoint as fp16."""
    return {name: source.cast(DataType.FLOAT16) for name, source in safetensors_sources(path).items()}


def _copy(name: str, copy: int) -> str:
    return f"{name}{copy or ''}"


def sharded(weights: Mapping[str, Expression], degree: int) -> dict[str, Expression]:
    """Return each kind of weight that sharding and int8 write.

    There are replicated, padded and normalised weights, shards of rows and of columns, codes and scales.
    """
    found = {"embed": weights["embed"], "norm": weights["norm"]}
    rows = weights["head"].shape[0]
    found["head"] = weights["head"].normalize_rows(1e-4).pad(0, -(-rows // degree) * degree).shard(0, degree)
    for name, part in zip("qkv", weights["pack"].split([weights["pack"].shape[0] // 3] * 3, 0), strict=True):
        found[f"{name}.codes"], found[f"{name}.scales"] = part.shard(0, degree).quantize()
    for name in ("o_proj", "down"):
        found[f"{name}.codes"], found[f"{name}.scales"] = weights[name].shard(1, degree).quantize()
    return found


def all_sharded(weights: Mapping[str, Expression], degree: int) -> dict[str, Expression]:
    """Return the weights that `sharded` makes of every copy."""
    found: dict[str, Expression] = {}
    for copy in range(len(weights) // len(SHAPES)):
        own = {name: weights[_copy(name, copy)] for name in SHAPES}
        found |= {f"{copy}.{name}": weight for name, weight in sharded(own, degree).items()}
    return found


def rank_files(folder: Path, weights: Mapping[str, Expression], degree: int) -> list[WeightFile]:
    """Make `folder`, and return a weight file per rank in it."""
    folder.mkdir(parents=True, exist_ok=True)
    return [WeightFile(folder / str(rank), weights, rank) for rank in range(degree)]


def contents(files: Sequence[WeightFile]) -> list[bytes]:
    """Return the bytes of each file."""
    return [file.path.read_bytes() for file in files]
