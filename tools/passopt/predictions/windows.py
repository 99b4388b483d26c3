"""Cut a text into the windows in which perplexity is measured."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text that a model reads at once: the tokens from `start` to before `stop`.

    The last `scored` of them count; those before are only there to be read.
    """

    start: int
    stop: int
    scored: int


def cut_windows(count: int, window: int, stride: int, *, known: int = 0) -> list[Window]:
    """Return windows of `window` tokens, each of which starts `stride` tokens after the one before.

    A window scores the tokens that no window before has scored, except for a first token that nothing precedes. If
    windows are disjoint, what is left at the end of the text is no window, as in the literature on quantisation;
    overlapping ones reach to its end.

    Args:
        count: The number of tokens of the text.
        window: The length of a window.
        stride: The distance from window to window; not more than `window`.
        known: The number of tokens that are put before every window, so that its own first token can be scored.
    """
    found: list[Window] = []
    done = start = 0
    while done < count:
        stop = min(start + window, count)
        if stop - start < window and stride == window:
            break
        scored = stop - max(done, start + (0 if known else 1))
        if scored:
            found.append(Window(start, stop, scored))
        done, start = stop, start + stride
    return found
