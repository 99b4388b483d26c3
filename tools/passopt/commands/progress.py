"""A progress bar for long writes: on stderr, and only if that is a terminal."""

from __future__ import annotations

import sys
import time

_WIDTH = 30
_INTERVAL = 0.1


class Progress:
    """Call it with the bytes done since the last call."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = max(total, 1)
        self._done = 0
        self._start = time.monotonic()
        self._shown = 0.0
        self._visible = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._visible and now - self._shown > _INTERVAL:
            self._shown = now
            self._draw(now - self._start)

    def close(self) -> None:
        """Clear the line."""
        if self._visible and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, seconds: float) -> None:
        share = min(1.0, self._done / self._total)
        rate = self._done / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1.0)
        bar = ("█" * round(share * _WIDTH)).ljust(_WIDTH, "·")
        text = f"\r{self._label} {bar} {share:4.0%}  {rate / 1e9:.2f} GB/s  {max(left, 0):.0f} s left\033[K"
        print(text, end="", file=sys.stderr, flush=True)
