"""Define how the weights of a linear layer computed in fp32 are stored, and how the work on them is cut.

Outputs are cut into panels, inputs into chunks, and rows of x into blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels.linear.prefetch import STRIDE
from passopt.targets.tvm.machines import Isa

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
#: The number of groups of panels is a multiple of this if there are enough panels, so that 2, 4 or 8 threads get
#: equally many groups: one more for a thread would keep the others waiting.
SHARES = 8


@dataclasses.dataclass(frozen=True)
class Panels:
    """The layout of the weights of one linear layer, and the size of the tile of results that the registers hold."""

    outputs: int
    inputs: int
    dtype: str
    #: The dtype of the scales, one per output, if the weights are int8 codes.
    scales: str | None
    isa: Isa
    #: The number of outputs of a panel: a few vectors.
    width: int
    #: The number of rows of x in a tile.
    rows: int

    @classmethod
    def of(cls, outputs: int, inputs: int, dtype: str, isa: Isa, scales: str | None = None) -> Panels:
        """Return the layout for a weight [outputs, inputs] on an instruction level."""
        vectors = 4 if isa.registers > 16 else 2
        rows = (isa.registers - 2 * vectors) // vectors
        return cls(outputs, inputs, dtype, scales, isa, vectors * isa.lanes, rows)

    @property
    def count(self) -> int:
        """Return the number of panels; the last one may have fewer outputs."""
        return -(-self.outputs // self.width)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Return the numbers of rows that a tile may have, in ascending order; smaller tiles make few rows cheaper."""
        return (*(rows for rows in (1, 2, 4, 8) if rows < self.rows), self.rows)

    @property
    def vectors(self) -> int:
        """Return the number of vectors in the width of a panel."""
        return self.width // self.isa.lanes

    @property
    def chunk(self) -> int:
        """Return the number of inputs of a chunk, whose weights stay in a cache while all blocks of a span use them.

        A panel's chunk in fp32 fits the L1 cache together with a block of rows. With many registers it fits only the L2
        cache, but a tile then takes long enough for its weights to arrive in time. A chunk is a multiple of STRIDE.
        """
        chunks = -(-self.inputs // (1024 if self.isa.registers > 16 else 256))
        return -(-self.inputs // chunks // STRIDE) * STRIDE

    @property
    def blocks_per_span(self) -> int:
        """Return the number of blocks of rows in a span, which all pass over a chunk before the next panel does.

        Where chunks are short, it is the number of blocks that fit the L2 cache.
        """
        return 256 if self.isa.registers > 16 else 32

    @property
    def groups(self) -> int:
        """Return the number of groups of panels that threads share out when there are many rows.

        Each of 2, 4 or 8 threads gets as many groups as the others, unless there are too few panels.
        """
        about = 4 if self.isa.registers > 16 else 8
        return min(self.count, -(-self.count // (about * SHARES)) * SHARES)

    def first_of(self, group: Any, groups: Any) -> Any:
        """Return the first panel of group number `group` of `groups`."""
        return group * self.count // groups
