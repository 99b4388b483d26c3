"""Stream one tensor to its file: gather rows to whole pages, hash them in passing, and write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import blake3
import numpy as np

from passopt.ir.weights import expressions as ex
from passopt.ir.weights.evaluator import pack_blocks
from passopt.ir.weights.row_math import Array
from passopt.ir.weights.streaming.direct_io import PAGE, Arena, OutputFile, page_up
from passopt.ir.weights.streaming.output_groups import Output
from passopt.ir.weights.streaming.row_spans import Part, Span

Values: TypeAlias = Callable[[ex.Expression], Array]

#: The bytes that are gathered before they are written, as far as memory allows.
STAGE_BYTES = 2 << 20


def stream_bytes(output: Output, wanted: int = STAGE_BYTES) -> int:
    """Return the bytes that a stream takes from an arena: its stage, and rows of a block that is not full yet."""
    return _stage_bytes(output, wanted) + page_up(_block_bytes(output))


def _stage_bytes(output: Output, wanted: int) -> int:
    """Return the size of a stage: at least a row, or a row of blocks, beside pages that are not full yet."""
    least = output.unit_bytes + 3 * PAGE
    return page_up(max(least, min(wanted, output.nbytes + 2 * PAGE)))


def _block_bytes(output: Output) -> int:
    return 0 if output.block is None else output.block[0] * output.row_bytes


class OutputStream:
    """Takes the rows of one output in order and writes them to the file.

    `stage[0]` is byte `self._base` of the file, where a page starts.
    """

    def __init__(self, output: Output, file: OutputFile, arena: Arena, wanted: int) -> None:
        self.output = output
        self._file = file
        self._memory = arena.take(_stage_bytes(output, wanted))
        self._stage = np.frombuffer(self._memory, np.uint8)
        self._base = output.offset // PAGE * PAGE
        self._hashed = self._fill = output.offset - self._base
        self._written = self._fill  # Bytes of the stage that are already in the file, or belong before the tensor.
        self._hasher = blake3.blake3()
        self._span = self._done = 0
        self._fills: dict[tuple[float, int], Array] = {}
        self._held = 0
        if output.block is not None:
            memory = arena.take(_block_bytes(output))
            self._block = np.frombuffer(memory, np.uint8).reshape(output.block[0], output.row_bytes)

    def needs(self, start: int, stop: int) -> bool:
        """Return whether rows `start` to `stop` of the base contain the row that comes next in the output."""
        for index, span in enumerate(self.output.spans[self._span :]):
            if not span.is_filled:
                return _row(span) + (0 if index else self._done) < stop
        return False

    def feed(self, start: int, stop: int, values: Values) -> None:
        """Append all output rows that follow from rows `start` to `stop` of the base.

        Args:
            start: The first row of the base.
            stop: The row behind the last.
            values: Returns those rows of a core.
        """
        spans = self.output.spans
        while self._span < len(spans):
            span = spans[self._span]
            count, row = span.rows - self._done, start
            if not span.is_filled:
                row = _row(span) + self._done
                assert row >= start, f"{self.output.name}: row {row} was passed by"
                count = min(stop - row, count)
                if count <= 0:
                    break
            self._put(span, count, values, row - start)
            self._done += count
            if self._done < span.rows:
                break
            self._span, self._done = self._span + 1, 0

    def finish(self) -> str:
        """Write what is left, and return the blake3 digest of the tensor."""
        assert self._span == len(self.output.spans), f"{self.output.name}: rows are missing"
        if self._held:
            self._pack()
        self._flush(whole=True)
        return str(self._hasher.hexdigest())

    def _put(self, span: Span, count: int, values: Values, first: int) -> None:
        """Append `count` rows of `span`, starting with row `first` of what `values` returns."""
        done = 0
        while done < count:
            room = self._room()
            rows = min(len(room), count - done)
            column = 0
            for part in span.parts:
                nbytes = int(part.count * self.output.dtype.itemsize)
                room[:rows, column : column + nbytes] = self._bytes(part, values, first + done, rows)
                column += nbytes
            done += rows
            self._took(rows)

    def _room(self) -> Array:
        """Return the memory for the next rows, at least one: in the stage, or in a block that is not full yet."""
        if self.output.block is not None:
            return self._block[self._held :]
        width = self.output.row_bytes
        self._make_room(width)
        rows = (len(self._stage) - self._fill) // width
        return self._stage[self._fill : self._fill + rows * width].reshape(rows, width)

    def _took(self, rows: int) -> None:
        if self.output.block is None:
            self._fill += rows * self.output.row_bytes
            return
        self._held += rows
        if self._held == len(self._block):
            self._pack()

    def _make_room(self, nbytes: int) -> None:
        if len(self._stage) - self._fill < nbytes:
            self._flush(whole=False)

    def _pack(self) -> None:
        """Move a block of rows, of which the last may be incomplete, to the stage."""
        assert self.output.block is not None
        rows, across, columns = self.output.block
        nbytes = self.output.unit_bytes
        self._make_room(nbytes)
        dtype = self.output.dtype.numpy()
        target = self._stage[self._fill : self._fill + nbytes].view(dtype).reshape(1, across, rows, columns)
        pack_blocks(self._block[: self._held].view(dtype), target)
        self._fill += nbytes
        self._held = 0

    def _bytes(self, part: Part, values: Values, first: int, rows: int) -> Array:
        """Return rows of a part as bytes `[rows, bytes]`, or `[1, bytes]` if all rows are equal."""
        if part.core is None:
            key = (part.value, part.count)
            if key not in self._fills:
                self._fills[key] = np.full((1, part.count), part.value, self.output.dtype.numpy()).view(np.uint8)
            return self._fills[key]
        matrix = values(part.core)
        size = matrix.itemsize
        raw = matrix.view(np.uint8)[first : first + rows]
        return raw[:, part.first * size : (part.first + part.count) * size]

    def _flush(self, *, whole: bool) -> None:
        """Write all full pages, and with `whole` also the rest; otherwise the incomplete page moves to the front."""
        self._hasher.update(self._memory[self._hashed : self._fill])
        full = self._fill // PAGE * PAGE
        head = min(page_up(self._written), self._fill)  # The first page may also hold the end of another tensor.
        self._write(self._written, head)
        self._write(head, max(head, full))
        end = self._fill if whole else max(head, full)
        self._write(max(head, full), end)
        rest = self._fill - full
        self._stage[:rest] = self._stage[full : self._fill].copy()
        self._base += full
        self._fill = self._hashed = rest
        self._written = max(end - full, 0)

    def _write(self, start: int, stop: int) -> None:
        if start < stop:
            self._file.write(self._base + start, self._memory[start:stop])


def _row(span: Span) -> int:
    """Return the row of its cores at which a span begins."""
    return next(part.row for part in span.parts if part.core is not None)
