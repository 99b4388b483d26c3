"""Define the expressions whose values are in no file: small tensors in memory, and one number in every element."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from passopt.ir.weights.expressions import DataType, Expression

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class Literal(Expression):
    """A small tensor held in memory, such as ALiBi slopes."""

    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Self:
        """Return a literal that holds a copy of the array."""
        array = np.asarray(array)
        return cls(DataType.from_numpy(array.dtype), tuple(array.shape), array.tobytes())

    def text(self) -> str:
        content = hashlib.blake2b(self.data, digest_size=8).hexdigest()
        return f"literal({self.dtype.name}{list(self.shape)}, {content})"


@dataclasses.dataclass(frozen=True)
class Fill(Expression):
    """One number in every element, such as a bias of zeros; it takes no memory, whatever its shape."""

    value: float

    def text(self) -> str:
        return f"fill({self.dtype.name}{list(self.shape)}, {self.value!r})"
