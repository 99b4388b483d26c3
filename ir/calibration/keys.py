"""Name a weight by what it is made of, so that what was measured is found again in another graph that reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from passopt.ir.errors import ModelError
from passopt.ir.weights.expressions import Cast, Expression, Source, Transpose
from passopt.ir.weights.literals import Literal

#: The bytes of a weight that its fingerprint takes into account: so many places, and so many bytes at each of them.
_PLACES, _BYTES = 16, 1024


def peeled(weight: Expression) -> Expression:
    """Return a weight without the casts and transpositions around it."""
    while isinstance(weight, (Cast, Transpose)):
        weight = weight.operand
    return weight


def weight_key(weight: Expression) -> str:
    """Return the name under which a calibration folder knows a weight: the text of its expression.

    Casts and transpositions around it do not count, so that a weight has the same name in each dtype and however a
    linear reads it. Shards, padding and slices do; `stored_codes` looks below them.
    """
    return peeled(weight).text()


def fingerprint(weight: Expression) -> str:
    """Return a digest of some bytes of all tensors that a weight is made of, to tell it from that of another model.

    Raises:
        ModelError: If a file of it cannot be read.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for part in peeled(weight).walk():
        if isinstance(part, Literal):
            hasher.update(part.data)
        if isinstance(part, Source):
            _add_sample(hasher, part)
    return hasher.hexdigest()


def _add_sample(hasher: hashlib.blake2b, source: Source) -> None:
    hasher.update(f"{source.dtype.name}{list(source.shape)}".encode())
    last = max(source.nbytes - _BYTES, 0)
    places = sorted({last * index // (_PLACES - 1) for index in range(_PLACES)})
    try:
        with Path(source.file.path).open("rb") as file:
            for place in places:
                file.seek(source.offset + place)
                hasher.update(file.read(min(_BYTES, source.nbytes)))
    except OSError as error:
        raise ModelError(f"{source.file.path}: cannot be read: {error.strerror}") from error
