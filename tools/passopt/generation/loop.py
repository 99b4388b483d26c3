"""Run the loop of generation: pad prompts on the left, prefill in chunks, then choose one token per row and step.

It ends when every row has ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from passopt.generation.open_engine import Bounds, Engine
from passopt.generation.sampling import Sampler, Sampling
from passopt.ir.errors import ModelError, UsageError

#: The number of columns per call at prefill. It bounds the memory for logits, which are computed for all columns of a
#: call at once, and the time that Ctrl-C waits for a call to end.
CHUNK = 512


End: TypeAlias = Literal["eos", "stop", "length", "positions"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The continuation of one prompt: its new token ids, without the end token, and the reason why it ended.

    `end` is "eos" if the end token came, "stop" if the caller ended it, "length" if the allowed tokens ran out,
    "positions" if the model's positions did.
    """

    ids: tuple[int, ...]
    end: End


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuations of all prompts, with figures.

    Times are in seconds from the first call of the engine; `new_tokens` counts end tokens too.
    """

    rows: tuple[Row, ...]
    prompt_tokens: int
    new_tokens: int
    first_token: float
    total: float
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed of all rows together after the first token of each, or None if no token came after it."""
        after = self.new_tokens - len(self.rows)
        spent = self.total - self.first_token
        return after / spent if after > 0 and spent > 0 else None


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos: frozenset[int] = frozenset(),
    pad: int = 0,
    capacity: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_end: Callable[[int], None] | None = None,
    stop: Callable[[int, Sequence[int]], bool] | None = None,
) -> Generation:
    """Continue every prompt by at most `max_new_tokens` tokens, or until a token of `eos`.

    Args:
        engine: The engine of the model.
        prompts: The token ids of each prompt.
        sampling: How tokens are chosen.
        max_new_tokens: The largest number of new tokens per prompt.
        eos: The tokens that end a row.
        pad: The token that pads shorter prompts on the left.
        capacity: The number of columns of the cache; None for what is needed.
        on_token: A function that gets the row and the token as tokens come, end tokens excepted.
        on_end: A function that gets each row once, after its last token.
        stop: A function that gets a row and all its new tokens after each of them, and says whether the row ends.

    Raises:
        UsageError: In the cases of `cache_size_for`, before anything runs.
        ModelError: If logits are not finite.
    """
    size = cache_size_for(engine, prompts, max_new_tokens, capacity)
    engine.allocate(len(prompts), size.columns)
    run = _Run(engine, prompts, sampling, size.width, eos, pad, on_token, on_end, stop)
    return run.result(size.steps, "length" if size.steps == max_new_tokens else "positions")


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """The size of the cache that a set of prompts needs.

    `width` is the number of columns of the longest prompt, `steps` the largest number of new tokens, and `columns` the
    number of columns of the cache.
    """

    width: int
    steps: int
    columns: int


def cache_size_for(
    bounds: Bounds, prompts: Sequence[Sequence[int]], max_new_tokens: int, capacity: int | None
) -> CacheSize:
    """Return the room that the prompts and their new tokens need.

    Args:
        bounds: The vocabulary and the positions of the model.
        prompts: The token ids of each prompt.
        max_new_tokens: The number of new tokens that is asked for; fewer are planned if the positions run out.
        capacity: The number of columns of the cache; None for what is needed.

    Raises:
        UsageError: If there is no prompt, a prompt is empty or too long, a token id is outside of the vocabulary, no
            new token is asked for, or `capacity` is too small.
    """
    width = _checked_width(bounds, prompts, max_new_tokens)
    steps = max_new_tokens
    if bounds.max_positions is not None:
        # The last token is not fed to the model, so there may be one more token than positions left.
        steps = min(steps, bounds.max_positions - width + 1)
    needed = width + steps - 1
    if capacity is not None and capacity < needed:
        raise UsageError(
            f"{width} prompt tokens and {steps} new ones take {needed} columns of the cache, `capacity` is {capacity}. "
            f"Raise it, or ask for fewer new tokens."
        )
    return CacheSize(width, steps, capacity or needed)


def _checked_width(bounds: Bounds, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    if not prompts:
        raise UsageError("there is no prompt")
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens: at least one is needed")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UsageError(f"prompt {number} is empty: there is no token to continue from")
        if bounds.max_positions is not None and len(prompt) > bounds.max_positions:
            raise UsageError(
                f"prompt {number} has {len(prompt)} tokens, the model {bounds.max_positions} positions; shorten it"
            )
        bad = next((index for index in prompt if not 0 <= index < bounds.vocab), None)
        if bad is not None:
            raise UsageError(f"prompt {number}: token id {bad} is outside of the vocabulary (0 to {bounds.vocab - 1})")
    return max(map(len, prompts))


class _Run:
    """One run of the loop: the padded prompts of a batch, and the tokens found so far."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        width: int,
        eos: frozenset[int],
        pad: int,
        on_token: Callable[[int, int], None] | None,
        on_end: Callable[[int], None] | None,
        stop: Callable[[int, Sequence[int]], bool] | None,
    ) -> None:
        self.engine = engine
        # A pad token may lie outside of the vocabulary. Its results are never read, so any token will do.
        self.pad = pad if 0 <= pad < engine.vocab else 0
        self.ids = np.full((len(prompts), width), self.pad, np.int64)
        self.mask = np.zeros((len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):
            self.ids[row, width - len(prompt) :] = prompt
            self.mask[row, width - len(prompt) :] = 1
        self.sampler = Sampler(sampling, prompts, engine.vocab)
        self.eos = eos
        self.on_token, self.on_end, self.stop = on_token, on_end, stop
        self.found: list[list[int]] = [[] for _ in prompts]
        self.ended: list[End | None] = [None] * len(prompts)
        self.count = 0

    def result(self, steps: int, otherwise: Literal["length", "positions"]) -> Generation:
        """Run the loop to its end, and return the rows; `otherwise` is the end of rows without an end token."""
        start = time.perf_counter()
        tokens = self._choose(self._prefill())
        first = time.perf_counter() - start
        for _ in range(steps - 1):
            if all(self.ended):
                break
            self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
            tokens = self._choose(self.engine.forward(tokens[:, None], self.mask)[:, -1])
        total = time.perf_counter() - start
        for row, ended in enumerate(self.ended):
            if not ended and self.on_end:
                self.on_end(row)
        rows = tuple(Row(tuple(ids), end or otherwise) for ids, end in zip(self.found, self.ended, strict=True))
        return Generation(
            rows, int(self.mask[:, : self.ids.shape[1]].sum()), self.count, first, total, self.engine.cache_bytes
        )

    def _prefill(self) -> npt.NDArray[np.float32]:
        width = self.ids.shape[1]
        for begin in range(0, width, CHUNK):
            stop = min(begin + CHUNK, width)
            logits = self.engine.forward(self.ids[:, begin:stop], self.mask[:, :stop])
        return logits[:, -1]

    def _choose(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return the next token of every row; a row that has ended gets padding, whose results are never read.

        Raises:
            ModelError: If the logits of a row hold NaN, or no finite number.
        """
        tokens = np.full(len(self.found), self.pad, np.int64)
        for row, ended in enumerate(self.ended):
            if ended:
                continue
            if np.isnan(logits[row]).any() or not np.isfinite(logits[row]).any():
                raise ModelError(f"prompt {row + 1}: the logits of token {len(self.found[row]) + 1} are not finite")
            token = self.sampler.choose(row, logits[row])
            tokens[row] = token
            self.count += 1
            self._take(row, token)
        return tokens

    def _take(self, row: int, token: int) -> None:
        if token in self.eos:
            self._end(row, "eos")
            return
        self.found[row].append(token)
        if self.on_token:
            self.on_token(row, token)
        if self.stop and self.stop(row, self.found[row]):
            self._end(row, "stop")

    def _end(self, row: int, end: End) -> None:
        self.ended[row] = end
        if self.on_end:
            self.on_end(row)
