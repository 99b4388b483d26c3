"""How a value lies on the ranks.

`REPLICATED`: every rank holds all of it. `Sharded(axis, segments, units)`: `axis` consists of `segments` equal parts,
each of `units` indivisible groups (attention heads, or single channels), of which every rank holds an equal share.
`LocalDims(positions)`: a shape vector whose elements at `positions` are lengths of one rank. `VocabMasked`: rows of a
vocab-sharded table, right only where the rank owns the token.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import TypeAlias

import onnx_ir

from passopt.ir.graph.shapes import Dimension

#: A linear, or the first input of the cache.
Seed: TypeAlias = "onnx_ir.Node | onnx_ir.Value"


@dataclasses.dataclass(frozen=True)
class Replicated:
    def __str__(self) -> str:
        return "replicated"


@dataclasses.dataclass(frozen=True)
class Sharded:
    """`segments` is a product of numbers and symbols, since a reshape may merge the axis with a symbolic one.

    `seed` is the linear or the cache that it began at: where finer units meet coarser ones (query heads
    and the key-value head that they share), the seed of the finer ones starts again with coarser units.
    """

    axis: int
    segments: Product
    units: int
    seed: Seed | None = dataclasses.field(default=None, compare=False, repr=False)

    def at(self, axis: int) -> Sharded:
        return dataclasses.replace(self, axis=axis)

    @property
    def fixed_segments(self) -> int:
        """The number of segments where it must be known, as for a weight."""
        if self.segments.symbols:
            raise ValueError(f"segments {self.segments} are not a number")
        return self.segments.number

    def __str__(self) -> str:
        parts = f", {self.segments} segments" if self.segments != ONE else ""
        return f"sharded along axis {self.axis} ({self.units} units{parts})"


@dataclasses.dataclass(frozen=True)
class LocalDims:
    positions: frozenset[int]

    def __str__(self) -> str:
        return f"a shape with lengths of one rank at {sorted(self.positions)}"


@dataclasses.dataclass(frozen=True)
class VocabMasked:
    """Rows that the value `ids` selected from a table of `units` rows, of which each rank holds a share."""

    units: int
    ids: str

    def __str__(self) -> str:
        return "rows of a vocab-sharded table"


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a number and symbols, to compare lengths such as batch · 6 without knowing the batch."""

    number: int
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(cls, dims: Iterable[Dimension]) -> Product | None:
        """None if a dimension is unknown. `6*batch`, as exporters write a merged axis, is 6 times `batch`."""
        number, symbols = 1, []
        for dim in dims:
            if dim is None:
                return None
            for factor in _factors(dim) if isinstance(dim, str) else [dim]:
                if isinstance(factor, int):
                    number *= factor
                else:
                    symbols.append(factor)
        return cls(number, tuple(sorted(symbols)))

    def times(self, other: Product) -> Product:
        return Product(self.number * other.number, tuple(sorted((*self.symbols, *other.symbols))))

    def divided_by(self, other: Product) -> Product | None:
        """None if `other` does not divide this product."""
        mine, others = collections.Counter(self.symbols), collections.Counter(other.symbols)
        if not other.number or self.number % other.number or others - mine:
            return None
        return Product(self.number // other.number, tuple(sorted((mine - others).elements())))

    @property
    def dimension(self) -> int | str:
        """As a shape holds it."""
        factors = [*([str(self.number)] if self.number != 1 else []), *self.symbols]
        return "*".join(factors) if self.symbols else self.number

    def __str__(self) -> str:
        return "·".join([*([str(self.number)] if self.number != 1 or not self.symbols else []), *self.symbols])


def _factors(dim: str) -> list[int | str]:
    """A symbolic product by factors; any other symbol, such as `past + seq`, as it is."""
    parts = [part.strip() for part in dim.split("*")]
    if all(part.isdecimal() or part.isidentifier() for part in parts):
        return [int(part) if part.isdecimal() else part for part in parts]
    return [dim]


ONE = Product(1)
REPLICATED = Replicated()
Spec: TypeAlias = "Replicated | Sharded | LocalDims | VocabMasked"


def padded_units(units: int, degree: int) -> int:
    """The next multiple of the degree."""
    return math.ceil(units / degree) * degree


def local_length(length: int, spec: Sharded, degree: int) -> int:
    """What one rank holds of an axis of `length` elements, padding included."""
    return length // spec.units * padded_units(spec.units, degree) // degree
