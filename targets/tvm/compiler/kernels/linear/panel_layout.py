"""How the weights of a linear in fp32 are stored and cut: panels of some outputs, chunks of inputs, blocks of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from passopt.targets.tvm.compiler.kernels.linear.prefetch import STRIDE
from passopt.targets.tvm.machines import Isa

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
#: Groups of panels come in multiples of this, if there are as many panels: one more for a thread keeps others waiting.
SHARES = 8


@dataclasses.dataclass(frozen=True)
class Panels:
    """How the weights of one linear are stored, and the tile of results that the registers hold."""

    outputs: int
    inputs: int
    dtype: str
    #: The dtype of a scale per output, if the weights are codes.
    scales: str | None
    isa: Isa
    #: Outputs of a panel, a few vectors.
    width: int
    #: Rows of x in a tile.
    rows: int

    @classmethod
    def of(cls, outputs: int, inputs: int, dtype: str, isa: Isa, scales: str | None = None) -> Panels:
        vectors = 4 if isa.registers > 16 else 2
        rows = (isa.registers - 2 * vectors) // vectors
        return cls(outputs, inputs, dtype, scales, isa, vectors * isa.lanes, rows)

    @property
    def count(self) -> int:
        return -(-self.outputs // self.width)

    @property
    def tiles(self) -> tuple[int, ...]:
        """How many rows a tile may have: few rows need not cost as much as many."""
        return (*(rows for rows in (1, 2, 4, 8) if rows < self.rows), self.rows)

    @property
    def vectors(self) -> int:
        return self.width // self.isa.lanes

    @property
    def chunk(self) -> int:
        """Inputs whose weights stay in a cache while the rows of a span pass over them: whole strides of requests.

        A panel's chunk in fp32 and a block of rows fit the L1 cache; or the L2 cache, where a tile of the registers
        takes so long that its weights come from there in time.
        """
        chunks = -(-self.inputs // (1024 if self.isa.registers > 16 else 256))
        return -(-self.inputs // chunks // STRIDE) * STRIDE

    @property
    def blocks_per_span(self) -> int:
        """Blocks of rows that pass over a chunk before the next panel; where chunks are short, as fit the L2 cache."""
        return 256 if self.isa.registers > 16 else 32

    @property
    def groups(self) -> int:
        """Groups of panels that threads share out, where there are many rows: as many for each of 2, 4 or 8 threads."""
        about = 4 if self.isa.registers > 16 else 8
        return min(self.count, -(-self.count // (about * SHARES)) * SHARES)

    def first_of(self, group: Any, groups: Any) -> Any:
        """The first panel of a group, of so many groups."""
        return group * self.count // groups
