"""Score a text with a model: surprise of its tokens, and divergence from a reference, over windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from passopt.evaluation.reference_store import Kept, ReferenceStore
from passopt.evaluation.scored_rows import Scorer
from passopt.evaluation.text_tokens import TextTokens
from passopt.predictions.divergence import kl_of, log_softmax, surprises
from passopt.predictions.standard_errors import Estimate, block_starts, mean_of, perplexity_of, quantile_of
from passopt.predictions.windows import Window

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: The positions of a block, from whose spread standard errors are estimated.
BLOCK = 128
#: Below so many scored tokens, figures say little about a model, and reports say so.
ENOUGH = 2048


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A text in windows.

    Attributes:
        text: The tokens.
        windows: The windows, in order.
        begin: The ids that are put before every window.
        window: The length of a window, `begin` included.
        stride: The distance from window to window.
    """

    text: TextTokens
    windows: tuple[Window, ...]
    begin: tuple[int, ...]
    window: int
    stride: int

    @property
    def lengths(self) -> list[int]:
        """Return the number of scored tokens of each window."""
        return [window.scored for window in self.windows]

    @property
    def scored(self) -> int:
        """Return the number of scored tokens."""
        return sum(self.lengths)

    def ids(self, window: Window) -> Array:
        """Return the token ids of a window as the model reads them."""
        own = self.text.ids[window.start : window.stop]
        return np.concatenate([np.array(self.begin, np.int64), own])

    def key(self) -> dict[str, Any]:
        """Return what tells the text and its windows from others, for stores of predictions."""
        return {
            "tokens": self.text.digest(),
            "count": len(self.text.ids),
            "begin": list(self.begin),
            "window": self.window,
            "stride": self.stride,
        }


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What one model makes of a text, position by position.

    Attributes:
        surprise: −log p of each scored token, in nats.
        top: The most likely token at each position.
        kl: KL divergence from the reference in nats; None for the reference itself.
    """

    surprise: Array
    top: Array
    kl: Array | None = None


@dataclasses.dataclass(frozen=True)
class TextFigures:
    """The figures of one model on one text, each with its standard error.

    Attributes:
        surprise: Mean −log p of a token, in nats.
        perplexity: The exponential of that.
        more_surprise: The mean difference of −log p from the reference, token by token; None for the reference, like
            all that follow.
        kl_mean: Mean KL divergence from the reference, in nats.
        kl_median: Its median.
        kl_high: Its 99th percentile.
        top1: The share of positions at which both predict the same token.
    """

    surprise: Estimate
    perplexity: Estimate
    more_surprise: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_high: Estimate | None = None
    top1: Estimate | None = None


def score_text(
    task: TextTask,
    scorer: Scorer,
    reference: tuple[ReferenceStore, TextScores] | None,
    tell: Callable[[int], None] = lambda count: None,
) -> TextScores:
    """Run a text through a model.

    Args:
        task: The text and its windows.
        scorer: The model.
        reference: What is kept of the reference, and its scores; None to compare with nothing.
        tell: Gets the number of scored tokens after each block of them.
    """
    surprise, top, kl = (np.empty(task.scored, kind) for kind in (np.float64, np.int64, np.float64))
    place = 0
    for number, window in enumerate(task.windows):
        kept = reference[0].read(number) if reference is not None else None
        begin = place
        for found, targets in scorer.blocks(task.ids(window), window.scored):
            rows = slice(place, place + len(targets))
            surprise[rows], top[rows] = surprises(found, targets), found.argmax(axis=-1)
            if kept is not None:
                kl[rows] = _kl_from_kept(kept.log_probabilities[place - begin : rows.stop - begin], found)
            place = rows.stop
            tell(len(targets))
    return TextScores(surprise, top, kl if reference is not None else None)


def _kl_from_kept(kept: Array, found: Array) -> Array:
    """Return the divergence of each row; it is 0 where all probabilities agree in the precision of what is kept."""
    with np.errstate(over="ignore"):
        same = (found.astype(kept.dtype) == kept).all(axis=-1)
    return np.where(same, 0.0, kl_of(log_softmax(kept), found))


def keep_reference(
    task: TextTask, store: ReferenceStore, open_scorer: Callable[[], Scorer], tell: Callable[[int], None]
) -> TextScores:
    """Run what is missing of a text through the reference, keep its predictions, and return its scores.

    Args:
        task: The text and its windows.
        store: Where predictions are kept.
        open_scorer: Opens the reference; it is called only if a window is missing.
        tell: Gets the number of scored tokens after each block of them.
    """
    for window in task.windows[store.finished :]:
        scorer = open_scorer()
        with store.window() as writer:
            for found, targets in scorer.blocks(task.ids(window), window.scored):
                writer.put(found, surprises(found, targets), found.argmax(axis=-1))
                tell(len(targets))
    kept: list[Kept] = [store.read(number) for number in range(len(task.windows))]
    return TextScores(
        np.concatenate([item.surprise for item in kept]), np.concatenate([item.top for item in kept]).astype(np.int64)
    )


def figures_of(task: TextTask, scores: TextScores, reference: TextScores | None) -> TextFigures:
    """Return the figures of a model, and of its distance to the reference if there is one."""
    starts = block_starts(task.scored, BLOCK)
    surprise = mean_of(scores.surprise, starts)
    own = TextFigures(surprise, perplexity_of(surprise))
    if reference is None or scores.kl is None:
        return own
    return dataclasses.replace(
        own,
        more_surprise=mean_of(scores.surprise - reference.surprise, starts),
        kl_mean=mean_of(scores.kl, starts),
        kl_median=quantile_of(scores.kl, 0.5, starts),
        kl_high=quantile_of(scores.kl, 0.99, starts),
        top1=mean_of(scores.top == reference.top, starts),
    )


def spread_notes(tasks: Sequence[TextTask]) -> list[str]:
    """Return a line about each text on which figures are noise."""
    return [
        f"NOISE: {task.text.name} scores {task.scored:,} tokens only; below {ENOUGH:,} the figures, and the 99 % above "
        f"all, say little about the models"
        for task in tasks
        if task.scored < ENOUGH
    ]
