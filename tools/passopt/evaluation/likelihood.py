"""Compute the likelihood of continuations of texts, such as the choices of a question."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.evaluation.scored_rows import Scorer
from passopt.evaluation.text_tokens import TextReader
from passopt.generation.settings import read_settings
from passopt.ir.errors import UsageError
from passopt.predictions.divergence import surprises

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Token ids after which others are scored.

    Attributes:
        context: The ids that are read, int64; at least one.
        scored: The ids whose likelihood is asked for; at least one.
    """

    context: Array
    scored: Array

    @property
    def read(self) -> int:
        """Return the number of tokens that a model reads; the last one is only predicted."""
        return len(self.context) + len(self.scored) - 1

    def within(self, positions: int | None) -> Continuation:
        """Return the same with the beginning of its context left out, as far as the model's positions need that.

        Raises:
            UsageError: If the scored ids alone are too many.
        """
        if positions is None or self.read <= positions:
            return self
        kept = positions + 1 - len(self.scored)
        if kept < 1:
            raise UsageError(f"a continuation of {len(self.scored)} tokens is longer than the {positions} positions")
        return Continuation(self.context[-kept:], self.scored)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of a continuation in nats, and whether each of its tokens is the most likely one."""

    log: float
    is_greedy: bool


def encode_continuation(reader: TextReader, context: str, continuation: str) -> Continuation:
    """Return the token ids of a text and of what follows it, tokenised together.

    Spaces at the end of the context count as the beginning of the continuation, since tokenizers write them there.
    Tokens that both texts share are the context.

    Raises:
        UsageError: If the continuation is empty.
    """
    bare = context.rstrip(" ")
    continuation = context[len(bare) :] + continuation
    if not continuation:
        raise UsageError("a continuation is empty: there is nothing whose likelihood could be asked for")
    alone = [*reader.begin, *(reader.tokenizer.encode_text(bare) if bare else [])]
    whole = [*reader.begin, *reader.tokenizer.encode_text(bare + continuation)]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))
    shared = min(sum(1 for _ in same), len(whole) - 1)
    if shared < 1:  # a model needs a token to begin with; one that has no beginning takes the end of a text before
        eos = sorted(read_settings(reader.folder).eos)
        whole, shared = [eos[0] if eos else 0, *whole], 1
    return Continuation(np.array(whole[:shared], np.int64), np.array(whole[shared:], np.int64))


def likelihoods(scorer: Scorer, continuations: Sequence[Continuation]) -> list[Likelihood]:
    """Return the likelihood of each continuation.

    Those that read the same tokens run once: single-token choices of a question differ in nothing that is read.
    """
    groups: dict[tuple[bytes, int], list[int]] = {}
    for index, item in enumerate(continuations):
        read = np.concatenate([item.context, item.scored[:-1]])
        groups.setdefault((read.tobytes(), len(item.scored)), []).append(index)
    found: list[Likelihood | None] = [None] * len(continuations)
    for members in groups.values():
        first = continuations[members[0]]
        logs = dict.fromkeys(members, 0.0)
        greedy = dict.fromkeys(members, True)
        place = 0
        for rows, targets in scorer.blocks(np.concatenate([first.context, first.scored]), len(first.scored)):
            best = rows.argmax(axis=-1)
            for index in members:
                own = continuations[index].scored[place : place + len(targets)]
                logs[index] -= float(surprises(rows, own).sum())
                greedy[index] = greedy[index] and bool((best == own).all())
            place += len(targets)
        for index in members:
            found[index] = Likelihood(logs[index], greedy[index])
    return [item for item in found if item is not None]
