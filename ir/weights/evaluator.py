"""Turn weight expressions into values, in chunks of rows, so that memory does not grow with the model.

An expression is read box by box, where a box is a range (start, stop) per axis. Every operation maps a box of its
result to boxes of its operands.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import blake3
import numpy as np
import onnx

from passopt.ir.errors import ModelError
from passopt.ir.weights import expressions as ex
from passopt.ir.weights import group_math
from passopt.ir.weights.concat import Concat
from passopt.ir.weights.dequantized import Dequantized
from passopt.ir.weights.groups import FOUR_BITS
from passopt.ir.weights.literals import Fill, Literal
from passopt.ir.weights.packed_codes import PackCodes, UnpackCodes, codes_per_word
from passopt.ir.weights.rotation import Rotate, rotate_columns, rotate_rows, rotation_of
from passopt.ir.weights.row_math import (
    Array,
    absmax,
    cast_rows,
    normalize_rows,
    pack_rows,
    quantize_values,
    scales_of,
    unpack_rows,
)
from passopt.ir.weights.scaling import ScaleAlong
from passopt.ir.weights.sources import check_unchanged

Box: TypeAlias = tuple[tuple[int, int], ...]

#: The bytes of a chunk as an fp32 working copy. A few chunks are alive at once, so peak memory is a multiple of this.
CHUNK_BYTES = 32 << 20
#: Unsigned integer types by their size in bytes.
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass
class Report:
    """Counts, per tensor, the finite values that became infinite when they were cast to fp16."""

    overflows: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, cast: ex.Cast, lost: int) -> None:
        """Add `lost` overflows of a cast to the count of its tensors; only casts to fp16 are counted."""
        if lost and cast.dtype == ex.DataType.FLOAT16:
            name = ", ".join(source.name for source in cast.sources())
            self.overflows[name] = self.overflows.get(name, 0) + lost


class Evaluator:
    """Computes expressions for one rank. Files stay open until `close`; use it as a context manager.

    Example:
        with Evaluator(rank=1) as evaluator:
            values = evaluator.array(weight.shard(axis=0, degree=2))
    """

    def __init__(self, rank: int = 0, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.rank = rank
        self.report = Report()
        self._chunk_bytes = chunk_bytes
        self.read_bytes = 0
        self._files: dict[str, int] = {}
        self._column_scales: dict[ex.Expression, Array] = {}
        #: The matrix whose columns were turned last: each chunk of its rows needs all of it.
        self._turned: tuple[ex.Expression, Array] | None = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that were read."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def array(self, expression: ex.Expression) -> Array:
        """Return the whole tensor in the expression's shape and dtype; meant for small tensors and tests."""
        return self.read(expression, tuple((0, length) for length in expression.shape))

    def chunks(self, expression: ex.Expression) -> Iterator[Array]:
        """Yield consecutive row ranges, C-contiguous; each fits the chunk size unless a single row is larger."""
        if not expression.shape:
            yield self.array(expression)
            return
        rest = tuple((0, length) for length in expression.shape[1:])
        for start, stop in self._row_ranges(expression, 0, expression.shape[0]):
            yield np.ascontiguousarray(self.read(expression, ((start, stop), *rest)))

    def read(self, expression: ex.Expression, box: Box) -> Array:
        """Return the values inside `box`, which has one (start, stop) per axis.

        Raises:
            ModelError: If a file is missing, has changed or is too short, or if a row to be quantised or normalised
                holds NaN or Inf.
        """
        try:
            reader = _READERS[type(expression)]
        except KeyError:
            raise ModelError(f"no evaluation for {type(expression).__name__}") from None
        if any(start == stop for start, stop in box):
            return np.empty([stop - start for start, stop in box], expression.dtype.numpy())
        return reader(self, expression, box)

    def _row_ranges(self, expression: ex.Expression, start: int, stop: int) -> Iterator[tuple[int, int]]:
        widest = max(math.prod(part.shape[1:]) for part in expression.walk())
        step = max(1, self._chunk_bytes // max(1, 4 * widest))
        return ((row, min(row + step, stop)) for row in range(start, stop, step))

    def full_rows(self, expression: ex.Expression, box: Box, compute: Callable[[int, int], Array]) -> Array:
        """Return the values of `box`, cropped from the whole rows that `compute(start, stop)` returns."""
        columns = tuple(slice(*bounds) for bounds in box[1:])
        if all(bounds == (0, length) for bounds, length in zip(box[1:], expression.shape[1:], strict=True)):
            return compute(*box[0])
        return np.concatenate(
            # Copy, because views would keep the whole rows of all chunks in memory until they are joined.
            [compute(*rows)[(slice(None), *columns)].copy() for rows in self._row_ranges(expression, *box[0])]
        )

    # One reader per operation.

    def _read_source(self, source: ex.Source, box: Box) -> Array:
        if source.dtype in FOUR_BITS and len(source.shape) == 2 and source.shape[1] % 2 == 0:
            return self.full_rows(source, box, lambda start, stop: self._read_pairs(source, start, stop))
        if source.dtype.bitwidth < 8:
            return _unpacked(source, bytes(self._pread(source, source.offset, source.nbytes)), box)
        if not source.shape:
            return self._read_rows(source, 0, 1).reshape(())
        (start, stop), *rest = box
        # A single row is read as a tensor of its own, so that one row of a mask does not cost its whole head.
        if stop - start == 1 and rest:
            offset = source.offset + start * int(math.prod(source.shape[1:]) * source.dtype.itemsize)
            row = dataclasses.replace(source, shape=source.shape[1:], offset=offset)
            return self._read_source(row, tuple(rest))[None]
        return self.full_rows(source, box, lambda start, stop: self._read_rows(source, start, stop))

    def _read_rows(self, source: ex.Source, start: int, stop: int) -> Array:
        row = math.prod(source.shape[1:]) * source.dtype.itemsize
        row_bytes = int(row)
        data = self._pread(source, source.offset + start * row_bytes, (stop - start) * row_bytes)
        return np.frombuffer(data, source.dtype.numpy()).reshape(stop - start, *source.shape[1:])

    def _read_pairs(self, source: ex.Source, start: int, stop: int) -> Array:
        width = source.shape[1] // 2
        data = self._pread(source, source.offset + start * width, (stop - start) * width)
        return group_math.separate_codes(np.frombuffer(data, np.uint8).reshape(-1, width), source.dtype)

    def _pread(self, source: ex.Source, offset: int, length: int) -> bytearray:
        path = source.file.path
        if path not in self._files:
            check_unchanged(source.file)
            self._files[path] = os.open(path, os.O_RDONLY)
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            count = os.preadv(self._files[path], [view[done:]], offset + done)
            if not count:
                raise ModelError(f"{path}: ends at byte {offset + done}, inside tensor {source.name!r}")
            done += count
        self.read_bytes += length
        return data

    def _read_literal(self, literal: Literal, box: Box) -> Array:
        if literal.dtype.bitwidth < 8:
            return _unpacked(literal, literal.data, box)
        whole: Array = np.frombuffer(literal.data, literal.dtype.numpy()).reshape(literal.shape)
        return whole[tuple(slice(*bounds) for bounds in box)]

    def _read_fill(self, fill: Fill, box: Box) -> Array:
        return np.full([stop - start for start, stop in box], fill.value, fill.dtype.numpy())

    def _read_slice(self, part: ex.Slice, box: Box) -> Array:
        start, stop = box[part.along]
        return self.read(part.operand, _moved(box, part.along, start + part.start, stop + part.start))

    def _read_concat(self, joined: Concat, box: Box) -> Array:
        start, stop = box[joined.along]
        pieces, offset = [], 0
        for part in joined.parts:
            length = part.shape[joined.along]
            lower, upper = max(start - offset, 0), min(stop - offset, length)
            if lower < upper:
                pieces.append(self.read(part, _moved(box, joined.along, lower, upper)))
            offset += length
        return np.concatenate(pieces, axis=joined.along)

    def _read_transpose(self, turned: ex.Transpose, box: Box) -> Array:
        inner = [(0, 0)] * len(box)
        for axis, bounds in zip(turned.permutation, box, strict=True):
            inner[axis] = bounds
        return np.transpose(self.read(turned.operand, tuple(inner)), turned.permutation)

    def _read_cast(self, cast: ex.Cast, box: Box) -> Array:
        values = self.read(cast.operand, box)
        result: Array = np.empty(values.shape, cast.dtype.numpy())
        self.report.count(cast, cast_rows(values, cast.dtype, result))
        return result

    def _read_pad(self, padded: ex.Pad, box: Box) -> Array:
        axis, (start, stop) = padded.along, box[padded.along]
        old = padded.operand.shape[axis] // padded.segments
        new = padded.shape[axis] // padded.segments
        result: Array = np.full([b - a for a, b in box], padded.value, padded.dtype.numpy())
        for segment in range(padded.segments):
            lower, upper = max(start, segment * new), min(stop, segment * new + old)
            if lower < upper:
                shift = segment * (old - new)
                values = self.read(padded.operand, _moved(box, axis, lower + shift, upper + shift))
                result[_along(axis, lower - start, upper - start)] = values
        return result

    def _read_normalized(self, norm: ex.NormalizeRows, box: Box) -> Array:
        def rows(start: int, stop: int) -> Array:
            wide = self.finite(norm.operand, start, stop)
            result: Array = np.empty(wide.shape, norm.dtype.numpy())
            normalize_rows(wide, None, norm.epsilon, result)
            return result

        return self.full_rows(norm, box, rows)

    def _read_rotated(self, rotated: Rotate, box: Box) -> Array:
        rotation = rotation_of(rotated.shape[rotated.along], rotated.seed)
        if rotated.by_rows:
            rest = (0, rotated.shape[1])
            return self.full_rows(
                rotated,
                box,
                lambda start, stop: rotate_rows(self.read(rotated.operand, ((start, stop), rest)), rotation),
            )
        if self._turned is None or self._turned[0] != rotated:
            self._turned = None  # Let the memory go before more is needed.
            whole: Array = np.empty(rotated.shape, np.float32)
            for start, stop in self._row_ranges(rotated.operand, 0, rotated.shape[0]):
                rest_of_box = tuple((0, length) for length in rotated.shape[1:])
                whole[start:stop] = self.read(rotated.operand, ((start, stop), *rest_of_box))
            rotate_columns(whole.reshape(rotated.shape[0], -1), rotation)
            self._turned = rotated, whole
        return self._turned[1][tuple(slice(*bounds) for bounds in box)]

    def _read_scaled(self, scaled: ScaleAlong, box: Box) -> Array:
        values = self.read(scaled.operand, box)
        factors = self.read(scaled.vector, (box[scaled.along],))
        result: Array = values * (factors[:, None] if scaled.along < len(box) - 1 else factors)
        return result

    def _read_codes(self, codes: ex.QuantizeCodes, box: Box) -> Array:
        if codes.along == 0 or len(codes.shape) == 1:

            def rows(start: int, stop: int) -> Array:
                wide = self.finite(codes.operand, start, stop)
                return quantize_values(wide, scales_of(absmax(wide, 0), codes.operand.dtype)[:, None])

            return self.full_rows(codes, box, rows)

        scales = self._scales_of_columns(codes.operand)
        return self.full_rows(
            codes, box, lambda start, stop: quantize_values(self.finite(codes.operand, start, stop), scales[None, :])
        )

    def _read_scales(self, scales: ex.QuantizeScales, box: Box) -> Array:
        (start, stop) = box[0]
        if scales.along:
            return self._scales_of_columns(scales.operand)[start:stop]
        ranges = self._row_ranges(scales.operand, start, stop)
        peaks = [absmax(self.finite(scales.operand, *rows), 0) for rows in ranges]
        return scales_of(np.concatenate(peaks), scales.dtype)

    def _scales_of_columns(self, weight: ex.Expression) -> Array:
        if weight not in self._column_scales:
            peak = np.zeros(weight.shape[1], np.float32)
            for start, stop in self._row_ranges(weight, 0, weight.shape[0]):
                np.maximum(peak, absmax(self.finite(weight, start, stop), 1), out=peak)
            self._column_scales[weight] = scales_of(peak, weight.dtype)
        return self._column_scales[weight]

    def finite(self, weight: ex.Expression, start: int, stop: int) -> Array:
        """Return full rows as an fp32 copy that may be overwritten; NaN or Inf is an error that names the tensor."""
        rest = tuple((0, length) for length in weight.shape[1:])
        wide = np.array(self.read(weight, ((start, stop), *rest)), np.float32)
        if not np.isfinite(wide).all():
            bad = int(np.argmin(np.isfinite(wide).all(axis=tuple(range(1, wide.ndim)))))
            raise not_finite(weight, start + bad)
        return wide

    def _read_packed(self, packed: ex.Pack, box: Box) -> Array:
        rows, columns = packed.shape[2:]
        height, width = packed.operand.shape
        (first, last), (left, right), *inside = box
        bounds = (first * rows, min(last * rows, height)), (left * columns, min(right * columns, width))
        blocks: Array = np.empty((last - first, right - left, rows, columns), packed.dtype.numpy())
        pack_blocks(self.read(packed.operand, bounds), blocks)
        return blocks[(slice(None), slice(None), *(slice(*item) for item in inside))]

    def _read_row_sums(self, sums: ex.RowSums, box: Box) -> Array:
        rest = (0, sums.operand.shape[1])
        ranges = self._row_ranges(sums.operand, *box[0])
        return np.concatenate([self.read(sums.operand, (rows, rest)).sum(axis=1, dtype=np.int32) for rows in ranges])

    def _read_unpacked(self, codes: UnpackCodes, box: Box) -> Array:
        """Read the words that hold the columns of the box, and cut off what lies beside them in these words."""
        rows, (start, stop) = box
        count = codes_per_word(codes.bits)
        first, last = start // count, -(-stop // count)
        words = self.read(codes.operand, (rows, (first, last)))
        found: Array = np.empty((rows[1] - rows[0], (last - first) * count), np.int8)
        unpack_rows(words, codes.bits, found)
        return found[:, start - first * count : stop - first * count]

    def _read_words(self, words: PackCodes, box: Box) -> Array:
        rows, (start, stop) = box
        count = codes_per_word(words.bits)
        codes = self.read(words.operand, (rows, (start * count, stop * count)))
        found: Array = np.empty((rows[1] - rows[0], stop - start), np.int32)
        pack_rows(codes, words.bits, found)
        return found

    def _read_dequantized(self, weight: Dequantized, box: Box) -> Array:
        wide = self.read(weight.codes, box).astype(np.float32)
        if weight.group:
            rows, (start, stop) = box
            first, last = start // weight.group, -(-stop // weight.group)
            counted = self.read(weight.scales, (rows, (first, last))).astype(np.float32)
            offset = start - first * weight.group
            wide *= np.repeat(counted, weight.group, axis=1)[:, offset : offset + stop - start]
            return wide.astype(weight.dtype.numpy())
        scales = self.read(weight.scales, (box[weight.along],)).astype(np.float32)
        wide *= scales[:, None] if weight.along == 0 else scales[None, :]
        return wide.astype(weight.dtype.numpy())

    def _read_shard(self, shard: ex.Shard, box: Box) -> Array:
        axis, (start, stop) = shard.along, box[shard.along]
        local = shard.shape[axis] // shard.segments
        whole = local * shard.degree
        pieces = []
        for segment in range(shard.segments):
            lower, upper = max(start, segment * local), min(stop, (segment + 1) * local)
            if lower < upper:
                shift = segment * (whole - local) + self.rank * local
                pieces.append(self.read(shard.operand, _moved(box, axis, lower + shift, upper + shift)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=axis)


def not_finite(weight: ex.Expression, row: int) -> ModelError:
    """Return the error for a row with NaN or Inf, which has neither a scale nor a norm."""
    names = ", ".join(sorted({source.name for source in weight.sources()})) or "a constant"
    return ModelError(
        f"{names}: NaN or Inf in row {row}; such a weight has no scale. Repair the checkpoint, or "
        f"export it with `dtype=fp32` if the values overflowed in fp16."
    )


def pack_blocks(values: Array, out: Array) -> None:
    """Copy a matrix into blocks `out` `[row blocks, column blocks, rows, columns]`, with zeros beyond its end."""
    down, across, rows, columns = out.shape
    missing = (down * rows - values.shape[0], across * columns - values.shape[1])
    if any(missing):
        values = np.pad(values, ((0, missing[0]), (0, missing[1])))
    word = _WORDS.get(columns * values.itemsize)
    if word is not None and columns > 1 and values.flags.c_contiguous and out.flags.c_contiguous:
        # The columns of a block are adjacent bytes: move them as one number instead of byte by byte.
        values, out, columns = values.view(word), out.view(word), 1
    out[...] = values.reshape(down, rows, across, columns).transpose(0, 2, 1, 3)


def _unpacked(expression: ex.Expression, data: bytes, box: Box) -> Array:
    """Return elements of less than a byte, which lie in bytes together, as an array of an element per byte."""
    proto = onnx.TensorProto(data_type=expression.dtype.value, dims=expression.shape, raw_data=data)
    whole: Array = onnx.numpy_helper.to_array(proto)
    return whole[tuple(slice(*bounds) for bounds in box)]


def _moved(box: Box, axis: int, start: int, stop: int) -> Box:
    return (*box[:axis], (start, stop), *box[axis + 1 :])


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


_READERS: dict[type, Callable[[Evaluator, Any, Box], Array]] = {
    ex.Source: Evaluator._read_source,
    Literal: Evaluator._read_literal,
    Fill: Evaluator._read_fill,
    ex.Slice: Evaluator._read_slice,
    Concat: Evaluator._read_concat,
    ex.Transpose: Evaluator._read_transpose,
    ex.Cast: Evaluator._read_cast,
    ex.Pad: Evaluator._read_pad,
    ex.NormalizeRows: Evaluator._read_normalized,
    Rotate: Evaluator._read_rotated,
    ScaleAlong: Evaluator._read_scaled,
    ex.QuantizeCodes: Evaluator._read_codes,
    ex.QuantizeScales: Evaluator._read_scales,
    ex.Pack: Evaluator._read_packed,
    ex.RowSums: Evaluator._read_row_sums,
    UnpackCodes: Evaluator._read_unpacked,
    PackCodes: Evaluator._read_words,
    Dequantized: Evaluator._read_dequantized,
    ex.Shard: Evaluator._read_shard,
    **group_math.READERS,
}


def weight_digest(expression: ex.Expression) -> str:
    """Return the blake3 digest of the bytes that a weight evaluates to, reading it chunk by chunk."""
    hasher = blake3.blake3()
    with Evaluator() as evaluator:
        for chunk in evaluator.chunks(expression):
            hasher.update(chunk.reshape(-1).view(np.uint8).data)
    return str(hasher.hexdigest())
