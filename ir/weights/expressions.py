"""Describe weights as lazy expressions over byte ranges of files.

A pass builds expressions: dtype and shape are known at once, and no byte is read. `ir.weights.evaluator` turns an
expression into values, in chunks of rows. An expression that depends on the rank (`Shard`) has the shape that one rank
holds. Invariant: `quantize(shard(w))` is built as `shard(quantize(w))`, so scales always come from the full weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence

import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.errors import ModelError
from passopt.ir.weights.lengths import axis_of, with_length
from passopt.ir.weights.source_file import SourceFile

DataType = onnx_ir.DataType


@dataclasses.dataclass(frozen=True)
class Expression:
    """A tensor that is not evaluated yet.

    The methods below the properties build new expressions. They check their arguments at once; no byte is read.

    Attributes:
        dtype: The dtype of the elements.
        shape: The shape in elements; under `Shard` it is the shape that one rank holds.

    Example:
        ::

            weight = op.weight(w)  # the packed projection of q, k and v: [12288, 4096]
            q, k, v = weight.split([4096, 4096, 4096], axis=0)
            codes, scales = q.shard(axis=0, degree=2).quantize()
    """

    dtype: DataType
    shape: tuple[int, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        """Return the expressions that this one is computed from."""
        return ()

    @property
    def nbytes(self) -> int:
        """Return the size of the evaluated tensor in bytes."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def depends_on_rank(self) -> bool:
        """Return whether ranks hold different values, because there is a `Shard` inside."""
        return any(operand.depends_on_rank for operand in self.operands)

    def walk(self) -> Iterator[Expression]:
        """Yield the expression and everything it is made of, outermost first."""
        yield self
        for operand in self.operands:
            yield from operand.walk()

    def sources(self) -> Iterator[Source]:
        """Yield the tensors in files that the values come from."""
        return (part for part in self.walk() if isinstance(part, Source))

    def text(self) -> str:
        """Return canonical text over tensor names: equal texts mean equal values, wherever the files are."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return 12 hexadecimal digits that stand for the value in golden text."""
        return hashlib.blake2b(self.text().encode(), digest_size=6).hexdigest()

    def slice(self, axis: int, start: int, stop: int) -> Expression:
        """Return the elements from `start` to before `stop` along an axis.

        Args:
            axis: The axis; negative axes count from the back.
            start: The first element.
            stop: The element behind the last one.

        Raises:
            ModelError: If the range is outside of the shape.
        """
        axis = self.axis(axis)
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ModelError(f"slice {start}:{stop} of axis {axis} is outside of shape {list(self.shape)}")
        if (start, stop) == (0, self.shape[axis]):
            return self
        return Slice(self.dtype, with_length(self.shape, axis, stop - start), self, axis, start)

    def split(self, widths: Sequence[int], axis: int) -> list[Expression]:
        """Return consecutive slices along an axis.

        Args:
            widths: The elements of each slice; together they are as many as the axis has.
            axis: The axis; negative axes count from the back.

        Raises:
            ModelError: If the widths do not fill the axis exactly.
        """
        axis = self.axis(axis)
        if sum(widths) != self.shape[axis]:
            raise ModelError(f"widths {list(widths)} do not fill axis {axis} of shape {list(self.shape)}")
        starts = [sum(widths[:index]) for index in range(len(widths))]
        return [self.slice(axis, start, start + width) for start, width in zip(starts, widths, strict=True)]

    def transpose(self, permutation: Sequence[int] | None = None) -> Expression:
        """Return the tensor with its axes in another order.

        Args:
            permutation: The old axes in their new order; None reverses them.
        """
        permutation = tuple(permutation if permutation is not None else reversed(range(len(self.shape))))
        if permutation == tuple(range(len(self.shape))):
            return self
        if isinstance(self, Transpose):
            return self.operand.transpose([self.permutation[axis] for axis in permutation])
        # Keep shards and padding outermost, because quantisation looks through them only there.
        if isinstance(self, Shard):
            return self.operand.transpose(permutation).shard(permutation.index(self.along), self.degree, self.segments)
        if isinstance(self, Pad):
            axis = permutation.index(self.along)
            turned = self.operand.transpose(permutation)
            return turned.pad(axis, self.shape[self.along], self.segments, self.value)
        return Transpose(self.dtype, tuple(self.shape[axis] for axis in permutation), self, permutation)

    def cast(self, dtype: DataType) -> Expression:
        """Return the values rounded to another dtype.

        Args:
            dtype: The new dtype.
        """
        return self if dtype == self.dtype else Cast(dtype, self.shape, self)

    def pad(self, axis: int, length: int, segments: int = 1, value: float = 0.0) -> Expression:
        """Return the tensor with an axis made longer, at the end of each of its equal segments.

        Args:
            axis: The axis; negative axes count from the back.
            length: The elements of the axis afterwards, over all segments.
            segments: The equal parts of the axis, such as 3 for a packed q, k and v.
            value: What the new elements hold.

        Raises:
            ModelError: If the axis cannot be made so long in so many segments.
        """
        axis = self.axis(axis)
        if length == self.shape[axis]:
            return self
        if length < self.shape[axis] or length % segments or self.shape[axis] % segments:
            raise ModelError(f"cannot pad axis {axis} of {list(self.shape)} to {length} in {segments} segments")
        return Pad(self.dtype, with_length(self.shape, axis, length), self, axis, segments, value)

    def normalize_rows(self, epsilon: float) -> Expression:
        """Return a matrix with each row divided by max(its L2 norm, epsilon), in fp32, rounded to its own dtype.

        Args:
            epsilon: The least divisor.

        Raises:
            ModelError: If this is not a matrix of floats.
        """
        self._check_matrix("normalize_rows")
        return NormalizeRows(self.dtype, self.shape, self, epsilon)

    def quantize(self, axis: int = 0) -> tuple[Expression, Expression]:
        """Return int8 codes within ±127 and scales (absmax/127, in the weight's dtype) per index of `axis`.

        The scales are computed from the full weight, even if this expression is a shard of it.

        Args:
            axis: The axis of which every index has its own scale.

        Raises:
            ModelError: If this is not a matrix of floats.
        """
        self._check_matrix("quantize")
        return _quantize(self, self.axis(axis))

    def shard(self, axis: int, degree: int, segments: int = 1) -> Expression:
        """Return the share of rank r: the r-th equal piece of each segment of an axis.

        Args:
            axis: The axis; negative axes count from the back.
            degree: The number of ranks.
            segments: The equal parts of the axis that are shared out one by one, such as 3 for a packed q, k and v.

        Raises:
            ModelError: If the axis does not divide by `degree` and `segments`.
        """
        axis = self.axis(axis)
        if self.shape[axis] % (segments * degree):
            raise ModelError(f"axis {axis} of {list(self.shape)} does not divide by {segments} segments × {degree}")
        return Shard(
            self.dtype, with_length(self.shape, axis, self.shape[axis] // degree), self, axis, segments, degree
        )

    def pack(self, rows: int, columns: int = 1) -> Expression:
        """Return a matrix as blocks that a kernel reads one after the other.

        The shape `[n, k]` becomes `[⌈n/rows⌉, ⌈k/columns⌉, rows, columns]`. Element [i, j, r, c] is element
        [i·rows + r, j·columns + c] of the matrix, or 0 outside of it.

        Args:
            rows: The rows of a block.
            columns: The columns of a block.

        Raises:
            ModelError: If this is no matrix, or a block would be empty.
        """
        if len(self.shape) != 2 or rows < 1 or columns < 1:
            raise ModelError(f"cannot pack {self.dtype.name}{list(self.shape)} into blocks of {rows} × {columns}")
        blocks = (-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        return Pack(self.dtype, (*blocks, rows, columns), self)

    def row_sums(self) -> Expression:
        """Return the sum of codes in each row of an int8 matrix, as int32 `[n]`.

        A kernel needs the sums if the other operand has a zero point.

        Raises:
            ModelError: If this is not a matrix of int8.
        """
        if len(self.shape) != 2 or self.dtype != DataType.INT8:
            raise ModelError(f"row sums are of an int8 matrix, not {self.dtype.name}{list(self.shape)}")
        return RowSums(DataType.INT32, self.shape[:1], self)

    def _check_matrix(self, operation: str) -> None:
        if len(self.shape) != 2 or self.dtype not in FLOATS:
            raise ModelError(f"{operation} takes a floating matrix, not {self.dtype.name}{list(self.shape)}")

    def axis(self, axis: int) -> int:
        """Return an axis counted from the front; a negative axis counts from the back, as in ONNX.

        Args:
            axis: The axis.

        Raises:
            ModelError: If the shape has no such axis.
        """
        return axis_of(self.shape, axis)


@dataclasses.dataclass(frozen=True)
class Source(Expression):
    """A named tensor in a file: `nbytes` bytes from byte `offset` on, little-endian, row-major."""

    name: str
    file: SourceFile
    offset: int

    def text(self) -> str:
        return f"{self.name}:{self.dtype.name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class _Unary(Expression):
    operand: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def with_operand(self, operand: Expression) -> Expression:
        """Return the same operation on another operand of the same shape and dtype."""
        return dataclasses.replace(self, operand=operand)


@dataclasses.dataclass(frozen=True)
class Slice(_Unary):
    """The elements of `operand` along the axis `along`, from `start` on."""

    along: int
    start: int

    def text(self) -> str:
        stop = self.start + self.shape[self.along]
        return f"slice({self.operand.text()}, axis={self.along}, {self.start}:{stop})"


@dataclasses.dataclass(frozen=True)
class Transpose(_Unary):
    """The `operand` with its axes in the order of `permutation`."""

    permutation: tuple[int, ...]

    def text(self) -> str:
        return f"transpose({self.operand.text()}, {list(self.permutation)})"


@dataclasses.dataclass(frozen=True)
class Cast(_Unary):
    """The `operand`, rounded to `dtype`."""

    def text(self) -> str:
        return f"cast({self.operand.text()}, {self.dtype.name})"


@dataclasses.dataclass(frozen=True)
class Pad(_Unary):
    """The `operand`, each of its `segments` equal parts along the axis `along` extended at its end by `value`."""

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
    """The rows of `operand`, each divided by max(its L2 norm, epsilon)."""

    epsilon: float

    def text(self) -> str:
        return f"normalize_rows({self.operand.text()}, epsilon={self.epsilon!r})"


@dataclasses.dataclass(frozen=True)
class QuantizeCodes(_Unary):
    """The int8 codes of `operand`, with one scale per index of the axis `along`."""

    along: int

    def text(self) -> str:
        return f"quantize_codes({self.operand.text()}, axis={self.along})"


@dataclasses.dataclass(frozen=True)
class QuantizeScales(_Unary):
    """The scales of `operand`: absmax/127 per index of the axis `along`."""

    along: int

    def text(self) -> str:
        return f"quantize_scales({self.operand.text()}, axis={self.along})"


@dataclasses.dataclass(frozen=True)
class Pack(_Unary):
    """The matrix `operand` as blocks `[row blocks, column blocks, rows, columns]`."""

    def text(self) -> str:
        rows, columns = self.shape[2:]
        return f"pack({self.operand.text()}, rows={rows}, columns={columns})"


@dataclasses.dataclass(frozen=True)
class RowSums(_Unary):
    """The sum of each row of the int8 matrix `operand`, as int32."""

    def text(self) -> str:
        return f"row_sums({self.operand.text()})"


@dataclasses.dataclass(frozen=True)
class Shard(_Unary):
    """The share of rank r: the r-th of `degree` equal pieces of each of `segments` equal parts of the axis `along`."""

    along: int
    segments: int
    degree: int

    @property
    def depends_on_rank(self) -> bool:
        return True

    def text(self) -> str:
        return f"shard({self.operand.text()}, axis={self.along}, degree={self.degree}, segments={self.segments})"


#: The scale of a row of zeros, which has none of its own: any positive number dequantises its zero codes to zero.
SCALE_OF_ZEROS = 1.0


def _quantize(weight: Expression, axis: int) -> tuple[Expression, Expression]:
    """Quantise below any `Shard` and zero `Pad`, and repeat these outside, since part of a row has another absmax."""
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
