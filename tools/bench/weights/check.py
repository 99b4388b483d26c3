"""Compare samples of a sharded int8 output, bit for bit, with what numpy computes from the checkpoint.

No code of passopt takes part: the safetensors library reads the files, and the arithmetic is written out here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from safetensors import safe_open

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Rows of each sample: comparing whole tensors of gigabytes would take as long as the run itself.
ROWS = 64


def check_samples(checkpoint: Path, ranks: Path, degree: int) -> int:
    """Compare the first, a middle and the last layer, the embedding and the head on every rank.

    Args:
        checkpoint: The folder of the checkpoint.
        ranks: The folder that holds `rank0`, `rank1` and so on.
        degree: The number of ranks.

    Returns:
        How many samples were compared.

    Raises:
        SystemExit: A sample differs.
    """
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((checkpoint / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    checked = 0
    for rank in range(degree):
        with safe_open(ranks / f"rank{rank}" / "weights.safetensors", "np") as written:
            compare = _Comparison(checkpoint, index, written, rank, degree)
            compare.head("lm_head.weight", "lm_head.weight.normalized")
            compare.embedding("model.embed_tokens.weight")
            for layer in (0, layers // 2, layers - 1):
                prefix = f"model.layers.{layer}"
                for part, name in enumerate("qkv"):
                    compare.rows(f"{prefix}.self_attn.W_pack.weight", f".{name}", part * hidden, hidden)
                for name in ("mlp.gate_proj", "mlp.up_proj"):
                    compare.rows(f"{prefix}.{name}.weight", "", 0, config["intermediate_size"])
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    compare.columns(f"{prefix}.{name}.weight")
            checked += compare.checked
    return checked


def quantized(wide: Array) -> tuple[Array, Array]:
    """Return int8 codes and fp16 scales of fp16 rows.

    Rows are divided by their scale as it is stored, rounded to fp16; ties go to the even code.
    """
    scales = (np.abs(wide).max(axis=1).astype(np.float32) / np.float32(127)).astype(np.float16)
    codes = np.rint(wide.astype(np.float32) / scales.astype(np.float32)[:, None])
    return np.clip(codes, -127, 127).astype(np.int8), scales


class _Comparison:
    """Compare one rank's file with the checkpoint, and count the samples."""

    def __init__(self, checkpoint: Path, index: dict[str, str], written: Any, rank: int, degree: int) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._written = written
        self._rank = rank
        self._degree = degree
        self.checked = 0

    def rows(self, name: str, suffix: str, first: int, count: int) -> None:
        """Compare a weight whose output channels are sharded, at the first and the last `ROWS` of the rank's share.

        Rows `first` to `first + count` of the checkpoint's weight are shared out among the ranks.
        """
        local = count // self._degree
        start = first + self._rank * local
        for at in (0, local - ROWS):
            codes, scales = quantized(self._source(name, start + at))
            self._equal(f"{name}{suffix}.codes", at, codes)
            self._equal(f"{name}{suffix}.scales", at, scales)

    def columns(self, name: str) -> None:
        """Compare a weight whose input channels are sharded: scales of whole rows, codes of the rank's columns."""
        codes, scales = quantized(self._source(name, 0))
        local = codes.shape[1] // self._degree
        self._equal(f"{name}.codes", 0, codes[:, self._rank * local : (self._rank + 1) * local])
        self._equal(f"{name}.scales", 0, scales)

    def embedding(self, name: str) -> None:
        """Compare the embedding, which by its shape is replicated or holds the rank's share of the vocabulary."""
        rows = self._written.get_slice(name).get_shape()[0]
        whole = self._shape(name)[0]
        self._equal(name, 0, self._source(name, self._rank * rows if rows < whole else 0))

    def head(self, name: str, output: str) -> None:
        """Compare the head: the rank's share of the vocabulary, with every row divided by its length."""
        rows = self._written.get_slice(output).get_shape()[0]
        wide = self._source(name, self._rank * rows).astype(np.float32)
        length = np.sqrt((wide.astype(np.float64) ** 2).sum(axis=1)).astype(np.float32)
        self._equal(output, 0, (wide / length[:, None]).astype(np.float16))

    def _shape(self, name: str) -> list[int]:
        with safe_open(self._checkpoint / self._index[name], "np") as file:
            return list(file.get_slice(name).get_shape())

    def _source(self, name: str, start: int) -> Array:
        """Return `ROWS` bf16 rows from row `start` on as fp16.

        numpy has no bf16, so that safetensors cannot give them; the bytes are read from where the header says they are.
        """
        path = self._checkpoint / self._index[name]
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))[name]
            width = entry["shape"][1]
            file.seek(8 + size + entry["data_offsets"][0] + start * width * 2)
            data = file.read(ROWS * width * 2)
        return np.frombuffer(data, ml_dtypes.bfloat16).reshape(-1, width).astype(np.float16)

    def _equal(self, name: str, start: int, expected: Array) -> None:
        found = self._written.get_slice(name)[start : start + len(expected)]
        if found.dtype != expected.dtype or found.tobytes() != np.ascontiguousarray(expected).tobytes():
            raise SystemExit(
                f"bench-scale: rank {self._rank}, {name}, from row {start}: differs from what numpy computes"
            )
        self.checked += 1
