"""Make the inputs of a verification and run models on them.

The scenarios are seeded prefills, padded batches, decoding with a cache, chunked prefill, and windows of a text.
Shapes: b is the batch, q the positions of a step, kv the positions up to the end of the step. Tokens are fixed in
advance, so both models see the same ones whatever they predict.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir

from passopt.ir.errors import ModelError
from passopt.ir.graph.decoder import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from passopt.predictions.divergence import log_softmax, row_slices, surprises
from passopt.predictions.windows import cut_windows
from passopt.targets.onnxruntime.session import Session
from passopt.verification.sampling.cache_inputs import CacheInput, cache_inputs, next_cache, present_numbers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_PADDINGS = (0, 5, 2)
_PADDED_LENGTH = 9
_PROMPT = 5
_DECODE_STEPS = 4
_CHUNKS = (6, 3, 5)
_LAST = 3
_SPREAD = 24


@dataclasses.dataclass(frozen=True)
class Step:
    """The inputs of one run of a model: input_ids and position_ids [b, q], attention_mask [b, kv]."""

    input_ids: Array
    attention_mask: Array
    position_ids: Array

    @property
    def valid(self) -> Array:
        """Return a mask [b, q] of the positions that hold a token; the outputs of a model at padding mean nothing."""
        return self.attention_mask[:, -self.input_ids.shape[1] :] > 0

    def feeds(self) -> dict[str, Array]:
        """Return the inputs of the step by the name of the graph input."""
        return {
            INPUT_IDS: self.input_ids,
            ATTENTION_MASK: self.attention_mask,
            POSITION_IDS: self.position_ids,
        }


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Steps that run one after the other, each on the cache of the step before it.

    In a window of a text, the last `scored` tokens count for the perplexity; otherwise `scored` is 0. The first step
    finds a cache of `past` positions of random numbers, the same for both models.
    """

    name: str
    steps: tuple[Step, ...]
    scored: int = 0
    past: int = 0


@dataclasses.dataclass
class Observation:
    """The outputs of one model in one scenario.

    `logits` are [b, q or 1, vocab] for each step, `present` is the cache after the last step by output name,
    as numbers.
    """

    logits: list[Array] = dataclasses.field(default_factory=list)
    present: dict[str, Array] = dataclasses.field(default_factory=dict)
    #: The sum of −log p over the scored tokens, in nats; None if nothing is scored or the logits do not cover them.
    surprise: float | None = None


def make_scenarios(vocab: int, max_positions: int, lengths: Sequence[int], seed: int) -> list[Scenario]:
    """Return the seeded scenarios that fit into `max_positions`.

    `vocab` bounds the random token ids. `lengths` are those of the single prefills in tokens; longer ones are cut.
    """
    random = np.random.default_rng(seed)

    def tokens(batch: int, length: int) -> Array:
        return random.integers(0, vocab, (batch, length))

    fitting = sorted({min(length, max_positions) for length in lengths})
    found = [Scenario(f"prefill {length}", tuple(_steps(tokens(1, length), [length]))) for length in fitting]
    padded = min(_PADDED_LENGTH, max_positions - _DECODE_STEPS)
    if padded > max(_PADDINGS):
        ids = tokens(len(_PADDINGS), padded + _DECODE_STEPS)
        steps = _steps(ids, [padded, *[1] * _DECODE_STEPS], _PADDINGS)
        found.append(Scenario("left padding, then decode", tuple(steps)))
    prompt = min(_PROMPT, max_positions - _DECODE_STEPS)
    if prompt > 0:
        ids = tokens(1, prompt + _DECODE_STEPS)
        found.append(Scenario("decode with cache", tuple(_steps(ids, [prompt, *[1] * _DECODE_STEPS]))))
    if sum(_CHUNKS) <= max_positions:
        found.append(Scenario("chunked prefill", tuple(_steps(tokens(1, sum(_CHUNKS)), _CHUNKS))))
    return found


def near_the_end(vocab: int, positions: int, seed: int, whole: int) -> Scenario:
    """Return a chunk and a token at the last of `positions` positions of `whole`, after a cache of random numbers.

    What depends on the length of the sequence, such as rotary angles and slopes, shows there, without a long prefill.
    The last two tokens are the first and the last one of the vocabulary.
    """
    past = positions - _LAST - 1
    ids = np.random.default_rng([seed, positions]).integers(0, vocab, (1, positions))
    ids[:, -2:] = 0, vocab - 1  # the ends of tables of tokens
    _, *steps = _steps(ids, [past, _LAST, 1])
    name = f"near the end, {positions}" if positions == whole else f"late, {positions} of {whole}"
    return Scenario(name, tuple(steps), past=past)


def spread_over(vocab: int, positions: int, seed: int) -> Scenario:
    """Return a few tokens at positions that are spread over all that a model has, the last ones included.

    This needs no cache, so it reaches the end of tables whose cache would be too large.
    """
    ids = np.random.default_rng([seed, positions]).integers(0, vocab, (1, _SPREAD))
    places = np.linspace(0, positions - 1, _SPREAD).astype(np.int64)[None, :]
    return Scenario(f"spread over {positions}", (Step(ids, np.ones((1, _SPREAD), np.int64), places),))


def first_cache(scenario: Scenario, caches: Sequence[CacheInput]) -> dict[str, Array]:
    """Return the cache that the first step of a scenario finds, by the name of the input."""
    batch = scenario.steps[0].input_ids.shape[0]
    filled: dict[str, Array] = {}
    for cache in caches:
        random = np.random.default_rng([scenario.past, zlib.crc32(cache.name.encode())])
        filled |= cache.feeds(random.standard_normal((batch, cache.heads, scenario.past, cache.width), np.float32))
    return filled


def _steps(ids: Array, lengths: Sequence[int], paddings: Sequence[int] = (0,)) -> Iterator[Step]:
    mask = np.ones(ids.shape, np.int64)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    positions = np.clip(mask.cumsum(axis=1) - 1, 0, None)
    start = 0
    for length in lengths:
        stop = start + length
        yield Step(ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        start = stop


def text_windows(tokens: Sequence[int], window: int, stride: int) -> list[Scenario]:
    """Cut a text into overlapping windows, each of which scores the tokens that no window before it has scored.

    A window holds `window` tokens and starts `stride` tokens after the one before. So all tokens but those at the start
    of the text are predicted from at least `window - stride` tokens before them. The very first token is never scored.

    Raises:
        ModelError: If `stride` is not positive or not less than `window`.
    """
    if not 0 < stride < window:
        raise ModelError(f"stride {stride} must be positive and less than the window {window}")
    ids = np.array([tokens], np.int64)
    return [
        Scenario("text", tuple(_steps(ids[:, part.start : part.stop], [part.stop - part.start])), scored=part.scored)
        for part in cut_windows(len(tokens), window, stride)
    ]


def observe(
    model: onnx_ir.Model,
    scenarios: Sequence[Scenario],
    open_session: Callable[[onnx_ir.Model], Session],
    keep: Callable[[Array], Array] | None = None,
) -> list[Observation]:
    """Run a model through all scenarios, each step on the cache that the earlier steps of its scenario made.

    The logits of a text are large; they are kept as `keep` returns them, or not at all.
    """
    session = open_session(model)
    caches = cache_inputs(model)
    found = []
    for scenario in scenarios:
        observation = Observation()
        cache: dict[str, Array] = {}
        for step in scenario.steps:
            cache = cache or first_cache(scenario, caches)
            outputs = session.run({**step.feeds(), **cache})
            logits = outputs.pop(LOGITS)
            if scenario.scored:
                observation.surprise = surprise(logits, step, scenario.scored)
                observation.logits += [keep(logits)] if keep is not None else []
                continue
            observation.logits.append(logits)
            cache = next_cache(outputs)
            observation.present = present_numbers(caches, outputs)
        found.append(observation)
    return found


def surprise(logits: Array, step: Step, scored: int) -> float | None:
    """Return the sum of −log p over the last `scored` tokens of the step, in nats.

    `logits` are [b, q or 1, vocab], of which the first row counts. The result is None if only the last position has
    logits.
    """
    length = step.input_ids.shape[1]
    if logits.shape[1] != length:
        return None
    rows = logits[0, length - 1 - scored : length - 1]
    targets = step.input_ids[0, length - scored :]
    return float(sum(surprises(log_softmax(rows[part]), targets[part]).sum() for part in row_slices(rows)))


def perplexity(scenarios: Sequence[Scenario], observations: Sequence[Observation]) -> float | None:
    """Return the exponential of the mean surprise over the text windows.

    The result is None if there are no windows, or if the model gave no logits for their tokens.
    """
    count = sum(scenario.scored for scenario in scenarios)
    values = [seen.surprise for scenario, seen in zip(scenarios, observations, strict=True) if scenario.scored]
    if not count or any(value is None for value in values):
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(sum(value for value in values if value is not None) / count))


def vocabulary_of(model: onnx_ir.Model) -> int:
    """Return the size of the vocabulary, read from the shape of the logits.

    Raises:
        ModelError: If the graph does not state that size.
    """
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    size = logits.shape[-1] if logits is not None and logits.shape is not None else None
    if not isinstance(size, int):
        raise ModelError(f"output {LOGITS!r} has no known vocabulary size; expected [batch, seq, vocab]")
    return size
