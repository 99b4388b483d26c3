"""Define tiles of int32 sums in registers, and the codes and packed weights whose products they sum."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels.emit import local, prefetch_ahead, span
from passopt.targets.tvm.compiler.kernels.linear.byte_dot import ByteKernel, dot_of_numbers
from passopt.targets.tvm.compiler.kernels.linear.prefetch import STRIDE, NextPanel
from passopt.targets.tvm.compiler.kernels.quantize_rows import CodesLayout


class Tile:
    """The int32 sums of `count` rows × the vectors of a block, which start at zero.

    Each vector has a buffer of its own, so that LLVM keeps each in a register.
    """

    def __init__(self, kernel: ByteKernel, count: int) -> None:
        from tvm.script.ir_builder import tirx as T

        self.kernel, self.count = kernel, count
        self._at = span(0, kernel.lanes)
        self._sums = [[local(kernel.lanes, dtype="int32") for _ in range(kernel.tile_vectors)] for _ in range(count)]
        for row in self._sums:
            for register in row:
                T.buffer_store(register, T.broadcast(T.int32(0), kernel.lanes), [self._at])

    def add(self, row: int, vector: int, codes: Any, weights: Any) -> None:
        """Add the dot products of `codes` and `weights` to one register."""
        from tvm.script.ir_builder import tirx as T

        register = self._sums[row][vector]
        T.buffer_store(register, self.kernel.dot(register[self._at], codes, weights), [self._at])

    def values(self, row: int) -> list[Any]:
        """Return the sums of a row, one vector after the other."""
        return [register[self._at] for register in self._sums[row]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel: the weights of one block of columns (outputs) for `count` groups of inputs, from group `first` on.

    `block` is the number of the block within the chunk, `source` its number among all blocks, and `step` the number of
    the panel within its block.
    """

    step: Any
    block: Any
    source: Any
    first: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Operands:
    """The operands of a linear layer with K = k inputs.

    `codes` is [rows, width] as `layout` says, and `packed` are the weights [blocks, groups, columns, group].
    """

    k: int
    layout: CodesLayout
    kernel: ByteKernel
    rows: Any
    codes: Any
    packed: Any
    #: The packed weights as a flat buffer, in the order of memory.
    flat: Any

    @property
    def groups(self) -> int:
        """Return the number of groups of inputs, padding included."""
        return whole_groups(self.k) // self.kernel.group

    @property
    def panel_groups(self) -> int:
        """Return the number of groups of a panel.

        Panels are as equal as possible and have about `ByteKernel.depth` inputs at most. The number is a multiple of
        STRIDE, and so of two, as pairs need it.
        """
        steps = -(-self.groups * self.kernel.group // self.kernel.depth)
        return -(-self.groups // steps // STRIDE) * STRIDE

    def panel_from(self, group: Any, count: Any) -> NextPanel:
        """Return the panel to prefetch: `count` groups from number `group` on, counted over all blocks."""
        width = self.kernel.columns * self.kernel.group
        return NextPanel(self.flat, group * width, count, width, item_bytes=1)

    def prefetch_ahead(self, block: Any, group: Any) -> None:
        """Prefetch the weights that are needed a little after group `group` of `block`, when there are few rows."""
        width = self.kernel.columns * self.kernel.group
        prefetch_ahead(self.flat, (block * self.groups + group) * width, width, item_bytes=1)

    def weights(self, block: Any, group: Any, vector: int) -> Any:
        """Return the weights of `lanes` outputs for one group, in the dtype that the dot product takes."""
        kernel = self.kernel
        width = kernel.lanes * kernel.group
        read = self.packed.vload([block, group, vector * kernel.lanes, 0], f"int8x{width}")
        return read if kernel.panel_dtype == "int8" else read.astype(f"{kernel.panel_dtype}x{width}")

    def broadcast(self, row: Any, group: Any) -> Any:
        """Return one group of a row's codes, repeated in all lanes."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        kernel, dtype = self.kernel, self.layout.dtype
        read = self.codes.vload([row, group * kernel.group], f"{dtype}x{kernel.group}")
        if kernel.dot is dot_of_numbers:
            return tirx.Shuffle([read] * kernel.lanes, list(range(kernel.group * kernel.lanes)))
        word = T.broadcast(T.reinterpret("int32", read), kernel.lanes)
        return T.bind(T.reinterpret(f"{dtype}x{kernel.lanes * kernel.group}", word))

    def multiply(self, tile: Tile, rows: list[Any], block: Any, group: Any) -> None:
        """Add the products of one group of every row's codes with every vector of weights to the tile."""
        from tvm.script.ir_builder import tirx as T

        weights = [T.bind(self.weights(block, group, vector)) for vector in range(self.kernel.tile_vectors)]
        for row, at in enumerate(rows):
            codes = self.broadcast(at, group)
            for vector, weight in enumerate(weights):
                tile.add(row, vector, codes, weight)


def whole_groups(k: int) -> int:
    """Return K rounded up to whole groups of four bytes, which are also whole pairs of groups of two int16."""
    return -(-k // 4) * 4
