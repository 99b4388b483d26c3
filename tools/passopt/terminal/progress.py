"""Draw a progress bar for long work, on stderr and only if that is a terminal."""

from __future__ import annotations

import sys
import time

_WIDTH = 30
_INTERVAL = 0.1


class Progress:
    """A progress bar; call it with the bytes that were done since the last call, or with the items if `in_items`."""

    def __init__(self, label: str, total: int, *, in_items: bool = False) -> None:
        self._label = label
        self._total = max(total, 1)
        self._in_items = in_items
        self._done = self._skipped = 0
        self._start = time.monotonic()
        self._shown = 0.0
        self._visible = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._visible and now - self._shown > _INTERVAL:
            self._shown = now
            self._draw(now - self._start)

    def skip(self, count: int) -> None:
        """Count work that was done in an earlier run: it belongs to the whole, but not to the speed."""
        self._skipped += count
        self(count)

    def close(self) -> None:
        """Clear the line of the bar."""
        if self._visible and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, seconds: float) -> None:
        share = min(1.0, self._done / self._total)
        rate = (self._done - self._skipped) / max(seconds, 1e-9)
        left = max(self._total - self._done, 0) / max(rate, 1e-3)
        bar = ("█" * round(share * _WIDTH)).ljust(_WIDTH, "·")
        items = f"{self._done}/{self._total}  {rate:,.{1 if rate < 10 else 0}f}/s"
        speed = items if self._in_items else f"{rate / 1e9:.2f} GB/s"
        remaining = f"  {left:.0f} s left" if rate > 0 else ""
        print(f"\r{self._label} {bar} {share:4.0%}  {speed}{remaining}\033[K", end="", file=sys.stderr, flush=True)
