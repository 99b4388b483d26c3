"""Define the dot product of int8 codes and int8 weights for each instruction level, and the tile sizes around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from passopt.targets.tvm.machines import Isa


@dataclasses.dataclass(frozen=True)
class ByteKernel:
    """The dot product of an instruction level and the sizes of its tiles.

    `dot(sums, codes, weights)` adds to each of `lanes` int32 sums (one per output) the products of `group` neighbouring
    codes of a row with the weights of that output. `codes` is a vector of lanes · group elements in which the group is
    repeated in every lane; `weights` is a vector of as many elements of `panel_dtype`.
    """

    lanes: int
    group: int
    #: The number of vectors of outputs per block.
    tile_vectors: int
    #: The number of rows whose sums fit the registers, if there are only few rows.
    few_rows: int
    #: The number of rows whose sums fit the registers, if many rows share a panel.
    tile_rows: int
    #: The number of inputs of a panel: its weights stay in a cache while all rows of a chunk use them.
    depth: int
    #: The dtype to which weights are widened once per panel; int8 weights are used where they lie.
    panel_dtype: str
    dot: Callable[[Any, Any, Any], Any]

    @property
    def paired(self) -> bool:
        """Return whether two groups are multiplied at once, as described in `byte_pairs`."""
        return self.panel_dtype == "int16"

    @property
    def columns(self) -> int:
        """Return the number of outputs per block of packed weights."""
        return self.lanes * self.tile_vectors


def byte_kernel(isa: Isa) -> ByteKernel:
    """Return the dot product and the tile sizes for an instruction level."""
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
    """Add the products of int16 pairs (vpmaddwd), which fit int32; vpmaddubsw on byte pairs would saturate."""
    from tvm.script.ir_builder import tirx as T

    return sums + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", codes, weights)


def _dot_plain(sums: Any, codes: Any, weights: Any) -> Any:
    """Add the products of int16 pairs in plain operations, in which LLVM recognises SSE2's pmaddwd."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=2)


def dot_of_numbers(sums: Any, codes: Any, weights: Any) -> Any:
    """Add the products of groups of four for a GPU, where every lane is a single number instead of part of a word."""
    return dot_of_operations(sums, codes, weights, lanes=4, group=4)


def dot_of_operations(sums: Any, codes: Any, weights: Any, lanes: int, group: int) -> Any:
    """Add the products of groups to `sums`, using only operations that every target has."""
    from tvm import tirx

    dtype = f"int32x{lanes}"
    for part in range(group):
        picked = list(range(part, lanes * group, group))
        left, right = (tirx.Shuffle([vector], picked).astype(dtype) for vector in (codes, weights))
        sums = sums + left * right
    return sums
