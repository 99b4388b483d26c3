"""Weights as lazy expressions over byte ranges of files.

A pass builds expressions; dtype and shape are known at once and no byte moves. `ir.evaluate` turns an expression into
bytes, streamed in row chunks. An expression of the rank (`Shard`) has the shape that one rank holds.
Invariant: `quantize(shard(w))` is built as `shard(quantize(w))`, so scales always come from the full weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError

if TYPE_CHECKING:
    from typing_extensions import Self

DataType = onnx_ir.DataType

#: What a weight of a linear may hold.
FLOATS = frozenset({DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16, DataType.DOUBLE})


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """Identity of a file that weights are read from: a later mismatch is an error, never a silent re-read."""

    path: str
    size: int
    mtime_ns: int
    header_digest: str


@dataclasses.dataclass(frozen=True)
class Expression:
    """A tensor that is not evaluated yet. `shape` is in elements; under `Shard` it is the shape of one rank."""

    dtype: DataType
    shape: tuple[int, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return ()

    @property
    def nbytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def depends_on_rank(self) -> bool:
        return any(operand.depends_on_rank for operand in self.operands)

    def walk(self) -> Iterator[Expression]:
        """The expression and all it is made of, outermost first."""
        yield self
        for operand in self.operands:
            yield from operand.walk()

    def sources(self) -> Iterator[Source]:
        """The named tensors of files that the bytes come from."""
        return (part for part in self.walk() if isinstance(part, Source))

    def text(self) -> str:
        """Canonical text over tensor names: equal texts mean equal values, wherever the files lie."""
        raise NotImplementedError

    def digest(self) -> str:
        """12 hexadecimal digits that stand for the value in golden text."""
        return hashlib.blake2b(self.text().encode(), digest_size=6).hexdigest()

    # Building. Every method returns a new expression and checks its arguments at once.

    def slice(self, axis: int, start: int, stop: int) -> Expression:
        axis = self.axis(axis)
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ModelError(f"slice {start}:{stop} of axis {axis} is outside of shape {list(self.shape)}")
        if (start, stop) == (0, self.shape[axis]):
            return self
        return Slice(self.dtype, _with(self.shape, axis, stop - start), self, axis, start)

    def split(self, widths: Sequence[int], axis: int) -> list[Expression]:
        """Consecutive slices of `widths` elements along `axis`, which they must fill exactly."""
        axis = self.axis(axis)
        if sum(widths) != self.shape[axis]:
            raise ModelError(f"widths {list(widths)} do not fill axis {axis} of shape {list(self.shape)}")
        starts = [sum(widths[:index]) for index in range(len(widths))]
        return [self.slice(axis, start, start + width) for start, width in zip(starts, widths, strict=True)]

    def transpose(self, permutation: Sequence[int] | None = None) -> Expression:
        permutation = tuple(permutation if permutation is not None else reversed(range(len(self.shape))))
        if permutation == tuple(range(len(self.shape))):
            return self
        if isinstance(self, Transpose):
            return self.operand.transpose([self.permutation[axis] for axis in permutation])
        # Shards and padding stay outermost: quantisation looks through them only there.
        if isinstance(self, Shard):
            return self.operand.transpose(permutation).shard(permutation.index(self.along), self.degree, self.segments)
        if isinstance(self, Pad):
            axis = permutation.index(self.along)
            turned = self.operand.transpose(permutation)
            return turned.pad(axis, self.shape[self.along], self.segments, self.value)
        return Transpose(self.dtype, tuple(self.shape[axis] for axis in permutation), self, permutation)

    def cast(self, dtype: DataType) -> Expression:
        return self if dtype == self.dtype else Cast(dtype, self.shape, self)

    def pad(self, axis: int, length: int, segments: int = 1, value: float = 0.0) -> Expression:
        """Extend each of `segments` equal parts of `axis` at its end, until the axis has `length` elements."""
        axis = self.axis(axis)
        if length == self.shape[axis]:
            return self
        if length < self.shape[axis] or length % segments or self.shape[axis] % segments:
            raise ModelError(f"cannot pad axis {axis} of {list(self.shape)} to {length} in {segments} segments")
        return Pad(self.dtype, _with(self.shape, axis, length), self, axis, segments, value)

    def normalize_rows(self, epsilon: float) -> Expression:
        """Each row divided by max(its L2 norm, epsilon), in fp32, back in the weight's own dtype."""
        self._check_matrix("normalize_rows")
        return NormalizeRows(self.dtype, self.shape, self, epsilon)

    def quantize(self, axis: int = 0) -> tuple[Expression, Expression]:
        """Codes (int8, within ±127) and scales (absmax/127, own dtype) per index of `axis`, from the full weight."""
        self._check_matrix("quantize")
        return _quantize(self, self.axis(axis))

    def shard(self, axis: int, degree: int, segments: int = 1) -> Expression:
        """The part of rank r: of each of `segments` equal parts of `axis`, its r-th of `degree` equal pieces."""
        axis = self.axis(axis)
        if self.shape[axis] % (segments * degree):
            raise ModelError(f"axis {axis} of {list(self.shape)} does not divide by {segments} segments × {degree}")
        return Shard(self.dtype, _with(self.shape, axis, self.shape[axis] // degree), self, axis, segments, degree)

    def pack(self, rows: int, columns: int = 1) -> Expression:
        """Blocks that a kernel reads one after the other: [n, k] → [⌈n/rows⌉, ⌈k/columns⌉, rows, columns].

        Element [i, j, r, c] is [i·rows + r, j·columns + c] of the matrix, 0 outside of it.
        """
        if len(self.shape) != 2 or rows < 1 or columns < 1:
            raise ModelError(f"cannot pack {self.dtype.name}{list(self.shape)} into blocks of {rows} × {columns}")
        blocks = (-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        return Pack(self.dtype, (*blocks, rows, columns), self)

    def row_sums(self) -> Expression:
        """Per row of an int8 matrix the sum of its codes, int32: what a zero point of the other operand adds."""
        if len(self.shape) != 2 or self.dtype != DataType.INT8:
            raise ModelError(f"row sums are of an int8 matrix, not {self.dtype.name}{list(self.shape)}")
        return RowSums(DataType.INT32, self.shape[:1], self)

    def _check_matrix(self, operation: str) -> None:
        if len(self.shape) != 2 or self.dtype not in FLOATS:
            raise ModelError(f"{operation} takes a floating matrix, not {self.dtype.name}{list(self.shape)}")

    def axis(self, axis: int) -> int:
        """`axis` counted from the front; negative ones count from the back as in ONNX."""
        if not -len(self.shape) <= axis < len(self.shape):
            raise ModelError(f"axis {axis} is outside of shape {list(self.shape)}")
        return axis % len(self.shape)


def _with(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Source(Expression):
    """A named tensor of a file: `nbytes` bytes from `offset`, little-endian, row-major."""

    name: str
    file: SourceFile
    offset: int

    def text(self) -> str:
        return f"{self.name}:{self.dtype.name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Literal(Expression):
    """A small tensor held in memory, such as ALiBi slopes."""

    data: bytes

    @classmethod
    def of(cls, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Self:
        array = np.asarray(array)
        return cls(DataType.from_numpy(array.dtype), tuple(array.shape), array.tobytes())

    def text(self) -> str:
        content = hashlib.blake2b(self.data, digest_size=8).hexdigest()
        return f"literal({self.dtype.name}{list(self.shape)}, {content})"


@dataclasses.dataclass(frozen=True)
class Fill(Expression):
    """One number everywhere, such as a bias of zeros: as long as it needs to be, and nothing in memory."""

    value: float

    def text(self) -> str:
        return f"fill({self.dtype.name}{list(self.shape)}, {self.value!r})"


@dataclasses.dataclass(frozen=True)
class _Unary(Expression):
    operand: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def with_operand(self, operand: Expression) -> Expression:
        """The same operation on another operand of the same shape and dtype."""
        return dataclasses.replace(self, operand=operand)


@dataclasses.dataclass(frozen=True)
class Slice(_Unary):
    along: int
    start: int

    def text(self) -> str:
        stop = self.start + self.shape[self.along]
        return f"slice({self.operand.text()}, axis={self.along}, {self.start}:{stop})"


@dataclasses.dataclass(frozen=True)
class Concat(Expression):
    parts: tuple[Expression, ...]
    along: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def text(self) -> str:
        return f"concat({', '.join(part.text() for part in self.parts)}, axis={self.along})"


@dataclasses.dataclass(frozen=True)
class Transpose(_Unary):
    permutation: tuple[int, ...]

    def text(self) -> str:
        return f"transpose({self.operand.text()}, {list(self.permutation)})"


@dataclasses.dataclass(frozen=True)
class Cast(_Unary):
    def text(self) -> str:
        return f"cast({self.operand.text()}, {self.dtype.name})"


@dataclasses.dataclass(frozen=True)
class Pad(_Unary):
    along: int
    segments: int
    value: float

    def text(self) -> str:
        return (
            f"pad({self.operand.text()}, axis={self.along}, length={self.shape[self.along]}, "
            f"segments={self.segments}, value={self.value!r})"
        )


@dataclasses.dataclass(frozen=True)
class NormalizeRows(_Unary):
    epsilon: float

    def text(self) -> str:
        return f"normalize_rows({self.operand.text()}, epsilon={self.epsilon!r})"


@dataclasses.dataclass(frozen=True)
class QuantizeCodes(_Unary):
    along: int

    def text(self) -> str:
        return f"quantize_codes({self.operand.text()}, axis={self.along})"


@dataclasses.dataclass(frozen=True)
class QuantizeScales(_Unary):
    along: int

    def text(self) -> str:
        return f"quantize_scales({self.operand.text()}, axis={self.along})"


@dataclasses.dataclass(frozen=True)
class Pack(_Unary):
    def text(self) -> str:
        rows, columns = self.shape[2:]
        return f"pack({self.operand.text()}, rows={rows}, columns={columns})"


@dataclasses.dataclass(frozen=True)
class RowSums(_Unary):
    def text(self) -> str:
        return f"row_sums({self.operand.text()})"


@dataclasses.dataclass(frozen=True)
class Shard(_Unary):
    along: int
    segments: int
    degree: int

    @property
    def depends_on_rank(self) -> bool:
        return True

    def text(self) -> str:
        return f"shard({self.operand.text()}, axis={self.along}, degree={self.degree}, segments={self.segments})"


def concat(parts: Iterable[Expression], axis: int) -> Expression:
    """Join `parts` of one dtype along `axis`; their other axes must agree."""
    parts = tuple(parts)
    if not parts:
        raise ModelError("concat needs at least one part")
    axis = parts[0].axis(axis)
    rests = {(part.dtype, _with(part.shape, axis, 0)) for part in parts}
    if len(rests) != 1:
        raise ModelError(f"concat of {[(part.dtype.name, list(part.shape)) for part in parts]} along {axis}")
    if len(parts) == 1:
        return parts[0]
    length = sum(part.shape[axis] for part in parts)
    return Concat(parts[0].dtype, _with(parts[0].shape, axis, length), parts, axis)


#: A row of zeros has no scale of its own; any positive number dequantises its zero codes to zero.
SCALE_OF_ZEROS = 1.0


def _quantize(weight: Expression, axis: int) -> tuple[Expression, Expression]:
    """Look through `Shard` and zero `Pad` only: absmax over part of a row would be another number."""
    if isinstance(weight, Shard):
        codes, scales = _quantize(weight.operand, axis)
        codes = codes.shard(weight.along, weight.degree, weight.segments)
        return codes, scales.shard(0, weight.degree, weight.segments) if weight.along == axis else scales
    if isinstance(weight, Pad) and weight.value == 0:
        codes, scales = _quantize(weight.operand, axis)
        length = weight.shape[weight.along]
        codes = codes.pad(weight.along, length, weight.segments)
        return codes, scales.pad(0, length, weight.segments, SCALE_OF_ZEROS) if weight.along == axis else scales
    codes = QuantizeCodes(DataType.INT8, weight.shape, weight, axis)
    return codes, QuantizeScales(weight.dtype, (weight.shape[axis],), weight, axis)
