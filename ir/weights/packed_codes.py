"""Define the expressions between int8 codes and the 32-bit words in which files of quantisers hold them."""

from __future__ import annotations

import dataclasses

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import DataType, Expression

_WORD = 32
#: The numbers of bits of a code of which a word holds a whole number, without codes that cross bytes.
CODE_BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class _Along(Expression):
    """An operation on each row of a matrix; `bits` are those of a code."""

    operand: Expression
    bits: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)


@dataclasses.dataclass(frozen=True)
class UnpackCodes(_Along):
    """The codes in the words of each row of `operand`, lowest bits first, less 2^(bits − 1), as int8."""

    def text(self) -> str:
        return f"unpack_codes({self.operand.text()}, bits={self.bits})"


@dataclasses.dataclass(frozen=True)
class PackCodes(_Along):
    """The codes of each row of `operand`, plus 2^(bits − 1), in words of int32, lowest bits first."""

    def text(self) -> str:
        return f"pack_codes({self.operand.text()}, bits={self.bits})"


def codes_per_word(bits: int) -> int:
    """Return how many codes a word holds; raise ModelError unless codes are of 4 or 8 bits."""
    if bits not in CODE_BITS:
        raise ModelError(f"codes of {bits} bits, expected one of {', '.join(map(str, CODE_BITS))}")
    return _WORD // bits


def unpack_codes(words: Expression, bits: int) -> Expression:
    """Return the codes [n, k] in a matrix of words [n, k · bits / 32].

    Args:
        words: The words, int32; the lowest bits are the first code.
        bits: The bits of a code; it is stored plus 2^(bits − 1).

    Raises:
        ModelError: If this is no matrix of int32, or codes are not of 4 or 8 bits.
    """
    if len(words.shape) != 2 or words.dtype != DataType.INT32:
        raise ModelError(f"codes lie in an int32 matrix, not in {words.dtype.name}{list(words.shape)}")
    rows, columns = words.shape
    return UnpackCodes(DataType.INT8, (rows, columns * codes_per_word(bits)), words, bits)


def pack_codes(codes: Expression, bits: int) -> Expression:
    """Return the codes [n, k] as words [n, k · bits / 32].

    Args:
        codes: The codes, int8, of which each fits the bits.
        bits: The bits of a code; it is stored plus 2^(bits − 1), the first in the lowest bits.

    Raises:
        ModelError: If this is no matrix of int8 whose rows fill words, or codes are not of 4 or 8 bits.
    """
    per_word = codes_per_word(bits)
    if len(codes.shape) != 2 or codes.dtype != DataType.INT8 or codes.shape[1] % per_word:
        raise ModelError(
            f"codes are packed from an int8 matrix of rows that {per_word} divides, not from "
            f"{codes.dtype.name}{list(codes.shape)}"
        )
    return PackCodes(DataType.INT32, (codes.shape[0], codes.shape[1] // per_word), codes, bits)
