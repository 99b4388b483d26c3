"""Define the specs, which say how a value lies on the ranks.

`REPLICATED`: every rank holds all of the value. `Sharded(axis, segments, units)`: `axis` consists of `segments` equal
parts, each of `units` indivisible groups (attention heads, or single channels); of every part, each rank holds an equal
share of the units. `LocalDims(positions)`: a shape vector whose elements at `positions` are lengths on one rank.
`VocabMasked`: rows looked up in a table that is sharded by vocabulary, right only where the rank owns the token.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import TypeAlias

import onnx_ir

from passopt.ir.shapes.dimensions import Dimension

#: Where a sharding starts: at a linear, or at the first input of the KV cache.
Seed: TypeAlias = "onnx_ir.Node | onnx_ir.Value"


@dataclasses.dataclass(frozen=True)
class Replicated:
    """The spec of a value that every rank holds whole; use the constant REPLICATED."""

    def __str__(self) -> str:
        return "replicated"


@dataclasses.dataclass(frozen=True)
class Sharded:
    """The spec of a value of which every rank holds an equal share along one axis.

    Attributes:
        axis: The sharded axis.
        segments: How many equal parts the axis consists of, each of which is sharded by itself. It is a product of
            numbers and symbols, since a reshape may merge the axis with one of symbolic length.
        units: How many indivisible groups, such as heads, each segment consists of.
        seed: The linear or cache at which this sharding starts. If finer units meet coarser ones, as query heads meet
            the key-value head that they share, propagation starts again with coarser units at the finer one's seed.
    """

    axis: int
    segments: Product
    units: int
    seed: Seed | None = dataclasses.field(default=None, compare=False, repr=False)

    def at(self, axis: int) -> Sharded:
        """Return the same sharding along another axis."""
        return dataclasses.replace(self, axis=axis)

    @property
    def fixed_segments(self) -> int:
        """Return the number of segments; raise ValueError if it depends on a symbol, as it never does for a weight."""
        if self.segments.symbols:
            raise ValueError(f"segments {self.segments} are not a number")
        return self.segments.number

    def __str__(self) -> str:
        parts = f", {self.segments} segments" if self.segments != ONE else ""
        return f"sharded along axis {self.axis} ({self.units} units{parts})"


@dataclasses.dataclass(frozen=True)
class LocalDims:
    """The spec of a shape vector whose elements at `positions` are lengths on one rank instead of whole lengths."""

    positions: frozenset[int]

    def __str__(self) -> str:
        return f"a shape with lengths of one rank at {sorted(self.positions)}"


@dataclasses.dataclass(frozen=True)
class VocabMasked:
    """The spec of rows that the value named `ids` selected from a table of `units` rows, sharded by rows."""

    units: int
    ids: str

    def __str__(self) -> str:
        return "rows of a vocab-sharded table"


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a number and symbols, by which lengths such as batch · 6 are compared without knowing the batch."""

    number: int
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(cls, dims: Iterable[Dimension]) -> Product | None:
        """Return the product of dimensions; None if one of them is unknown.

        A symbol such as `6*batch`, as exporters write a merged axis, counts as 6 times `batch`.
        """
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
        """Multiply two products."""
        return Product(self.number * other.number, tuple(sorted((*self.symbols, *other.symbols))))

    def divided_by(self, other: Product) -> Product | None:
        """Return the quotient of two products; None if `other` does not divide this one."""
        mine, others = collections.Counter(self.symbols), collections.Counter(other.symbols)
        if not other.number or self.number % other.number or others - mine:
            return None
        return Product(self.number // other.number, tuple(sorted((mine - others).elements())))

    @property
    def dimension(self) -> int | str:
        """Return the product as a dimension of a shape: a number, or a text such as `6*batch`."""
        factors = [*([str(self.number)] if self.number != 1 else []), *self.symbols]
        return "*".join(factors) if self.symbols else self.number

    def __str__(self) -> str:
        return "·".join([*([str(self.number)] if self.number != 1 or not self.symbols else []), *self.symbols])


def _factors(dim: str) -> list[int | str]:
    """Split a symbol such as `6*batch` into its factors; return any other, such as `past + seq`, as one factor."""
    parts = [part.strip() for part in dim.split("*")]
    if all(part.isdecimal() or part.isidentifier() for part in parts):
        return [int(part) if part.isdecimal() else part for part in parts]
    return [dim]


ONE = Product(1)
REPLICATED = Replicated()
Spec: TypeAlias = "Replicated | Sharded | LocalDims | VocabMasked"


def padded_units(units: int, degree: int) -> int:
    """Round a number of units up to the next multiple of the degree."""
    return math.ceil(units / degree) * degree


def local_length(length: int, spec: Sharded, degree: int) -> int:
    """Return how many elements one rank holds of a sharded axis of `length` elements, padding included."""
    return length // spec.units * padded_units(spec.units, degree) // degree
