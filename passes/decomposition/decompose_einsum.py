"""Define the pass `decompose-einsum`, which spells products by Einsum as MatMul, so that the fusions see them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import onnx_ir

from passopt.ir.dtypes import FLOATS
from passopt.ir.graph.attributes import attribute
from passopt.ir.shapes.dimensions import dimensions
from passopt.passes.decomposition.decompose_pass import DecomposePass, required
from passopt.passes.framework.base import Decline
from passopt.passes.patterns.rules import Rewriter

_EQUATION = re.compile(r"(?P<left>[A-Za-z]+),(?P<right>[A-Za-z]+)->(?P<result>[A-Za-z]+)")


@dataclasses.dataclass(frozen=True)
class _Product:
    """The letters of a product of two tensors: in both and the result, of one tensor and the result, and summed over.

    `swapped` says that the second tensor is the left one of the MatMul, because its axes come first in the result.
    """

    left: str
    right: str
    result: str
    batch: str
    rows: str
    columns: str
    summed: str
    swapped: bool

    def turned(self) -> _Product:
        """Return the same product with the other tensor on the left."""
        return _Product(
            self.right, self.left, self.result, self.batch, self.columns, self.rows, self.summed, not self.swapped
        )


@dataclasses.dataclass(frozen=True)
class DecomposeEinsum(DecomposePass):
    """Write the Einsum of two tensors as MatMul, with Transpose, Reshape and Unsqueeze around it.

    Before: ``y = Einsum<equation="bqhd,bkhd->bhqk">(q, k)``
    After:  ``y = MatMul(Transpose(q, [0,2,1,3]), Transpose(k, [0,2,3,1]))``
    Several summed axes become one, for which their lengths must be known. Several axes of a weight become the columns
    of a matrix; otherwise MatMul stretches the other tensor along them. An Einsum that repeats a letter, sums over an
    axis of one tensor, leaves the axes open (`...`), or whose summed lengths are not proven equal stays: Einsum
    stretches lengths of 1, and MatMul does not.
    """

    name = "decompose-einsum"
    decomposes = ("Einsum",)

    def expand(self, op: Rewriter, node: onnx_ir.Node) -> Sequence[onnx_ir.Value]:
        equation = "".join(str(attribute(node, "equation", "")).split())
        if len(node.inputs) != 2:
            raise Decline(f"it joins {len(node.inputs)} tensors; expected two")
        product = _product(equation)
        one, other = required(node, 0), required(node, 1)
        if product.swapped:
            one, other = other, one
        _check(product, one, other)
        if not product.batch and len(product.columns) > 1:
            if len(product.rows) == 1 or _widths(product, other) is None:
                product, one, other = product.turned(), other, one
            widths = _widths(product, other)
            if len(product.columns) > 1 and widths is not None:
                return [_flat(op, product, one, other, widths)]
        return [_stretched(op, product, one, other)]


def _product(equation: str) -> _Product:
    """Return the parts of an equation; raise Decline if it is no product that one MatMul computes."""
    match = _EQUATION.fullmatch(equation)
    if match is None:
        raise Decline(f"equation {equation!r}: expected two tensors with letters for all axes, and the result")
    left, right, result = match["left"], match["right"], match["result"]
    if any(len(set(letters)) != len(letters) for letters in (left, right, result)):
        raise Decline(f"equation {equation!r} repeats a letter in one tensor")
    own = "".join(letter for letter in result if letter in left and letter not in right)
    others = "".join(letter for letter in result if letter in right and letter not in left)
    swapped = bool(own and others) and result.index(others[0]) < result.index(own[0])
    if swapped:
        left, right, own, others = right, left, others, own
    batch = "".join(letter for letter in result if letter in left and letter in right)
    summed = "".join(letter for letter in left if letter in right and letter not in result)
    alone = [letter for letter in {*left, *right} if letter not in result and letter not in summed]
    if alone:
        raise Decline(f"equation {equation!r} sums over {alone[0]!r}, which only one tensor has")
    if not summed or not own or not others:
        raise Decline(f"equation {equation!r}: expected an axis to sum over, and an axis of each tensor in the result")
    return _Product(left, right, result, batch, own, others, summed, swapped)


def _check(product: _Product, one: onnx_ir.Value, other: onnx_ir.Value) -> None:
    """Raise Decline unless both tensors hold floats and their summed axes are proven to be as long as each other."""
    if one.dtype not in FLOATS or other.dtype != one.dtype:
        raise Decline(f"{one.name} and {other.name}: expected floats of one dtype")
    for value, letters in ((one, product.left), (other, product.right)):
        dims = dimensions(value)
        if dims is None or len(dims) != len(letters):
            raise Decline(f"{value.name}: expected {len(letters)} axes")
    for letter in product.summed:
        first, second = _length(one, product.left, letter), _length(other, product.right, letter)
        if first is None or first != second:
            raise Decline(f"the axes {letter!r} are not proven equal: {first or '?'} and {second or '?'}")
        if len(product.summed) > 1 and not _is_positive(first):
            raise Decline(
                f"sums over the axes {product.summed!r}, and the length of {letter!r} is {first}, not a number"
            )


def _stretched(op: Rewriter, product: _Product, one: onnx_ir.Value, other: onnx_ir.Value) -> onnx_ir.Value:
    """Return the product of matrices for every index of all other axes, along which MatMul stretches either tensor."""
    batch, rows, columns = product.batch, product.rows, product.columns
    left = _joined(op, one, product, product.left, batch + rows)
    right = _joined(op, other, product, product.right, batch + columns)
    last = len(batch) + len(columns)
    if len(product.summed) > 1:
        right = op.Transpose(right, perm=[*range(last - 1), last, last - 1])
    more_rows, more_columns = len(rows) - 1, len(columns) - 1
    if more_columns:
        left = op.Unsqueeze(left, [len(batch) + more_rows + index for index in range(more_columns)])
    if more_rows and (batch or more_columns):
        right = op.Unsqueeze(right, [len(batch) + index for index in range(more_rows)])
    made = batch + rows[:-1] + columns[:-1] + rows[-1] + columns[-1]
    return _turned(op, op.MatMul(left, right), made, product.result)


def _joined(op: Rewriter, value: onnx_ir.Value, product: _Product, letters: str, kept: str) -> onnx_ir.Value:
    """Return a tensor with some axes kept and the summed ones made one, which is the last, or the last but one.

    One summed axis needs no Reshape, and then the right tensor gets it before its last axis at once.
    """
    if len(product.summed) == 1:
        is_left = letters == product.left
        return _turned(op, value, letters, kept + product.summed if is_left else kept[:-1] + product.summed + kept[-1])
    turned = _turned(op, value, letters, kept + product.summed)
    lengths = [_length(value, letters, letter) for letter in product.summed]
    # A 0 keeps the length of the axis at its place, and an empty one stays empty.
    joined: onnx_ir.Value = op.Reshape(turned, [*([0] * len(kept)), math.prod(lengths)])
    return joined


def _flat(
    op: Rewriter, product: _Product, one: onnx_ir.Value, other: onnx_ir.Value, widths: Sequence[int]
) -> onnx_ir.Value:
    """Return the product of a tensor with a matrix, into which all axes of the right one are laid."""
    left = _joined(op, one, product, product.left, product.rows)
    right = _turned(op, other, product.right, product.summed + product.columns)
    lengths = [_length(other, product.right, letter) for letter in product.summed]
    # A 0 keeps the length of the axis at its place, and an empty one stays empty.
    matrix = op.Reshape(right, [0 if len(lengths) == 1 else math.prod(lengths), math.prod(widths)])
    shaped = op.Reshape(op.MatMul(left, matrix), [*([0] * len(product.rows)), *widths])
    return _turned(op, shaped, product.rows + product.columns, product.result)


def _widths(product: _Product, other: onnx_ir.Value) -> list[int] | None:
    """Return the lengths of the right tensor's own axes; None if one is not known, or 0."""
    wanted = [_length(other, product.right, letter) for letter in product.columns]
    known = [length for length in wanted if isinstance(length, int) and length > 0]
    return known if len(known) == len(wanted) else None


def _length(value: onnx_ir.Value, letters: str, letter: str) -> Any:
    """Return the length of the axis that a letter names, as a number or expression; None if it is unknown."""
    dims = dimensions(value)
    return None if dims is None else dims[letters.index(letter)]


def _is_positive(length: Any) -> bool:
    return isinstance(length, int) and length > 0


def _turned(op: Rewriter, value: onnx_ir.Value, letters: str, wanted: str) -> onnx_ir.Value:
    order = [letters.index(letter) for letter in wanted]
    return value if letters == wanted else op.Transpose(value, perm=order)
