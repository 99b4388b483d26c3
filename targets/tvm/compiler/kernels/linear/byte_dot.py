"""The inner product of int8 codes and int8 weights on each level, and the sizes of the tiles around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.machines import Isa


@dataclasses.dataclass(frozen=True)
class ByteKernel:
    """The inner product of a level and the sizes of its tiles.

    `dot(sums, codes, weights)` adds to `lanes` int32 sums the products of `group` neighbouring codes with as many of
    each weight row: codes are a broadcast vector of lanes · group elements of their dtype, weights of `panel_dtype`.
    """

    lanes: int
    group: int
    #: Vectors of outputs per block, and rows whose sums fit the registers together with them.
    tile_vectors: int
    few_rows: int
    #: The same where many rows share a panel.
    tile_rows: int
    #: Inner products of a tile: its weights stay in a cache while all rows of a chunk pass by.
    depth: int
    #: What weights are widened to, once per panel; int8 is used where it lies.
    panel_dtype: str
    dot: Callable[[Any, Any, Any], Any]

    @property
    def paired(self) -> bool:
        """Two groups are multiplied at once, as `byte_pairs` says."""
        return self.panel_dtype == "int16"

    @property
    def columns(self) -> int:
        """Outputs per block of packed weights."""
        return self.lanes * self.tile_vectors


def byte_kernel(isa: Isa) -> ByteKernel:
    if isa.has_byte_dot:
        return ByteKernel(16, 4, 4, 6, 6, 2048, "int8", _dot_vnni)
    if isa.is_gpu:
        return ByteKernel(4, 4, 1, 2, 2, 512, "int8", dot_of_numbers)
    if isa.name == "avx2":
        return ByteKernel(8, 2, 2, 6, 4, 512, "int16", _dot_avx2)
    return ByteKernel(4, 2, 2, 4, 4, 512, "int16", _dot_plain)


def _dot_vnni(sums: Any, codes: Any, weights: Any) -> Any:
    from tvm.script.ir_builder import tirx as T

    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, codes, weights)


def _dot_avx2(sums: Any, codes: Any, weights: Any) -> Any:
    """Products of int16 pairs fill int32 (vpmaddwd): nothing saturates, unlike the byte pairs of vpmaddubsw."""
    from tvm.script.ir_builder import tirx as T

    return sums + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", codes, weights)


def _dot_plain(sums: Any, codes: Any, weights: Any) -> Any:
    """The same in plain operations; LLVM finds SSE2's pmaddwd in them."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=2)


def dot_of_numbers(sums: Any, codes: Any, weights: Any) -> Any:
    """For a GPU, whose lanes come apart into numbers: no word holds several codes."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=4)


def dot_of_operations(sums: Any, codes: Any, weights: Any, lanes: int, group: int) -> Any:
    """The definition of a dot product of groups, in operations that every target has."""
    from tvm import tirx

    dtype = f"int32x{lanes}"
    for part in range(group):
        picked = list(range(part, lanes * group, group))
        left, right = (tirx.Shuffle([vector], picked).astype(dtype) for vector in (codes, weights))
        sums = sums + left * right
    return sums
