"""Run a head in slices of the vocabulary, because its weight is larger than a layer and normalising it takes copies.

Each column of the logits depends only on its own row of the weight, in a plain and in a normalised head alike. So
slices of the rows give slices of the columns. A graph of which this does not hold is run whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.weights.lazy_weight import LazyWeight, expression_of, small_constant
from passopt.verification.scenarios import Step

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: A head with more bytes of weights than this is sliced, and each slice holds at most this many.
SLICE_BYTES = 256 << 20


class UnexpectedWidthError(Exception):
    """A slice of the weights did not give that slice of the logits, so the head has to run whole."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A graph and the ranges of the vocabulary that its logits cover, in order; the last one may reach into padding."""

    graph: onnx_ir.Model
    ranges: tuple[tuple[int, int], ...]


def whole(graph: onnx_ir.Model, vocab: int) -> Part:
    """Return the graph as a single part that covers the whole vocabulary."""
    return Part(graph, ((0, vocab),))


def slice_head(graph: onnx_ir.Model, vocab: int) -> list[Part]:
    """Cut a head into parts of at most `SLICE_BYTES`, each a clone with sliced weights; a small head stays whole.

    The vocabulary may be spread over the weights of several ranks; then each of these weights is sliced in the same
    way.
    """
    weights = graph.graph.initializers
    nbytes = sum(value.const_value.nbytes for value in weights.values() if value.const_value is not None)
    length = _local_vocabulary(graph, vocab)
    count = -(-nbytes // SLICE_BYTES)
    if count < 2 or length is None:
        return [whole(graph, vocab)]
    ranks = -(-vocab // length)
    step = -(-length // count)
    return [_part(graph, length, ranks, start, min(start + step, length)) for start in range(0, length, step)]


def _local_vocabulary(graph: onnx_ir.Model, vocab: int) -> int | None:
    """Return the number of rows of one rank's head weight, or None if no weight fits the vocabulary.

    It is the whole vocabulary, or a rank's share of it with fewer rows of padding than there are ranks.
    """
    shapes = [tuple(value.shape) for value in graph.graph.initializers.values() if value.shape is not None]
    for shape in sorted((shape for shape in shapes if len(shape) == 2), key=_size, reverse=True):
        for length in shape:
            if isinstance(length, int) and 0 <= -(-vocab // length) * length - vocab < -(-vocab // length):
                return length
    return None


def _size(shape: Sequence[object]) -> int:
    return int(np.prod([dim for dim in shape if isinstance(dim, int)]))


def _part(graph: onnx_ir.Model, length: int, ranks: int, start: int, stop: int) -> Part:
    clone = graph.clone()
    for name, value in clone.graph.initializers.items():
        numbers = small_constant(value)
        if numbers is not None and _is_shape(numbers, length):
            value.const_value = onnx_ir.tensor(_resized(numbers, length, stop - start), name=name)
        elif value.shape is not None and length in tuple(value.shape):
            expression = expression_of(value)
            assert expression is not None
            piece = expression.slice(expression.shape.index(length), start, stop)
            value.const_value = LazyWeight(piece, name)
            value.shape = onnx_ir.Shape(piece.shape)
    for node in clone.graph:
        for output in node.outputs:
            output.shape = None  # the declared shapes are those of the whole head
        numbers = small_constant(node.outputs[0])
        if node.op_type == "Constant" and numbers is not None and _is_shape(numbers, length):
            node.attributes.clear()
            node.attributes["value"] = onnx_ir.AttrTensor(
                "value", onnx_ir.tensor(_resized(numbers, length, stop - start))
            )
    return Part(clone, tuple((rank * length + start, rank * length + stop) for rank in range(ranks)))


def _is_shape(numbers: Array, length: int) -> bool:
    """Return whether a constant contains the weight's length, as where a norm is expanded to the weight's shape."""
    return numbers.dtype == np.int64 and bool((numbers == length).any())


def _resized(numbers: Array, length: int, width: int) -> Array:
    """Return the numbers with the length of the weight replaced by that of the slice."""
    return np.where(numbers == length, np.int64(width), numbers)


@dataclasses.dataclass
class Logits:
    """The logits of one step, put together from the parts of a head.

    They are kept whole if nothing is scored; otherwise only as much of them as the surprise of `scored` tokens needs.
    """

    step: Step
    vocab: int
    scored: int
    array: Array | None = None
    _peak: Array | None = None
    _total: Array | None = None
    _chosen: Array | None = None

    def add(self, part: Part, found: Array) -> None:
        """Add the logits [b, q or 1, columns of the part] of one part.

        Raises:
            UnexpectedWidthError: If the number of columns is not that of the part.
        """
        if found.shape[-1] != sum(stop - start for start, stop in part.ranges):
            raise UnexpectedWidthError
        for start, stop, columns in _columns(part, found):
            kept = columns[..., : max(0, self.vocab - start)]
            if self.scored:
                self._score(start, kept)
                continue
            if self.array is None:
                self.array = np.zeros((*found.shape[:2], self.vocab), found.dtype)
            self.array[..., start : min(stop, self.vocab)] = kept

    def _score(self, start: int, columns: Array) -> None:
        """Add a range of columns to the running log-sum-exp of each scored position."""
        length = self.step.input_ids.shape[1]
        if columns.shape[1] != length or not columns.shape[-1]:
            return
        rows = columns[0, length - 1 - self.scored : length - 1].astype(np.float64)
        targets = self.step.input_ids[0, length - self.scored :] - start
        if self._peak is None or self._total is None or self._chosen is None:
            self._peak = np.full(self.scored, -np.inf)
            self._total, self._chosen = np.zeros(self.scored), np.zeros(self.scored)
        peak = np.maximum(self._peak, rows.max(axis=-1))
        self._total = self._total * np.exp(self._peak - peak) + np.exp(rows - peak[:, None]).sum(axis=-1)
        self._peak = peak
        inside = (targets >= 0) & (targets < rows.shape[1])
        self._chosen[inside] = rows[inside, targets[inside]]

    @property
    def surprise(self) -> float | None:
        """Return the sum of −log p over the scored tokens, in nats; None if there were no logits for them."""
        if self._peak is None or self._total is None or self._chosen is None:
            return None
        return float((self._peak + np.log(self._total) - self._chosen).sum())


def _columns(part: Part, found: Array) -> Iterator[tuple[int, int, Array]]:
    offset = 0
    for start, stop in part.ranges:
        yield start, stop, found[..., offset : offset + stop - start]
        offset += stop - start
