"""Combine the digests of many tensors into one."""

from __future__ import annotations

from collections.abc import Mapping

import blake3


def root_digest(digests: Mapping[str, str]) -> str:
    """Return one digest for a whole set of tensors, given the digest of each tensor by name.

    It is the blake3 (in hexadecimal) of the lines `name digest`, sorted by name. Two root digests are equal exactly if
    the names and the bytes of all tensors are equal.
    """
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return str(blake3.blake3("".join(lines).encode()).hexdigest())
