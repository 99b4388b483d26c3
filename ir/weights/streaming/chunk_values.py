"""Read a base in chunks of rows and compute the cores of each chunk, each of them once."""

from __future__ import annotations

import numpy as np

from passopt.ir.errors import ModelError
from passopt.ir.weights import expressions as ex
from passopt.ir.weights.evaluator import Evaluator, not_finite
from passopt.ir.weights.group_math import SCRATCH_BYTES, group_values, joined_codes, unsigned_codes
from passopt.ir.weights.groups import GroupCodes, GroupScales, GroupZeros, Nibbles, Unsigned
from passopt.ir.weights.packed_codes import PackCodes, UnpackCodes
from passopt.ir.weights.rotation import Rotate, rotation_of
from passopt.ir.weights.row_math import Array, pack_rows, scales_of, unpack_rows, widened
from passopt.ir.weights.scaling import ScaleAlong
from passopt.ir.weights.streaming.direct_io import PAGE, Arena, Pieces, SourceReader, page_up
from passopt.ir.weights.streaming.output_groups import Group, is_held, is_rounding, is_turned
from passopt.ir.weights.streaming.row_kernels import RowKernels
from passopt.ir.weights.streaming.row_spans import GroupRows, is_by_columns, is_bytes, matrix_shape

#: What is held whole is computed from pieces of about so many bytes, besides the memory of the arena.
READ_OF_HELD = 16 << 20


def row_bytes(group: Group, kernels: RowKernels) -> int:
    """Return the memory in bytes per row of the base: for the row itself and for every result computed from it."""
    base, columns = group.base, matrix_shape(group.base)[1]
    if is_bytes(base):
        total = int(columns * base.dtype.itemsize)
    elif is_held(base):
        total = 0
    elif is_turned(base):  # This counts a panel of columns, and the rows that it is transposed to.
        total = int(2 * columns * base.dtype.itemsize)
    else:  # The evaluator of boxes makes fp32 copies of the rows and of all their operands.
        total = 8 * max(matrix_shape(part)[1] for part in base.walk())
    total += sum(int(matrix_shape(core)[1] * core.dtype.itemsize) for core in group.stored_cores)
    copies = sum(kernels.scratch_bytes if not isinstance(core, GroupRows) else SCRATCH_BYTES for core in group.cores)
    return total + copies * columns


class ChunkValues:
    """Reads chunks of a group's base and computes the group's cores for them, in memory for `most` rows from the arena.

    What only the evaluator of boxes can read takes additional memory, a multiple of `chunk_bytes`.
    """

    def __init__(
        self, group: Group, reader: SourceReader, arena: Arena, kernels: RowKernels, most: int, chunk_bytes: int
    ) -> None:
        self._group = group
        self._base = group.base
        self._reader = reader
        self._kernels = kernels
        self._columns = matrix_shape(group.base)[1]
        self._evaluator = Evaluator(
            group.rank, min(chunk_bytes, READ_OF_HELD // 4) if is_held(self._base) else chunk_bytes
        )
        self._results: dict[ex.Expression, Array] = {}
        self._peaks: dict[ex.Expression, Array] = {}
        self._columns_of: dict[ex.Expression, Array] = {
            weight: np.zeros(weight.shape[1], np.float32) for weight in group.measured
        }
        self._start = self._rows = 0
        if is_bytes(self._base) or is_turned(self._base):
            nbytes = int(most * self._columns * self._base.dtype.itemsize)
            self._input = arena.take(page_up(nbytes) + 2 * PAGE)
        if is_turned(self._base):
            self._turned = _matrix(arena, self._base, most)
        if is_held(self._base):
            self._held = _matrix(arena, self._base, self._base.shape[0])
            self._is_filled = False
        self._vectors: dict[ex.Expression, Array] = {}
        self._memory = {core: _matrix(arena, core, most) for core in group.stored_cores}

    @property
    def overflows(self) -> dict[str, int]:
        """Return, per tensor, the number of finite values that became infinite in a narrower dtype."""
        return self._evaluator.report.overflows

    def close(self) -> None:
        """Close the files of the evaluator of boxes."""
        self._evaluator.close()

    def load(self, start: int, stop: int) -> None:
        """Read rows `start` to `stop` of the base, and forget what was computed from earlier rows."""
        self._results = {}
        self._peaks = {}
        self._start, self._rows = start, stop - start
        self._results[self._base] = self._read(start, stop)

    def measure(self) -> None:
        """Include the loaded rows in the largest magnitudes of columns, which give the scales of columns."""
        for weight, peaks in self._columns_of.items():
            found = self._absmax(weight, 1)
            if not np.isfinite(found).all():
                self._finite_peaks(weight)
            np.maximum(peaks, found, out=peaks)

    def __call__(self, core: ex.Expression) -> Array:
        """Return the rows of `core` that belong to the loaded rows of the base, as a C-contiguous matrix."""
        if core not in self._results:
            self._results[core] = self._computed(core)
        return self._results[core]

    @property
    def read_bytes(self) -> int:
        """Return how many bytes the evaluator of boxes has read; the reader counts its own."""
        return self._evaluator.read_bytes

    def _read(self, start: int, stop: int) -> Array:
        base = self._base
        if isinstance(base, Rotate) and is_held(base):
            return self._of_held(base)[start:stop]
        if is_turned(base):
            return self._turn(base.operand, start, stop)  # type: ignore[attr-defined]
        if not is_bytes(base):
            return self._evaluated(start, stop)
        size = int(self._columns * base.dtype.itemsize)
        at = self._reader.read(base.file, base.name, base.offset + start * size, self._input, (stop - start) * size)
        raw = np.frombuffer(self._input, np.uint8)[at : at + (stop - start) * size]
        if at % base.dtype.itemsize:
            raw = raw.copy()  # Unaligned numbers are slow everywhere, and the compiled kernels cannot read them.
        return raw.view(base.dtype.numpy()).reshape(stop - start, self._columns)

    def _turn(self, source: ex.Source, start: int, stop: int) -> Array:
        """Read columns `start` to `stop` of the source as a panel, one piece per row, and return it transposed."""
        count, size = stop - start, int(source.dtype.itemsize)
        pieces = Pieces(source.offset + start * size, self._columns, source.shape[1] * size, count * size)
        self._reader.read_pieces(source.file, source.name, pieces, self._input)
        nbytes = self._columns * count * size
        panel = np.frombuffer(self._input[:nbytes], source.dtype.numpy()).reshape(self._columns, count)
        self._kernels.transpose(panel, self._turned[:count])
        return self._turned[:count]

    def _of_held(self, base: Rotate) -> Array:
        """Return the whole base, which is computed when it is first asked for."""
        if not self._is_filled:
            step = max(1, READ_OF_HELD // 8 // max(1, 4 * self._columns))
            for start in range(0, base.shape[0], step):
                stop = min(start + step, base.shape[0])
                self._hold(base.operand, start, stop)
            self._kernels.rotate_columns(self._held, rotation_of(base.shape[0], base.seed))
            self._is_filled = True
        return self._held

    def _hold(self, operand: ex.Expression, start: int, stop: int) -> None:
        """Compute rows `start` to `stop` of what is held, before it is rotated; widen them by a kernel."""
        box, out = ((start, stop), (0, self._columns)), self._held[start:stop]
        if isinstance(operand, ex.Cast):
            values = np.ascontiguousarray(self._evaluator.read(operand.operand, box))
            self._evaluator.report.count(operand, self._kernels.cast(values, operand.dtype, out))
        else:
            out[...] = self._evaluator.read(operand, box)

    def _evaluated(self, start: int, stop: int) -> Array:
        shape = self._base.shape
        if not shape:
            return self._evaluator.array(self._base).reshape(1, 1)
        inner = max(1, int(np.prod(shape[1:-1])))
        box = ((start // inner, stop // inner), *((0, length) for length in shape[1:]))
        values = np.ascontiguousarray(self._evaluator.read(self._base, box))
        return values.reshape(stop - start, self._columns)

    def _computed(self, core: ex.Expression) -> Array:
        if isinstance(core, ex.QuantizeScales):
            return self._scales(core)[:, None]
        out = self._memory[core][: self._rows]
        if isinstance(core, ex.Cast):
            self._cast(core, out)
        elif isinstance(core, ex.QuantizeCodes):
            values, through = self._unrounded(core.operand)
            self._kernels.codes(values, core.along, through, self._scales(core), out)
        elif isinstance(core, ex.NormalizeRows):
            self._finite_peaks(core.operand)
            values, through = self._unrounded(core.operand)
            self._kernels.normalize(values, through, core.epsilon, out)
        elif isinstance(core, Rotate):
            self._kernels.rotate(self(core.operand), rotation_of(core.shape[1], core.seed), out)
        elif isinstance(core, ScaleAlong):
            self._scale(core, out)
        elif isinstance(core, GroupCodes | GroupScales | GroupZeros):
            self._finite_peaks(core.operand)
            out[...] = group_values(core, widened(self(core.operand)))
        elif isinstance(core, Nibbles):
            out[...] = joined_codes(self(core.operand), core.distance)
        elif isinstance(core, Unsigned):
            out[...] = unsigned_codes(self(core.operand))
        elif isinstance(core, ex.RowSums):
            np.sum(self(core.operand), axis=1, dtype=np.int32, out=out[:, 0])
        elif isinstance(core, UnpackCodes):
            unpack_rows(self(core.operand), core.bits, out)
        elif isinstance(core, PackCodes):
            pack_rows(self(core.operand), core.bits, out)
        else:
            raise ModelError(f"no evaluation for {type(core).__name__}")
        return out

    def _scale(self, core: ScaleAlong, out: Array) -> None:
        if core.vector not in self._vectors:
            self._vectors[core.vector] = self._evaluator.array(core.vector)
        factors = self._vectors[core.vector]
        if core.along == 0:
            factors = factors[self._start : self._start + self._rows, None]
        np.multiply(self(core.operand), factors, out=out)

    def _cast(self, cast: ex.Cast, out: Array) -> None:
        self._evaluator.report.count(cast, self._kernels.cast(self(cast.operand), cast.dtype, out))

    def _unrounded(self, operand: ex.Expression) -> tuple[Array, ex.DataType | None]:
        """Return an operand for a kernel, and the dtype that the kernel has to round it to, or None.

        If the operand is a cast between floats that nothing else needs, the kernel takes the unrounded values and
        rounds them itself.
        """
        if isinstance(operand, ex.Cast) and is_rounding(operand) and operand not in self._results:
            return self(operand.operand), operand.dtype
        return self(operand), None

    def _scales(self, core: ex.QuantizeCodes | ex.QuantizeScales) -> Array:
        """Return one scale per loaded row, or one per column of the whole weight."""
        weight = core.operand
        peaks = self._columns_of[weight] if is_by_columns(core) else self._finite_peaks(weight)
        return scales_of(peaks, weight.dtype)

    def _absmax(self, weight: ex.Expression, along: int) -> Array:
        values, through = self._unrounded(weight)
        return self._kernels.absmax(values, along, through)

    def _finite_peaks(self, weight: ex.Expression) -> Array:
        """Return the largest magnitude of each row; NaN or Inf is an error that names the tensor and the row."""
        if weight not in self._peaks:
            peaks = self._absmax(weight, 0)
            if not np.isfinite(peaks).all():
                raise not_finite(weight, self._start + int(np.argmin(np.isfinite(peaks))))
            self._peaks[weight] = peaks
        return self._peaks[weight]


def _matrix(arena: Arena, core: ex.Expression, rows: int) -> Array:
    columns = matrix_shape(core)[1]
    dtype = core.dtype.numpy()
    memory = arena.take(int(rows * columns * core.dtype.itemsize))
    return np.frombuffer(memory, dtype).reshape(rows, columns)
