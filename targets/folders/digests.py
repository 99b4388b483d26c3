"""Digests over many tensors."""

from __future__ import annotations

from collections.abc import Mapping

import blake3


def root_digest(digests: Mapping[str, str]) -> str:
    """blake3 over `name digest` lines, sorted: equal exactly if names and bytes of all tensors are equal."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return str(blake3.blake3("".join(lines).encode()).hexdigest())
