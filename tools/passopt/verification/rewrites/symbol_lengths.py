"""Choose lengths for symbolic dimensions that are consistent with each other: batch, seq, past and their sums."""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping

import onnx_ir

from passopt.ir.graph.decoder import ATTENTION_MASK, INPUT_IDS, POSITION_IDS


@dataclasses.dataclass(frozen=True)
class Draw:
    """The sizes of one sample: batch, seq and past, left padding per row, and the spread of scales between rows.

    `decades` is the largest power of ten by which rows are scaled down; `others` are lengths of all other symbols.
    """

    batch: int
    seq: int
    past: int
    padding: tuple[int, ...]
    decades: float
    others: tuple[int, ...]


#: Three draws: a chunk after a cache with a padded row; one token after a padded cache, with rows of very different
#: scales, so that the epsilon of a norm matters; and a prefill with an empty cache.
DRAWS = (
    Draw(batch=2, seq=3, past=5, padding=(0, 2), decades=0.0, others=(2, 3, 5, 7, 11)),
    Draw(batch=2, seq=1, past=6, padding=(3, 0), decades=4.0, others=(2, 1, 6, 4, 9)),
    Draw(batch=1, seq=4, past=0, padding=(1,), decades=1.0, others=(1, 4, 3, 5, 2)),
)

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class Lengths:
    """The shapes of values in one draw.

    Symbols of a decoder's inputs get their length by their role in the contract, such as batch or seq. Other symbols
    get one in the order in which they appear. A dimension that is written as arithmetic on symbols is computed.
    """

    def __init__(self, model: onnx_ir.Model, draw: Draw) -> None:
        self.draw = draw
        self._known: dict[str, int] = {}
        fixed = {role: dim for role, dim in _roles(model) if isinstance(dim, int)}
        self.seq = fixed.get("seq", draw.seq)
        has_past = any(role == "past" for role, _ in _roles(model))
        self.past = fixed.get("past", draw.past if has_past else 0)
        sizes = {"batch": draw.batch, "seq": self.seq, "past": self.past, "total": self.past + self.seq}
        for role, dim in _roles(model):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                self._known.setdefault(dim.value, sizes[role])
        for value in model.graph.inputs:
            for dim in value.shape.dims if value.shape is not None else ():
                if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None and self._length(dim) is None:
                    count = len(self._known)
                    self._known[dim.value] = draw.others[count % len(draw.others)]

    def shape_of(self, value: onnx_ir.Value) -> tuple[int, ...] | None:
        """Return the shape of the value in this draw, or None if a dimension is unknown."""
        if value.shape is None:
            return None
        dims = [self._length(dim) for dim in value.shape.dims]
        known = [dim for dim in dims if dim is not None]
        return tuple(known) if len(known) == len(dims) else None

    def _length(self, dim: int | onnx_ir.SymbolicDim) -> int | None:
        if isinstance(dim, int):
            return dim
        if dim.value is None or dim.value in self._known:
            return self._known.get(dim.value or "")
        try:
            return self._computed(ast.parse(dim.value, mode="eval").body)
        except (SyntaxError, KeyError, ZeroDivisionError):
            return None

    def _computed(self, term: ast.expr) -> int:
        if isinstance(term, ast.Name):
            return self._known[term.id]
        if isinstance(term, ast.Constant) and isinstance(term.value, int):
            return term.value
        if isinstance(term, ast.BinOp):
            return _OPERATORS[type(term.op)](self._computed(term.left), self._computed(term.right))
        raise KeyError(ast.dump(term))


def _roles(model: onnx_ir.Model) -> Iterator[tuple[str, int | onnx_ir.SymbolicDim]]:
    """Yield the roles of the dimensions of a decoder's inputs, such as batch or seq, each with the dimension."""
    for value in model.graph.inputs:
        name, ndim = value.name or "", len(value.shape) if value.shape is not None else 0
        if value.shape is None:
            continue
        if name in {INPUT_IDS, POSITION_IDS, ATTENTION_MASK} and ndim == 2:
            yield "batch", value.shape[0]
            yield "total" if name == ATTENTION_MASK else "seq", value.shape[1]
        elif name.startswith("past.") and ndim == 4:
            yield "batch", value.shape[0]
            yield "past", value.shape[2]
