"""Draw seeded values by type and name: activations, masks of every kind, positions, ids within their table, targets.

Shapes: b is the batch, q the positions of this step, t = past + q.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.weights.lazy_weight import constant_tensor

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The bound of integers of unknown meaning, so small that they are valid indices even of the smallest tables in tests.
_SMALL = 3


@dataclasses.dataclass(frozen=True)
class Style:
    """What values are like in one sample.

    Attributes:
        mask: What a mask hides: "left" and "right" are padding of different lengths per row, "none" hides nothing,
            "holes" hides single positions, "row" hides all positions of the first row.
        floats: "normal" numbers; "rows" of very different scales, so that the epsilon of a norm matters; "coarse"
            multiples of a half, among them ties and zeros; "large" numbers; "steep" ones beyond what Exp takes; "huge"
            ones beyond 8-bit floats; "near" ones at, below and above `near`.
        integers: "natural" numbers below the bound; "signed" ones; "counts" from 1 on, and "rounds" from 2 on where
            there is one number; "inferred" targets such as (0, -1) and "split" targets such as (-1, 1). Where a graph
            only computes with them, "near" ones at, below and above `near`, beyond 8 bits, and "wide" ones beyond 32
            bits.
        truth: The value of a boolean of one element.
        flipped: The names of those that have the other value.
        last: Whether positions and ids reach the last row of their table.
        near: The numbers that the graph compares with.
        turn: Tells samples apart that are alike in all else.
    """

    mask: str = "left"
    floats: str = "normal"
    integers: str = "natural"
    truth: bool = True
    flipped: frozenset[str] = frozenset()
    last: bool = False
    near: tuple[float, ...] = ()
    turn: int = 0

    def __str__(self) -> str:
        last = ", last rows of tables" if self.last else ""
        return f"mask {self.mask}, {self.floats} floats, {self.integers} integers{last}"


#: The styles of samples, in turn; the lengths of samples vary at the same time.
STYLES = (
    Style(),
    Style("none", "rows", "signed", truth=False),
    Style("right", "coarse", "inferred"),
    Style("left", "large", "counts", truth=False),
    Style("holes", "normal", "split"),
    Style("row", "rows", "signed"),
)
#: The kinds of integers that are tried where natural ones are refused, as by a Reshape to them.
INTEGERS = ("inferred", "split", "counts", "signed")


def is_natural(name: str) -> bool:
    """Return whether an integer input of this name is a token, a position or a mask, and so never negative."""
    return any(word in name.lower() for word in ("ids", "token", "position", "mask", "label"))


class Sampler:
    """Draw values by name.

    `bounds` holds the bounds of integers that index a table by name, and `computed` the names of integers that a graph
    only computes with.
    """

    def __init__(
        self,
        style: Style,
        past: int = 0,
        bounds: Mapping[str, int] | None = None,
        seed: int = 0,
        computed: frozenset[str] = frozenset(),
    ) -> None:
        self._style = style
        self._computed = computed
        self._past = past
        self._bounds = dict(bounds or {})
        self._seed = seed

    def sample(self, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...]) -> Array:
        """Return a value for the leaf or input `name`, of the given dtype and shape."""
        random = np.random.default_rng([self._seed + (self._style.turn << 16), zlib.crc32(name.encode())])
        if dtype == onnx_ir.DataType.STRING:
            return np.array([f"s{item}" for item in random.integers(0, _SMALL, int(np.prod(shape)))], object).reshape(
                shape
            )
        if "mask" in name.lower():
            return self._mask(dtype, shape, random)
        kind = dtype.numpy()
        if dtype in FLOATS or not (dtype.is_integer() or kind == np.bool_):
            if "box" in name.lower() and shape[-1:] == (4,):
                return self._boxes(random, shape).astype(kind)
            return self._floats(random, shape, kind)
        if kind == np.bool_:
            if np.prod(shape) == 1:
                return np.full(shape, self._style.truth != (name in self._style.flipped))
            return random.integers(0, 2, shape).astype(bool)
        if "position" in name.lower():
            return self._positions(shape, self._bounds.get(name)).astype(kind)
        return self._integers(name, random, shape, kind)

    def _boxes(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Return boxes by two corners, most of which overlap."""
        corner = random.uniform(0, 0.5, (*shape[:-1], 2))
        return np.concatenate([corner, corner + random.uniform(0.6, 1.4, corner.shape)], axis=-1)

    def _floats(self, random: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
        values: Array = np.asarray(random.standard_normal(shape, np.float32))
        style = self._style.floats
        if style == "coarse":
            values = np.round(values * 2) / 2
        if style == "large":
            values = values * np.float32(20)
        if style == "steep":
            values = values * np.float32(200)
        if style == "huge":
            values = values * np.float32(100 if kind.itemsize <= 2 else 50_000)
        if style == "rows" and len(shape) > 1:  # each row along the last axis has a scale of its own
            values = values * np.float32(10) ** -random.uniform(0, 4, (*shape[:-1], 1)).astype(np.float32)
        if style == "near":
            values = self._near(random, values).astype(np.float32)
        if kind.kind == "c":
            return np.asarray(values + 1j * np.asarray(random.standard_normal(shape)), kind)
        with np.errstate(over="ignore"):
            result: Array = values.astype(kind)
        return result

    def _integers(self, name: str, random: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
        bound, style = self._bounds.get(name, _SMALL), self._style.integers
        if style in {"near", "wide"}:
            if name in self._computed and name not in self._bounds and not is_natural(name):
                return self._computed_with(random, shape, kind)
            style = "natural"
        if style == "rounds":
            if name not in self._bounds and not is_natural(name) and np.prod(shape) == 1:
                return self._cast(np.full(shape, 2 + self._style.turn), kind)
            style = "counts"
        if self._style.last and name in self._bounds and np.prod(shape):
            reaching = np.asarray(random.integers(0, bound, shape))
            reaching.flat[-1] = bound - 1
            return self._cast(reaching, kind)
        if style == "natural" or is_natural(name) or kind.kind == "u":
            return self._cast(random.integers(0, max(1, bound), shape), kind)
        if style == "signed":
            return self._cast(random.integers(-bound, max(1, bound), shape), kind)
        if style == "counts" or len(shape) != 1 or not shape[0]:
            return self._cast(random.integers(1, max(2, bound), shape), kind)
        target = np.zeros(shape, np.int64) if style == "inferred" else np.ones(shape, np.int64)
        target[-1 if style == "inferred" else 0] = -1
        return self._cast(target, kind)

    def _near(self, random: np.random.Generator, values: Array) -> Array:
        """Return the values with half of them at, below and above what the graph compares with, also negated.

        Few values are all replaced, by other numbers in each turn.
        """
        steps = [(1.5, 0), (1, 0), (1, 1), (1, -1), (0.5, 0)]
        signs = (1, -1)
        wanted = [sign * (item * k + d) for k, d in steps for item in self._style.near for sign in signs]
        if not wanted:
            return values
        if values.size <= len(wanted):
            cycled = np.arange(values.size).reshape(values.shape) + self._style.turn * values.size
            return np.asarray(wanted)[cycled % len(wanted)]
        picks = np.asarray(random.integers(0, 2 * len(wanted), values.shape))
        return np.where(picks < len(wanted), np.asarray(wanted)[picks % len(wanted)], values)

    def _computed_with(self, random: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
        """Return integers beyond the range of smaller types, as far as the type holds them."""
        limit = min(np.iinfo(kind).max, 1 << 33 if self._style.integers == "wide" else 300)
        lowest = 1 if kind.kind == "u" else -int(limit)
        values: Array = np.asarray(random.integers(lowest, int(limit), shape))
        values = np.where(values == 0, 1, values)
        if self._style.integers == "near":
            values = np.clip(np.trunc(self._near(random, values)), min(lowest, 0), limit)
        return self._cast(values, kind)

    def _cast(self, values: Any, kind: np.dtype[Any]) -> Array:
        return np.asarray(np.asarray(values).astype(np.int64)).astype(kind)

    def _padding(self, rows: int, total: int) -> Array:
        """Return the number of padded positions of each row, always fewer than there are positions."""
        wanted = np.resize((0, 2, 1, 3) if rows > 1 else (1,), rows)
        result: Array = np.minimum(wanted, max(0, total - 1))
        return result

    def _positions(self, shape: tuple[int, ...], bound: int | None) -> Array:
        """Return the index of each token: [b, q], or [q]; with left padding among those that are not padding."""
        columns = self._past + np.arange(shape[-1] if shape else 1)
        if bound is not None:
            last = max(0, bound - 1)
            ahead = last - int(columns[-1]) if self._style.last and len(columns) else 0
            columns = np.clip(columns + ahead, 0, last)
        if len(shape) < 2:
            return columns[: int(np.prod(shape))].reshape(shape)
        left = (
            self._padding(shape[-2], self._past + shape[-1]) if self._style.mask == "left" else np.zeros(shape[-2], int)
        )
        return np.broadcast_to(np.maximum(columns[None, :] - left[:, None], 0), shape)

    def _seen(self, rows: int, total: int, random: np.random.Generator) -> Array:
        """Return which positions hold tokens: [rows, total]."""
        style, columns = self._style.mask, np.arange(total)[None, :]
        if style == "left":
            seen: Array = columns >= self._padding(rows, total)[:, None]
            return seen
        if style == "right":
            return columns < total - self._padding(rows, total)[:, None]
        seen = np.ones((rows, total), bool)
        if style == "holes" and total:
            seen = random.integers(0, 3, (rows, total)) > 0
            seen[:, (total - 1) // 2] = total == 1
            seen[:, -1] = True
        if style == "row" and rows:
            seen[0] = False
        return seen

    def _mask(self, dtype: onnx_ir.DataType, shape: tuple[int, ...], random: np.random.Generator) -> Array:
        """Return a mask of one of the two shapes that decoders use.

        [b, t] is 1 where a token stands. [b, 1, q, t] says what a query may see, as bool, as 1 and 0, or as numbers to
        add to the scores of attention.
        """
        total = shape[-1] if shape else 1
        rows = shape[0] if len(shape) > 1 else 1
        tokens = self._seen(rows, total, random)
        if len(shape) < 3:
            return np.broadcast_to(tokens if len(shape) == 2 else tokens[0] if shape else tokens[0, 0], shape).astype(
                dtype.numpy()
            )
        queries = np.arange(shape[-2])[:, None] + (total - shape[-2])
        causal = (
            np.arange(total)[None, :] <= queries if self._style.mask != "none" else np.ones((shape[-2], total), bool)
        )
        seen = tokens.reshape(rows, *(1,) * (len(shape) - 2), total)
        if dtype not in FLOATS:
            return np.broadcast_to(causal & seen, shape).astype(dtype.numpy())
        # A row of nothing but the lowest number is undefined: onnxruntime's Attention gives 0, Softmax equal weights.
        lowest: Any = -np.inf if self._style.mask == "row" else ml_dtypes.finfo(dtype.numpy()).min  # type: ignore[no-untyped-call]
        additive = np.where(seen, np.where(causal, np.float64(0), -np.inf), np.float64(lowest))
        return np.broadcast_to(additive, shape).astype(dtype.numpy())


#: Operators whose output holds the integers of their first input, so that bounds of indices reach back through them.
_PASSING = frozenset({"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Flatten", "Slice"})
#: Operators whose output holds integers of any of their inputs.
_JOINING = frozenset({"Concat", "Min", "Max", "Clip"})
_INDEXERS = frozenset({"Gather", "GatherElements", "GatherND", "RotaryEmbedding"})


def index_bounds(inputs: list[onnx_ir.Value], length_of: Callable[[onnx_ir.Value, int], int | None]) -> dict[str, int]:
    """Return, by name, the bounds of those of `inputs` that index a table.

    `length_of` returns the length of an axis of a value, or None if that is unknown.
    """
    bounds: dict[str, int] = {}
    for value in inputs:
        found = [length for length in _table_lengths(value, length_of) if length]
        if found:
            bounds[value.name or ""] = min(found)
    return bounds


def _table_lengths(value: onnx_ir.Value, length_of: Callable[[onnx_ir.Value, int], int | None]) -> list[int | None]:
    lengths: list[int | None] = []
    work, seen = [(value, 0)], {value}
    while work and len(seen) < 64:
        current, added = work.pop()
        for use in current.uses():
            node = use.node
            if node.domain:
                continue
            shift = _added(node, use.idx)
            if shift is not None:
                work += [(item, added + shift) for item in node.outputs[:1] if item not in seen]
                seen.update(node.outputs[:1])
                continue
            length = None
            if node.op_type == "RotaryEmbedding" and use.idx == 3 and node.inputs[1] is not None:
                length = length_of(node.inputs[1], 0)
            elif node.op_type in _INDEXERS and use.idx == 1 and node.inputs[0] is not None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                length = length_of(node.inputs[0], axis)
            lengths.append(None if length is None else max(1, length - added))
    return lengths


def _added(node: onnx_ir.Node, index: int) -> int | None:
    """Return what an operator adds to the integers of an input that it passes on; None if it does something else."""
    if (node.op_type in _PASSING and index == 0) or node.op_type in _JOINING:
        return 0
    if node.op_type == "Where":
        return 0 if index else None
    other = node.inputs[1 - index] if node.op_type == "Add" and len(node.inputs) == 2 else None
    tensor = None if other is None else constant_tensor(other)
    if tensor is None or tensor.size != 1:
        return None
    number = int(tensor.numpy().reshape(-1)[0])
    return number if number >= 0 else None
