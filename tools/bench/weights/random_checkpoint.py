"""Write random, finite checkpoints with the names and shapes of a published size, as fast as the disk allows."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from passopt.ir.weights.streaming.direct_io import Arena, OutputFile, page_up
from passopt.testing.checkpoints import CheckpointSpec, make_checkpoint

_POOL = 64 << 20
_PIECE = 16 << 20


def make_random(folder: Path, spec: CheckpointSpec, shards: int = 3) -> Path:
    """Write a checkpoint whose bf16 weights are random and as large as trained ones, and return its folder.

    The numbers are normally distributed. The weights lie in `shards` files of about equal size.
    """
    checkpoint = make_checkpoint(folder, spec, trained=False, weights=False)
    shapes = spec.shapes()
    sizes = {name: 2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    total, done, weight_map = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        weight_map[name] = f"model-{min(done * shards // total, shards - 1) + 1:05d}-of-{shards:05d}.safetensors"
        done += size
    pool = _normal_pool()
    for file in sorted(set(weight_map.values())):
        names = [name for name in shapes if weight_map[name] == file]
        _write_shard(checkpoint / file, {name: shapes[name] for name in names}, pool)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def _normal_pool() -> memoryview:
    """Return normally distributed bf16 numbers of standard deviation 0.02, in page-aligned memory.

    It is longer than the pool by one piece, so that a whole piece can be taken from any place of the pool.
    """
    memory = Arena(_POOL + _PIECE).take(_POOL + _PIECE)
    rng = np.random.default_rng(0)
    numbers = np.frombuffer(memory, ml_dtypes.bfloat16)
    numbers[...] = (rng.standard_normal(len(numbers), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    return memory


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: memoryview) -> None:
    entries, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 8)
    size = 8 + len(header) + position
    output = OutputFile(path, page_up(size))
    for index, offset in enumerate(range(0, page_up(size), _PIECE)):
        count = min(_PIECE, page_up(size) - offset)
        start = index * 7919 * 4096 % _POOL
        output.write(offset, pool[start : start + count])
    output.write(0, memoryview(struct.pack("<Q", len(header)) + header))
    output.sync()
    output.close()
    os.truncate(path, size)
