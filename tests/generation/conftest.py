"""An engine that is a formula: the next token is told by the columns that the mask counts, so any mix-up shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


class FakeEngine:
    """Logits of a row depend on its counted tokens, in their order, and on nothing else."""

    vocab = 23

    def __init__(self, max_positions: int | None = None) -> None:
        self.max_positions = max_positions
        self.batch = self.capacity = self.past = 0
        self.cache_bytes = 0
        self.calls: list[int] = []
        self._ids = np.zeros((0, 0), int)

    def allocate(self, batch: int, capacity: int | None = None) -> None:
        assert capacity is not None
        self.batch, self.capacity = batch, capacity
        self.cache_bytes = 8 * batch * capacity
        self.reset()

    def reset(self) -> None:
        self.past = 0
        self._ids = np.zeros((self.batch, 0), int)

    def forward(self, ids: Any, mask: Any) -> np.ndarray[Any, Any]:
        ids, mask = np.asarray(ids), np.asarray(mask)
        self._ids = np.concatenate([self._ids, ids], axis=1)
        assert self._ids.shape == mask.shape
        assert mask.shape[1] <= self.capacity
        self.past = mask.shape[1]
        self.calls.append(ids.shape[1])
        return np.stack([logits_after(row[counted == 1]) for row, counted in zip(self._ids, mask)])[:, None]


def logits_after(tokens: Any) -> np.ndarray[Any, Any]:
    """Of random numbers that the tokens seed."""
    return np.random.default_rng([len(tokens), *map(int, tokens)]).standard_normal(FakeEngine.vocab).astype(np.float32)


@pytest.fixture
def make_engine():
    return FakeEngine
