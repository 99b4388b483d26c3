"""Define the pass `decompose-einsum`, which spells products by Einsum as MatMul, so that the fusions see them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

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
    """Write the Einsum of two tensors that sums over one axis as MatMul, with Transpose and Reshape around it.

    Before: ``y = Einsum<equation="bqhd,bkhd->bhqk">(q, k)``
    After:  ``y = MatMul(Transpose(q, [0,2,1,3]), Transpose(k, [0,2,3,1]))``
    Each tensor may have several axes of its own only if there is no axis of both in the result; those of the right one
    then become one axis. An Einsum that repeats a letter, sums over an axis of one tensor, leaves the axes open
    (`...`), or whose summed lengths are not proven equal stays: Einsum stretches lengths of 1, and MatMul does not.
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
        if product.batch:
            return [_batched(op, product, one, other)]
        if len(product.columns) > 1 and (len(product.rows) == 1 or _widths(product, other) is None):
            product, one, other = product.turned(), other, one
        return [_flat(op, product, one, other)]


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
    if len(summed) != 1 or not own or not others:
        raise Decline(f"equation {equation!r}: expected one axis to sum over, and an axis of each tensor in the result")
    if batch and (len(own) > 1 or len(others) > 1):
        raise Decline(f"equation {equation!r}: a tensor has several axes of its own beside those of both")
    return _Product(left, right, result, batch, own, others, summed, swapped)


def _check(product: _Product, one: onnx_ir.Value, other: onnx_ir.Value) -> None:
    """Raise Decline unless both tensors hold floats and their summed axes are proven to be as long as each other."""
    if one.dtype not in FLOATS or other.dtype != one.dtype:
        raise Decline(f"{one.name} and {other.name}: expected floats of one dtype")
    lengths = []
    for value, letters in ((one, product.left), (other, product.right)):
        dims = dimensions(value)
        if dims is None or len(dims) != len(letters):
            raise Decline(f"{value.name}: expected {len(letters)} axes")
        lengths.append(dims[letters.index(product.summed)])
    if lengths[0] is None or lengths[0] != lengths[1]:
        raise Decline(f"the axes {product.summed!r} are not proven equal: {lengths[0] or '?'} and {lengths[1] or '?'}")


def _batched(op: Rewriter, product: _Product, one: onnx_ir.Value, other: onnx_ir.Value) -> onnx_ir.Value:
    """Return the product of matrices for every index of the axes of both, in the order of the result."""
    left = _turned(op, one, product.left, product.batch + product.rows + product.summed)
    right = _turned(op, other, product.right, product.batch + product.summed + product.columns)
    made = product.batch + product.rows + product.columns
    return _turned(op, op.MatMul(left, right), made, product.result)


def _flat(op: Rewriter, product: _Product, one: onnx_ir.Value, other: onnx_ir.Value) -> onnx_ir.Value:
    """Return the product of a tensor with a matrix, into which all axes of the right one are laid."""
    left = _turned(op, one, product.left, product.rows + product.summed)
    right = _turned(op, other, product.right, product.summed + product.columns)
    made = product.rows + product.columns
    if len(product.columns) == 1:
        return _turned(op, op.MatMul(left, right), made, product.result)
    widths = _widths(product, other)
    if widths is None:
        raise Decline(f"{other.name}: expected known lengths of the axes {product.columns!r}")
    matrix = op.Reshape(right, [widths[0], math.prod(widths[1:])])
    # A 0 keeps the length of the axis at its place, and an empty one stays empty.
    shaped = op.Reshape(op.MatMul(left, matrix), [*([0] * len(product.rows)), *widths[1:]])
    return _turned(op, shaped, made, product.result)


def _widths(product: _Product, other: onnx_ir.Value) -> list[int] | None:
    """Return the lengths of the right tensor's axes, that of the summed one first; None if one is not known, or 0."""
    dims = dimensions(other)
    if dims is None:
        return None
    wanted = [dims[product.right.index(letter)] for letter in product.summed + product.columns]
    known = [length for length in wanted if isinstance(length, int) and length > 0]
    return known if len(known) == len(wanted) else None


def _turned(op: Rewriter, value: onnx_ir.Value, letters: str, wanted: str) -> onnx_ir.Value:
    order = [letters.index(letter) for letter in wanted]
    return value if letters == wanted else op.Transpose(value, perm=order)
