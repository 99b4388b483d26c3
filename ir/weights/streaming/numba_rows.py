"""Compute the functions of `ir.weights.row_math` with numba, bit for bit the same.

16-bit floats are widened, rounded and narrowed by integer arithmetic on their bits. Each loop over a row is simple
enough for LLVM to vectorise, and the fp32 copy of a row stays in the nearest cache. Nothing here may be compiled with
fast math, because the roundings have to be exact.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The numbers by which the kernels are told a kind of float.
FP32, FP16, BF16 = 0, 1, 2

_LANES = 16
_F32, _U32 = np.float32, np.uint32
#: This is 1.5 · 2^23: after it is added, the lowest byte of the bits is the integer, rounded half to even.
_ROUNDER = _F32(12582912.0)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def absmax(bits: Array, out: Array) -> None:
    """Write the largest magnitude of each row to `out`, as bits: without sign, floats are ordered like integers."""
    mask = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    lanes = np.zeros(64, bits.dtype)
    rows, columns = bits.shape
    whole = columns // 64 * 64
    for i in range(rows):
        for lane in range(64):
            lanes[lane] = 0
        for j in range(0, whole, 64):
            for lane in range(64):
                lanes[lane] = max(lanes[lane], bits[i, j + lane] & mask)
        peak = bits.dtype.type(0)
        for lane in range(64):
            peak = max(peak, lanes[lane])
        for j in range(whole, columns):
            peak = max(peak, bits[i, j] & mask)
        out[i] = peak


@_compiled
def absmax_columns(bits: Array, out: Array) -> None:
    """Raise each number in `out` to the largest magnitude of its column, as bits; `out` holds earlier results."""
    mask = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    rows, columns = bits.shape
    for i in range(rows):
        for j in range(columns):
            out[j] = max(out[j], bits[i, j] & mask)


@_compiled
def transpose(source: Array, out: Array) -> None:
    """Write `out[j, i] = source[i, j]` tile by tile, so that both matrices stay in the nearest cache."""
    rows, columns = source.shape
    tile = 32
    for i in range(0, rows, tile):
        for j in range(0, columns, tile):
            for column in range(j, min(j + tile, columns)):
                for row in range(i, min(i + tile, rows)):
                    out[column, row] = source[row, column]


@_compiled
def _widen(row: Array, kind: int, floats: Array, bits: Array) -> None:
    """Convert a row of bits to fp32.

    For fp16, mantissa and exponent are shifted into place and scaled, which is exact.
    """
    columns = row.shape[0]
    if kind == FP32:
        for j in range(columns):
            bits[j] = row[j]
    elif kind == BF16:
        for j in range(columns):
            bits[j] = _U32(row[j]) << _U32(16)
    else:
        for j in range(columns):
            x = _U32(row[j])
            bits[j] = ((x & _U32(0x7FFF)) << _U32(13)) | ((x & _U32(0x8000)) << _U32(16))
        for j in range(columns):
            floats[j] = floats[j] * _F32(5.192296858534828e33)  # 2^112
        for j in range(columns):
            special = (_U32(row[j]) & _U32(0x7C00)) == _U32(0x7C00)  # infinite or NaN
            bits[j] = bits[j] | (_U32(0x7F800000) if special else _U32(0))


@_compiled
def _round(kind: int, floats: Array, bits: Array, spare: Array) -> None:
    """Round a row of fp32 to fp16 or bf16, half to even, but keep it in fp32.

    What is too large becomes infinite. The row must not contain NaN.
    """
    columns = bits.shape[0]
    if kind == BF16:
        for j in range(columns):
            x = bits[j]
            bits[j] = (x + _U32(0x7FFF) + ((x >> _U32(16)) & _U32(1))) & _U32(0xFFFF0000)
    elif kind == FP16:
        # Below 2^-14 the step is 2^-24, which is the step of fp32 between 1/2 and 1.
        for j in range(columns):
            spare[j] = (abs(floats[j]) + _F32(0.5)) - _F32(0.5)
        small = spare.view(np.uint32)
        for j in range(columns):
            sign = bits[j] & _U32(0x80000000)
            x = bits[j] ^ sign
            normal = (x + _U32(0xFFF) + ((x >> _U32(13)) & _U32(1))) & _U32(0xFFFFE000)
            normal = normal if normal < _U32(0x47800000) else _U32(0x7F800000)
            bits[j] = sign | (normal if x >= _U32(0x38800000) else small[j])


@_compiled
def _narrow(kind: int, floats: Array, bits: Array, spare: Array, out: Array) -> None:
    """Store a row of fp32 that is already rounded to `kind` as bits of `kind`."""
    columns = bits.shape[0]
    if kind == FP32:
        for j in range(columns):
            out[j] = bits[j]
    elif kind == BF16:
        for j in range(columns):
            out[j] = bits[j] >> _U32(16)
    else:
        for j in range(columns):
            # Times 2^24, numbers below 2^-14 are integers; adding 2^23 puts them into the lowest bits.
            spare[j] = abs(floats[j]) * _F32(16777216.0) + _F32(8388608.0)
        small = spare.view(np.uint32)
        for j in range(columns):
            sign = (bits[j] >> _U32(16)) & _U32(0x8000)
            x = bits[j] & _U32(0x7FFFFFFF)
            normal = (x >> _U32(13)) - _U32(112 << 10)
            normal = normal if x < _U32(0x7F800000) else _U32(0x7C00)
            out[j] = sign | (normal if x >= _U32(0x38800000) else small[j] & _U32(0x7FFFFF))


@_compiled
def _load(row: Array, kind: int, through: int, floats: Array, bits: Array, spare: Array) -> None:
    """Convert a row of bits to fp32, rounded to `through` if that differs from `kind`."""
    _widen(row, kind, floats, bits)
    if through != kind:
        _round(through, floats, bits, spare)


@_compiled
def codes(source: Array, kind: int, through: int, scales: Array, along: int, out: Array) -> None:
    """Write int8 codes of finite rows to `out`, with one fp32 scale per index of axis `along`.

    The values, which are of `kind`, are first rounded to `through`, which may be the same kind.
    """
    rows, columns = source.shape
    floats = np.empty(columns, np.float32)
    spare = np.empty(columns, np.float32)
    bits = floats.view(np.uint32)
    for i in range(rows):
        _load(source[i], kind, through, floats, bits, spare)
        if along == 0:
            scale = scales[i]
            for j in range(columns):
                floats[j] = min(max(floats[j] / scale, _F32(-127)), _F32(127)) + _ROUNDER
        else:
            for j in range(columns):
                floats[j] = min(max(floats[j] / scales[j], _F32(-127)), _F32(127)) + _ROUNDER
        for j in range(columns):
            out[i, j] = np.int8(bits[j] & _U32(0xFF))


@_compiled
def cast(source: Array, kind: int, target: int, out: Array) -> tuple[int, bool]:
    """Write rows, rounded to `target`, to `out`.

    Return how many finite values became infinite, and whether there was a NaN, which makes the result invalid.
    """
    rows, columns = source.shape
    floats = np.empty(columns, np.float32)
    spare = np.empty(columns, np.float32)
    bits = floats.view(np.uint32)
    lost, largest = 0, _U32(0)
    for i in range(rows):
        _widen(source[i], kind, floats, bits)
        before, peak = 0, _U32(0)
        for j in range(columns):
            x = bits[j] & _U32(0x7FFFFFFF)
            peak = max(peak, x)
            before += x == _U32(0x7F800000)
        largest = max(largest, peak)
        _round(target, floats, bits, spare)
        after = 0
        for j in range(columns):
            after += (bits[j] & _U32(0x7FFFFFFF)) == _U32(0x7F800000)
        _narrow(target, floats, bits, spare, out[i])
        lost += after - before
    return lost, bool(largest > _U32(0x7F800000))


@_compiled
def normalize(source: Array, kind: int, through: int, epsilon: float, out: Array, target: int) -> None:
    """Write finite rows, rounded to `through`, divided by max(norm, epsilon) and rounded to `target`, to `out`."""
    rows, columns = source.shape
    floats = np.empty(columns, np.float32)
    spare = np.empty(columns, np.float32)
    bits = floats.view(np.uint32)
    lanes = np.zeros(_LANES, np.float64)
    whole = columns // _LANES * _LANES
    for i in range(rows):
        _load(source[i], kind, through, floats, bits, spare)
        for lane in range(_LANES):
            lanes[lane] = 0
        for j in range(0, whole, _LANES):
            for lane in range(_LANES):
                wide = np.float64(floats[j + lane])
                lanes[lane] += wide * wide
        for j in range(whole, columns):
            wide = np.float64(floats[j])
            lanes[j - whole] += wide * wide
        total = 0.0
        for lane in range(_LANES):
            total += lanes[lane]
        length = max(_F32(np.sqrt(total)), _F32(epsilon))
        for j in range(columns):
            floats[j] = floats[j] / length
        _round(target, floats, bits, spare)
        _narrow(target, floats, bits, spare, out[i])


#: Rows or columns that are rotated side by side: loops over them need no shuffles, and they fit the second cache.
_TOGETHER = 32
#: Steps that mix numbers nearer than this many places are done block by block, in the nearest cache.
_NEAR = 32


@_compiled
def _mix_four(one: Array, two: Array, three: Array, four: Array) -> None:
    """Do two steps of a Hadamard transform: add and subtract the farther parts, then the nearer ones."""
    for j in range(one.shape[0]):
        a, b = one[j] + three[j], two[j] + four[j]
        c, d = one[j] - three[j], two[j] - four[j]
        one[j], two[j], three[j], four[j] = a + b, a - b, c + d, c - d


@_compiled
def _mix_two(one: Array, two: Array) -> None:
    for j in range(one.shape[0]):
        a, b = one[j], two[j]
        one[j], two[j] = a + b, a - b


@_compiled
def _mix(flat: Array, start: int, stop: int, distance: int, last: int) -> int:
    """Do pairs of steps from `distance` on, as long as both are at least `last`; return the next distance."""
    while distance >= 2 * last:
        part = distance // 2 * _TOGETHER
        for i in range(start, stop, 4 * part):
            _mix_four(
                flat[i : i + part],
                flat[i + part : i + 2 * part],
                flat[i + 2 * part : i + 3 * part],
                flat[i + 3 * part : i + 4 * part],
            )
        distance //= 4
    return distance


@_compiled
def _rotate_panel(flat: Array, signs: Array, block: Array, out: Array) -> None:
    """Write n rows of `_TOGETHER` numbers, each column of them times R, to `out`; `flat` is overwritten."""
    columns, count = signs.shape[0], block.shape[0]
    width = columns // count
    for j in range(columns):
        sign = signs[j]
        for i in range(j * _TOGETHER, (j + 1) * _TOGETHER):
            flat[i] *= sign
    whole = columns * _TOGETHER
    distance = _mix(flat, 0, whole, width // 2, _NEAR)
    span = max(2 * distance, 1) * _TOGETHER
    for start in range(0, whole, span):
        if _mix(flat, start, start + span, distance, 1) == 1:
            for i in range(start, start + span, 2 * _TOGETHER):
                _mix_two(flat[i : i + _TOGETHER], flat[i + _TOGETHER : i + 2 * _TOGETHER])
    part = width * _TOGETHER
    for to in range(count):
        made = out[to * part : (to + 1) * part]
        factor = block[0, to]
        for j in range(part):
            made[j] = flat[j] * factor
        for of in range(1, count):
            factor = block[of, to]
            source = flat[of * part : (of + 1) * part]
            for j in range(part):
                made[j] += source[j] * factor


@_compiled
def rotate(source: Array, signs: Array, block: Array, out: Array) -> None:
    """Write the rows of an fp32 matrix times R to `out`."""
    rows, columns = source.shape
    flat, turned = np.zeros(columns * _TOGETHER, np.float32), np.empty(columns * _TOGETHER, np.float32)
    tile = 16
    for start in range(0, rows, _TOGETHER):
        count = min(_TOGETHER, rows - start)
        for left in range(0, columns, tile):
            for i in range(count):
                for j in range(left, min(left + tile, columns)):
                    flat[j * _TOGETHER + i] = source[start + i, j]
        _rotate_panel(flat, signs, block, turned)
        for left in range(0, columns, tile):
            for i in range(count):
                for j in range(left, min(left + tile, columns)):
                    out[start + i, j] = turned[j * _TOGETHER + i]


@_compiled
def rotate_columns(matrix: Array, signs: Array, block: Array) -> None:
    """Multiply the columns of an fp32 matrix by R in place."""
    rows, columns = matrix.shape
    flat, turned = np.zeros(rows * _TOGETHER, np.float32), np.empty(rows * _TOGETHER, np.float32)
    for start in range(0, columns, _TOGETHER):
        count = min(_TOGETHER, columns - start)
        for i in range(rows):
            for j in range(count):
                flat[i * _TOGETHER + j] = matrix[i, start + j]
        _rotate_panel(flat, signs, block, turned)
        for i in range(rows):
            for j in range(count):
                matrix[i, start + j] = turned[i * _TOGETHER + j]
