"""Run tokens through an engine and return what it predicts, in blocks of rows whose memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.generation.loop import CHUNK
from passopt.generation.open_engine import Engine
from passopt.ir.errors import ModelError, UsageError
from passopt.predictions.divergence import log_softmax, row_slices

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Scorer:
    """An engine that is asked for the log-probabilities of given tokens.

    Args:
        engine: The engine.
        name: What errors call the model.
        last_only: Whether the engine gives the logits of the last position of a call only. Tokens that are scored then
            run one by one.
        room: The largest number of tokens that will be read at once.
    """

    def __init__(self, engine: Engine, name: str, *, last_only: bool, room: int) -> None:
        self._engine = engine
        self._name = name
        self._last_only = last_only
        engine.allocate(1, room)

    def blocks(self, tokens: Sequence[int] | Array, scored: int) -> Iterator[tuple[Array, Array]]:
        """Yield log-probabilities [rows, vocab] and their targets [rows], which are the last `scored` tokens in order.

        Raises:
            UsageError: If a token id is outside of the model's vocabulary.
            ModelError: If logits are not finite.
        """
        ids = np.asarray(tokens, np.int64)
        self._check(ids)
        self._engine.reset()
        total = len(ids) - 1  # the last token is predicted, and need not be read
        first = total - scored
        at = 0
        while at < total:
            stop = self._stop(at, first, total)
            logits = self._engine.forward(ids[None, at:stop], np.ones((1, stop), np.int64))[0]
            counted = min(stop - first, len(logits))
            if counted > 0:
                yield from self._judged(logits[-counted:], ids[stop - counted + 1 : stop + 1], stop - counted)
            at = stop

    def _stop(self, at: int, first: int, total: int) -> int:
        """Return where the call that begins with token `at` ends."""
        if not self._last_only:
            return min(at + CHUNK, total)
        return at + 1 if at > first else min(at + CHUNK, first + 1)

    def _judged(self, logits: Array, targets: Array, place: int) -> Iterator[tuple[Array, Array]]:
        for rows in row_slices(logits):
            found = log_softmax(logits[rows])
            if np.isnan(found).any():
                bad = place + rows.start + int(np.isnan(found).any(axis=-1).argmax())
                raise ModelError(
                    f"{self._name}: its logits after token {bad + 1} of a sequence are not finite, so nothing can be "
                    f"said of its predictions; run `passopt verify` on it"
                )
            yield found, targets[rows]

    def _check(self, ids: Array) -> None:
        vocab = self._engine.vocab
        bad = ids[(ids < 0) | (ids >= vocab)]
        if len(bad):
            raise UsageError(
                f"{self._name}: token id {bad[0]} is outside of its vocabulary (0 to {vocab - 1}); the tokenizer is "
                f"another model's"
            )
