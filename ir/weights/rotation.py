"""Define the expression that turns the rows or columns of a matrix by an orthogonal matrix R, without storing R.

R = D · (C ⊗ H) for a length m · 2^k with odd m: D holds random signs, H is the Hadamard matrix of 2^k divided by its
length √2^k, and C the Hartley matrix of m, which spreads numbers as evenly. A row costs O(n · (k + m)), not n². Every
machine gets the same bits: signs come from a hash, and sums are added in a fixed order in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Any, TypeAlias

import numpy as np

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression, _Unary

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The largest odd factor of a length: a row of n numbers costs this many times n products.
LARGEST_FACTOR = 1024


@dataclasses.dataclass(frozen=True)
class Rotate(_Unary):
    """The vectors of `operand` along the axis `along`, each multiplied from the right by the R of `seed`, in fp32."""

    along: int
    seed: int

    @property
    def by_rows(self) -> bool:
        """Return whether the rows of a matrix are turned, so that a row of the result needs one row only."""
        return len(self.shape) == 2 and self.along == 1

    @property
    def by_columns(self) -> bool:
        """Return whether the columns of a matrix are turned, so that a row of the result needs all rows."""
        return len(self.shape) == 2 and self.along == 0

    def text(self) -> str:
        return f"rotate({self.operand.text()}, axis={self.along}, seed={self.seed})"


def rotate(operand: Expression, axis: int, seed: int) -> Expression:
    """Return a vector or matrix with all vectors along an axis multiplied by R from the right.

    Args:
        operand: What is turned, in fp32: [n], or [.., n] and [n, ..] of two axes.
        axis: The axis of n numbers; a negative one counts from the back.
        seed: The seed of R.

    Raises:
        ModelError: If the operand is no vector or matrix of fp32, or there is no fast R of its length.
    """
    axis = operand.axis(axis)
    if operand.dtype != DataType.FLOAT or len(operand.shape) not in {1, 2}:
        raise ModelError(f"rotate takes a vector or matrix of fp32, not {operand.dtype.name}{list(operand.shape)}")
    reason = obstacle(operand.shape[axis])
    if reason:
        raise ModelError(f"cannot rotate {operand.text()} along axis {axis}: {reason}")
    return Rotate(operand.dtype, operand.shape, operand, axis, seed)


def obstacle(length: int) -> str:
    """Return why there is no fast rotation of so many numbers; "" if there is one."""
    odd = length // (length & -length) if length else 0
    if 0 < odd <= LARGEST_FACTOR:
        return ""
    return f"{length} has the odd factor {odd:,}, expected one between 1 and {LARGEST_FACTOR:,}"


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """An R of n numbers: signs [n], and the Hartley matrix [m, m] divided by √2^k, both in fp32."""

    signs: Array
    block: Array


@functools.lru_cache(maxsize=64)
def rotation_of(length: int, seed: int) -> Rotation:
    """Return the R of so many numbers."""
    power = length & -length
    return Rotation(_signs(length, seed), (_hartley(length // power) / math.sqrt(power)).astype(np.float32))


def _signs(length: int, seed: int) -> Array:
    """Return ±1 for each place, as bits of a hash of seed, length and block say it."""
    blocks = (
        hashlib.blake2b(f"passopt rotation {seed} {length} {index}".encode()).digest()
        for index in range(-(-length // 512))
    )
    bits = np.unpackbits(np.frombuffer(b"".join(blocks), np.uint8))[:length]
    signs: Array = np.float32(1) - 2 * bits.astype(np.float32)
    return signs


def _hartley(length: int) -> Array:
    """Return cas(2π·i·j / length) / √length in fp64, a symmetric orthogonal matrix.

    Rounded to fp32 it is the same on all machines, whose sines differ in the last bit of fp64 at most.
    """
    angles = np.array([math.cos(turn) + math.sin(turn) for turn in (2 * math.pi * i / length for i in range(length))])
    places = np.arange(length)
    matrix: Array = angles[np.outer(places, places) % length] / math.sqrt(length)
    return matrix


def rotate_rows(values: Array, rotation: Rotation) -> Array:
    """Return the rows of an fp32 matrix [rows, n], each multiplied by R from the right.

    Compiled kernels give the same bits.
    """
    rows, columns = values.shape
    count = len(rotation.block)
    width = columns // count
    found: Array = values * rotation.signs
    for _ in range(width.bit_length() - 1):
        # Every step adds and subtracts the halves and interleaves the results, so that all steps are alike.
        halves = found.reshape(rows, count, 2, width // 2)
        found = np.empty((rows, count, width // 2, 2), np.float32)
        np.add(halves[:, :, 0], halves[:, :, 1], out=found[..., 0])
        np.subtract(halves[:, :, 0], halves[:, :, 1], out=found[..., 1])
    blocks = found.reshape(rows, count, width)
    result: Array = np.empty((rows, count, width), np.float32)
    for to in range(count):
        np.multiply(blocks[:, 0], rotation.block[0, to], out=result[:, to])
        for of in range(1, count):
            result[:, to] += blocks[:, of] * rotation.block[of, to]
    return result.reshape(rows, columns)


def rotate_columns(values: Array, rotation: Rotation, panel: int = 64) -> None:
    """Multiply every column of an fp32 matrix [n, columns] by R, in place, a panel of columns at a time."""
    for start in range(0, values.shape[1], panel):
        part = values[:, start : start + panel]
        part[...] = rotate_rows(np.ascontiguousarray(part.T), rotation).T
