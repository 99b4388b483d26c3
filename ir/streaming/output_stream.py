"""One tensor on its way to a file: rows are gathered to whole pages, hashed in passing, and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import blake3
import numpy as np

from passopt.ir import expressions as ex
from passopt.ir.streaming.direct_io import PAGE, Arena, OutputFile, page_up
from passopt.ir.streaming.schedule import Output
from passopt.ir.streaming.spans import Part, Span, grain_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Values: TypeAlias = Callable[[ex.Expression], Array]

#: Bytes gathered before they are written, where memory allows.
STAGE_BYTES = 2 << 20


def stage_bytes(output: Output, wanted: int = STAGE_BYTES) -> int:
    """Memory that a stream needs: at least a row beside pages that are not full yet."""
    least = output.row_bytes + 3 * PAGE
    return page_up(max(least, min(wanted, output.nbytes + 2 * PAGE)))


class OutputStream:
    """Takes the rows of one output in order. `stage[0]` is the byte `self._base` of the file, a page's start."""

    def __init__(self, output: Output, file: OutputFile, arena: Arena, wanted: int) -> None:
        self.output = output
        self._file = file
        self._memory = arena.take(stage_bytes(output, wanted))
        self._stage = np.frombuffer(self._memory, np.uint8)
        self._base = output.offset // PAGE * PAGE
        self._hashed = self._fill = output.offset - self._base
        self._written = self._fill  # bytes of the stage that lie in the file already, or before the tensor
        self._hasher = blake3.blake3()
        self._span = self._done = 0
        self._fills: dict[tuple[float, int], Array] = {}

    def needs(self, start: int, stop: int) -> bool:
        """Whether rows `start` to `stop` of the base give a row that comes next."""
        span = next((span for span in self.output.spans[self._span :] if not span.is_filled), None)
        if span is None:
            return False
        row, _, last = self._position(span, start, stop)
        return row < last

    def feed(self, start: int, stop: int, values: Values) -> int:
        """Take what rows `start` to `stop` of the base give; returns the bytes taken.

        `values` gives the rows of a core that belong to them.
        """
        taken = 0
        spans = self.output.spans
        while self._span < len(spans):
            span = spans[self._span]
            count = span.rows - self._done
            if not span.is_filled:
                row, first, last = self._position(span, start, stop)
                assert row >= first, f"{self.output.name}: row {row} was passed by"
                count = min(last - row, count)
                if count <= 0:
                    break
                taken += self._put(span, count, values, row - first)
            else:
                taken += self._put(span, count, values, 0)
            self._done += count
            if self._done < span.rows:
                break
            self._span, self._done = self._span + 1, 0
        return taken

    def _position(self, span: Span, start: int, stop: int) -> tuple[int, int, int]:
        """The next row of the span's cores, and the cores' rows that `start` to `stop` of the base give."""
        part = next(part for part in span.parts if part.core is not None)
        assert part.core is not None
        grain = grain_of(part.core)
        done = self._done if span is self.output.spans[self._span] else 0
        return part.row + done, start // grain, -(-stop // grain)

    def finish(self) -> str:
        """Write what is left; returns the digest of the tensor."""
        assert self._span == len(self.output.spans), f"{self.output.name}: rows are missing"
        self._flush(whole=True)
        return str(self._hasher.hexdigest())

    def _put(self, span: Span, count: int, values: Values, first: int) -> int:
        width = self.output.row_bytes
        done = 0
        while done < count:
            room = (len(self._stage) - self._fill) // width
            if not room:
                self._flush(whole=False)
                continue
            rows = min(room, count - done)
            target = self._stage[self._fill : self._fill + rows * width].reshape(rows, width)
            column = 0
            for part in span.parts:
                nbytes = int(part.count * self.output.dtype.itemsize)
                target[:, column : column + nbytes] = self._bytes(part, values, first + done, rows)
                column += nbytes
            self._fill += rows * width
            done += rows
        return count * width

    def _bytes(self, part: Part, values: Values, first: int, rows: int) -> Array:
        """Rows of a part as bytes [rows, bytes], or [1, bytes] where all are equal."""
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
        """Write full pages, and with `whole` the rest; the page that is not full yet moves to the front."""
        self._hasher.update(self._memory[self._hashed : self._fill])
        full = self._fill // PAGE * PAGE
        head = min(-(-self._written // PAGE) * PAGE, self._fill)  # the page that belongs to the tensor before as well
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
